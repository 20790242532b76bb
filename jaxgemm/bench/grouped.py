"""`bench grouped`: products of groups, as mixtures of experts need them, beside XLA's in bfloat16."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxgemm
from jaxgemm.bench import accuracy, moe, peers
from jaxgemm.bench.measure import Call, Unavailable
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes
from jaxgemm.bench.suites import deepgemm_figures

PEERS = ("xla-bf16", "tokamax")
SUITES = ("deepgemm", "mixtral")
MOE_NK = ((6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048))
MIXTRAL_NK = ((28672, 4096), (4096, 14336))
"""Gate and up together, then down."""
K_GROUPED = (  # groups, m, n, the usual columns of a group
    (4, 4096, 7168, 8192),
    (4, 7168, 2048, 8192),
    (8, 4096, 7168, 4096),
    (8, 7168, 2048, 4096),
    (16, 4096, 7168, 2048),
    (16, 7168, 2048, 2048),
)


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """Groups of about `rows` rows each.

    Attributes:
        kind: "masked", "contiguous" or "k-grouped".
        groups: how many.
        rows: of a usual group; for "k-grouped" its contracted columns.
        m: rows of the result, for "k-grouped" alone: else they are the groups' rows.
        n: columns of the result.
        k: the contracted axis; 0 for "k-grouped", where it is the groups' columns.
        spread: how group sizes differ: "random" from 0.7 to 1.3 times `rows`, "even", or "zipf", where the i-th
            group is 1/i of the first; the last two have the same total.
    """

    kind: str
    groups: int
    rows: int
    n: int
    k: int = 0
    m: int = 0
    spread: str = "random"

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        if self.kind == "k-grouped":
            return f"{self.kind} {self.groups}x{self.m}x{self.n}, k about {self.rows}"
        spread = "" if self.spread == "random" else f", {self.spread}"
        return f"{self.kind} {self.groups}x{self.rows} {self.n}x{self.k}{spread}"

    @property
    def sizes(self) -> np.ndarray:
        """Sizes of the groups, the same in every run."""
        if self.spread == "even":
            return np.full(self.groups, self.rows, np.int32)
        if self.spread == "zipf":
            shares = 1 / np.arange(1, self.groups + 1)
            sizes = (self.groups * self.rows * shares / shares.sum()).astype(np.int32)
            sizes[0] += self.groups * self.rows - sizes.sum()
            return sizes
        low, high = int(0.7 * self.rows), int(1.3 * self.rows)
        return np.random.default_rng(self.rows).integers(low, high + 1, self.groups).astype(np.int32)


def grouped_cases(suite: str = "deepgemm") -> list[GroupedCase | moe.MoeCase]:
    """Returns the groups of DeepGEMM's tests or of Mixtral, and a whole layer.

    Decoding has masked groups, prefilling and training have contiguous and k-grouped ones.
    """
    if suite == "mixtral":
        return _mixtral_cases()
    masked = [(32, 192), (6, 1024), (32, 20), (6, 20)]
    contiguous = [(4, 8192), (8, 4096)]
    return [
        *(GroupedCase("masked", *groups, *nk) for groups in masked for nk in MOE_NK),
        *(GroupedCase("contiguous", *groups, *nk) for groups in contiguous for nk in MOE_NK),
        *(GroupedCase("contiguous", 8, 4096, 4096, 4096, spread=spread) for spread in ("even", "zipf")),
        *(GroupedCase("k-grouped", groups, rows, n, m=m) for groups, m, n, rows in K_GROUPED),
        moe.MoeCase(),
    ]


def _mixtral_cases() -> list[GroupedCase | moe.MoeCase]:
    """8192 tokens in training, 128 and 16 in decoding; each goes to two of eight experts."""
    return [
        *(GroupedCase("masked", 8, rows, *nk) for rows in (32, 4) for nk in MIXTRAL_NK),
        *(GroupedCase("contiguous", 8, 2048, *nk, spread=s) for nk in MIXTRAL_NK for s in ("random", "even", "zipf")),
        *(GroupedCase("k-grouped", 8, 2048, n, m=k) for n, k in MIXTRAL_NK),
        moe.MoeCase(),
    ]


def run_case(case: GroupedCase | moe.MoeCase, setup: Setup) -> list[Row]:
    """Measures one product of groups, or a layer, beside its peers, and checks it against the oracle."""
    if isinstance(case, moe.MoeCase):
        return moe.run_case(case, setup)
    prepare = {"masked": _masked, "contiguous": _contiguous, "k-grouped": _k_grouped}[case.kind]
    prepared = prepare(case, setup)
    rows = int(case.sizes.sum())
    flops = 2.0 * rows * case.n * (case.m if case.kind == "k-grouped" else case.k)
    problem = dict(group=case.kind, groups=case.groups, rows=rows, m=prepared.m, n=case.n, k=case.k or rows, cold=False)
    calls = {OWN: Call.jitted(prepared.own, prepared.scaled)}
    if "xla-bf16" in setup.peers:
        calls["xla-bf16"] = Call.jitted(prepared.bf16, prepared.floats)
    missing: dict[str, str] = {}
    if "tokamax" in setup.peers:
        made, missing = peers.prepare("tokamax", lambda: _tokamax(case, prepared))
        calls |= made
    row = Row(case.name, problem, flops, prepared.moved).measured(setup, calls, missing)
    row.checks["difference"] = _difference(case, calls[OWN])
    beside = deepgemm_figures()["rates"].get(case.name)
    if beside is not None:
        row.checks["DeepGEMM TFLOP/s (H100)"] = beside
    return [row]


class Prepared(NamedTuple):
    """A case before anything is compiled.

    Attributes:
        own: the product of `scaled` operands.
        scaled: those, and sizes.
        bf16: XLA's product of `floats`.
        floats: bfloat16 operands, and sizes where they are needed.
        moved: bytes that must move.
        m: rows of the result, or of each group's.
    """

    own: Callable[..., jax.Array]
    scaled: list[Any]
    bf16: Callable[..., jax.Array]
    floats: list[Any]
    moved: float
    m: int


def _masked(case: GroupedCase, setup: Setup) -> Prepared:
    """`[g, max_m, k] x [g, n, k]`, max_m the largest size a group can have; XLA computes all rows."""
    max_m = -(-int(1.3 * case.rows) // 64) * 64
    lhs, rhs = normal(0, case.groups, max_m, case.k), normal(1, case.groups, case.n, case.k)
    sizes = jnp.asarray(case.sizes)

    def product(lhs: Any, rhs: Any, sizes: Any) -> jax.Array:
        return jaxgemm.masked_grouped_gemm(
            lhs, rhs, sizes, expected_m=case.rows, fill="unspecified", implementation=setup.implementation
        )

    def every_row(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return jnp.einsum("gmk,gnk->gmn", lhs, rhs)

    scaled = _quantize(lhs, (1, 128)), _quantize(rhs, (128, 128))
    valid = case.sizes.sum() / (case.groups * max_m)
    moved = valid * stored_bytes(scaled[0]) + stored_bytes(scaled[1]) + 2.0 * case.sizes.sum() * case.n
    return Prepared(product, [*scaled, sizes], every_row, [lhs, rhs], float(moved), max_m)


def _contiguous(case: GroupedCase, setup: Setup) -> Prepared:
    """`[m, k] x [g, n, k]`, groups of any size one after the other."""
    m = int(case.sizes.sum())
    lhs, rhs = normal(0, m, case.k), normal(1, case.groups, case.n, case.k)
    sizes = jnp.asarray(case.sizes)

    def product(lhs: Any, rhs: Any, sizes: Any) -> jax.Array:
        return jaxgemm.grouped_gemm(lhs, rhs, sizes, implementation=setup.implementation)

    scaled = _quantize(lhs, (1, 128)), _quantize(rhs, (128, 128))
    floats = [lhs, rhs.swapaxes(1, 2), sizes]
    return Prepared(product, [*scaled, sizes], jax.lax.ragged_dot, floats, stored_bytes(scaled) + 2.0 * m * case.n, m)


def _k_grouped(case: GroupedCase, setup: Setup) -> Prepared:
    """`[m, K] x [n, K] -> [g, m, n]` in float32: the weight gradients of all experts."""
    rows = int(case.sizes.sum())
    lhs, rhs = normal(0, rows, case.m), normal(1, rows, case.n)
    sizes = jnp.asarray(case.sizes)
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )

    def product(lhs: Any, rhs: Any, sizes: Any) -> jax.Array:
        return jaxgemm.k_grouped_gemm(lhs, rhs, sizes, implementation=setup.implementation)

    def ragged(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(lhs, rhs, sizes, numbers, preferred_element_type=jnp.float32)

    quantize = jax.jit(jaxgemm.quantize_grouped, static_argnames="implementation")
    scaled = [quantize(x, sizes, implementation="xla") for x in (lhs, rhs)]
    moved = stored_bytes(scaled) + 4.0 * case.groups * case.m * case.n
    return Prepared(product, [*scaled, sizes], ragged, [lhs, rhs, sizes], moved, case.m)


def _tokamax(case: GroupedCase, prepared: Prepared) -> Call:
    """The same product by tokamax, on the operands of XLA's."""
    if case.kind != "contiguous":
        raise Unavailable("tokamax.ragged_dot multiplies contiguous groups alone")
    return Call.jitted(peers.tokamax_dot(), prepared.floats)


def _quantize(x: jax.Array, block: tuple[int, int]) -> jaxgemm.ScaledArray:
    return jax.jit(lambda x: jaxgemm.quantize(x, block, implementation="xla"))(x)


def _difference(case: GroupedCase, call: Call) -> float:
    """Returns the largest difference of any group's result from the oracle, over sampled rows; 0 without any."""
    out, (lhs, rhs, _) = call.first(), call.argument_sets[0]
    starts = np.cumsum([0, *case.sizes])
    aligned = np.cumsum([0, *(-(-case.sizes // 128) * 128)])
    worst = [0.0]
    for group, size in enumerate(case.sizes):
        if case.kind == "k-grouped":
            rows = accuracy.padded_rows(case.m)
            expected = _k_oracle(lhs, rhs, rows, aligned[group], size)
            worst.append(accuracy.difference(out[group][rows], expected))
        elif size:
            rows = accuracy.padded_rows(int(size))
            place = (group, rows) if case.kind == "masked" else (starts[group] + rows,)
            expected = _group_oracle(lhs, rhs, group, place)
            worst.append(accuracy.difference(out[place], expected))
    return max(worst)


@accuracy.jit_oracle
def _group_oracle(lhs: Any, rhs: Any, group: Any, place: Any) -> jax.Array:
    return accuracy.nt_product(jaxgemm.dequantize(lhs)[place], jaxgemm.dequantize(rhs)[group])


@accuracy.jit_oracle
def _k_oracle(lhs: Any, rhs: Any, rows: Any, start: Any, size: Any) -> jax.Array:
    columns = jnp.arange(lhs.shape[-1]) - start
    lhs_rows = jnp.where((columns >= 0) & (columns < size), jaxgemm.dequantize(lhs)[rows], 0.0)
    return accuracy.nt_product(lhs_rows, jaxgemm.dequantize(rhs))
