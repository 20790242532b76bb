"""How the primitives are split over a mesh: partitioning rules for the compiler's automatic SPMD partitioning.

Every axis of every operand belongs to a *letter* of the product (m, n, k, g, ...) and covers it in single elements
(values, bias, result) or in blocks of 128 (scales). A letter may be split over mesh axes if each device's share of it
is whole: a multiple of 128 where blocks would be cut, of the stored rows' alignment elsewhere. A split that would cut
a block is not taken; the compiler then gathers that letter first. Letters that a result lacks are summed: partial
products in float32 are added over the mesh before bias and activation.

| product | split over a mesh | gathered |
|---|---|---|
| dense | m (data parallel), n (columns), k (rows: partial sums) | |
| masked | g (expert parallel), m never, n, k | m |
| grouped | n, k | m and g: rows of a group may lie anywhere |
| k_grouped | m, n | the contracted columns |
| quantize | leading axes, rows, columns | an axis that shares one scale |
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.sharding_impls import parse_flatten_op_sharding  # NOTE: private; the public way refuses split axes
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import NamedSharding, PartitionSpec

from jaxgemm import dispatch, reference
from jaxgemm.layout import SCALE_BLOCK, VALUE_ROW_ALIGNMENT
from jaxgemm.problem import GemmProblem, QuantizeProblem
from jaxgemm.scaled_array import SQUARE_BLOCK, is_mn_major, transposed_block_shape

Dims = tuple[str, ...]
"""Labels of an array's axes: a letter, with "/" behind it if the axis counts blocks of 128."""


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How a primitive's arrays may be split.

    Attributes:
        operands: labels of each operand's axes.
        results: labels of each result's axes.
        units: for each letter that may be split, what each device's share must be a multiple of.
        lengths: the (stored) length of each of these letters.
    """

    operands: tuple[Dims, ...]
    results: tuple[Dims, ...]
    units: dict[str, int]
    lengths: dict[str, int]

    @property
    def summed(self) -> list[str]:
        """Letters that may be split and that every result lacks."""
        return [letter for letter in self.units if not any(letter in _letters(dims) for dims in self.results)]

    def sharding_rule(self) -> SdyShardingRule:
        """Returns the rule that propagates shardings through the primitive."""
        blocked = {dim[:-1] for dims in (*self.operands, *self.results) for dim in dims if dim.endswith("/")}
        unique: list[str] = []
        sizes: dict[str, int] = {}

        def factor(dim: str) -> Any:
            letter = dim.removesuffix("/")
            if letter not in self.units:  # an axis that stays whole has a factor of its own
                unique.append(f"whole{len(unique)}")
                return unique[-1]
            if dim.endswith("/") or letter not in blocked:
                return letter
            sizes[f"{letter}block"] = SCALE_BLOCK
            return CompoundFactor(letter, f"{letter}block")

        operands, results = (
            tuple(ArrayMapping(*map(factor, dims)) for dims in arrays) for arrays in (self.operands, self.results)
        )
        return SdyShardingRule(
            operands,
            results,
            reduction_factors=tuple(self.summed),
            need_replication_factors=tuple(unique),
            **sizes,  # type: ignore[arg-type]  # its stub has no factor sizes
        )

    def choose(self, mesh: Any, operand_specs: Sequence[Any], result_specs: Sequence[Any]) -> dict[str, tuple]:
        """Returns the mesh axes that each letter is split over: what the results want first, then the operands."""
        chosen: dict[str, tuple] = {}
        for arrays, specs in ((self.results, result_specs), (self.operands, operand_specs)):
            for dims, spec in zip(arrays, specs, strict=True):
                for dim, axes in zip(dims, spec, strict=False):
                    letter = dim.removesuffix("/")
                    axes = _as_tuple(axes)
                    taken = {axis for others in chosen.values() for axis in others}
                    if letter not in chosen and axes and not taken & set(axes) and self._is_whole(letter, mesh, axes):
                        chosen[letter] = axes
        return chosen

    def specs(self, arrays: Sequence[Dims], chosen: dict[str, tuple]) -> list[PartitionSpec]:
        """Returns how arrays of these labels are split."""
        return [PartitionSpec(*(chosen.get(dim.removesuffix("/")) for dim in dims)) for dims in arrays]

    def _is_whole(self, letter: str, mesh: Any, axes: tuple) -> bool:
        shares = math.prod(mesh.shape[axis] for axis in axes)
        return letter in self.units and self.lengths[letter] % (self.units[letter] * shares) == 0


def run_gemm(problem: GemmProblem, platform: str, implementation: str | None, *operands: Any) -> jax.Array:
    """`dispatch.run_gemm`, split over the mesh that the program is compiled for."""
    return _partitioned(problem, platform, implementation, tuple(x.shape for x in operands))(*operands)


def run_quantize(problem: QuantizeProblem, platform: str, implementation: str | None, x: jax.Array) -> list[jax.Array]:
    """`dispatch.run_quantize`, split over the mesh that the program is compiled for."""
    return _partitioned(problem, platform, implementation, (x.shape,))(x)


@functools.lru_cache(maxsize=4096)
def _partitioned(problem: Any, platform: str, implementation: str | None, shapes: tuple) -> Any:
    """Returns the function that computes `problem`, with its rules attached."""
    is_gemm = isinstance(problem, GemmProblem)
    rule = gemm_rule(problem, shapes) if is_gemm else quantize_rule(problem, *shapes)

    def whole(*operands: Any) -> Any:
        run: Callable[..., Any] = dispatch.run_gemm if is_gemm else dispatch.run_quantize
        return run(problem, platform, implementation, *operands)

    def partition(mesh: Any, operand_types: Any, result_types: Any) -> Any:
        results = jax.tree.leaves(result_types, is_leaf=lambda x: hasattr(x, "sharding"))
        specs = [[_spec(x.sharding, mesh) for x in arrays] for arrays in (operand_types, results)]
        chosen = rule.choose(mesh, *specs)
        operand_shardings = [NamedSharding(mesh, spec) for spec in rule.specs(rule.operands, chosen)]
        result_shardings = [NamedSharding(mesh, spec) for spec in rule.specs(rule.results, chosen)]
        local = local_gemm if is_gemm else local_quantize
        share = functools.partial(local, problem, platform, implementation, mesh, rule, chosen)
        return mesh, share, result_shardings[0] if is_gemm else result_shardings, tuple(operand_shardings)

    function = custom_partitioning(whole)
    function.def_partition(partition, decode_shardings=False, sharding_rule=rule.sharding_rule())
    return function


def local_gemm(
    problem: GemmProblem,
    platform: str,
    implementation: str | None,
    mesh: Any,
    rule: SplitRule,
    chosen: dict[str, tuple],
    *operands: Any,
) -> jax.Array:
    """One device's share of a product; partial sums over k are added over the mesh in float32."""
    shares = {letter: math.prod(mesh.shape[axis] for axis in axes) for letter, axes in chosen.items()}
    k = rule.lengths["k"] // shares["k"] if "k" in shares else problem.k
    share = dataclasses.replace(
        problem,
        m=problem.m // shares.get("m", 1),
        n=problem.n // shares.get("n", 1),
        k=k,
        num_groups=problem.num_groups // shares.get("g", 1),
    )
    if "k" not in chosen:
        return dispatch.run_gemm(share, platform, implementation, *operands)
    partial = dataclasses.replace(share, has_bias=False, activation=None, out_dtype=np.dtype(np.float32))
    rest = operands[5:] if problem.has_bias else operands[4:]
    total = jax.lax.psum(dispatch.run_gemm(partial, platform, implementation, *operands[:4], *rest), chosen["k"])
    return reference.finish_partial_sum(share, total, operands[4] if problem.has_bias else None, *rest)


def local_quantize(
    problem: QuantizeProblem,
    platform: str,
    implementation: str | None,
    mesh: Any,
    rule: SplitRule,
    chosen: dict[str, tuple],
    x: jax.Array,
) -> list[jax.Array]:
    """One device's share of a quantising pass; a column sum is added over the mesh."""
    del mesh, rule
    outputs = dispatch.run_quantize(problem, platform, implementation, x)
    if problem.column_sum and "r" in chosen:
        outputs[-1] = jax.lax.psum(outputs[-1], chosen["r"])
    return outputs


def gemm_rule(problem: GemmProblem, shapes: Sequence[tuple[int, ...]]) -> SplitRule:
    """Returns how a product may be split. Rows that are stored padded stay whole."""
    lead = {"dense": ("", ""), "grouped": ("", "g"), "masked": ("g", "g"), "k_grouped": ("", "")}[problem.kind]
    lhs = _operand_dims(lead[0], "m", "k", problem.lhs_block_shape)
    rhs = _operand_dims(lead[1], "n", "k", problem.rhs_block_shape)
    result: Dims = ("m", "n") if problem.kind in ("dense", "grouped") else ("g", "m", "n")
    operands = [*lhs, *rhs]
    if problem.has_bias:
        operands.append(("n",) if problem.kind == "dense" else ("g", "n"))
    if problem.accumulate:
        operands.append(result)
    if problem.kind != "dense":
        operands.append(("g",))

    units = {}
    if problem.kind in ("dense", "k_grouped"):
        units["m"] = _row_unit(problem.lhs_block_shape)
    units["n"] = _row_unit(problem.rhs_block_shape)
    if problem.kind == "masked":
        units["g"] = 1
    blocks_of_128 = problem.lhs_block_shape[1] == problem.rhs_block_shape[1] == SCALE_BLOCK
    if problem.kind != "k_grouped" and blocks_of_128:
        units["k"] = SCALE_BLOCK
    lengths = {"m": problem.m, "n": problem.n, "k": shapes[0][-1], "g": problem.num_groups}
    return _split_rule(operands, [result], units, lengths)


def quantize_rule(problem: QuantizeProblem, shape: tuple[int, ...]) -> SplitRule:
    """Returns how a quantising pass over an array of this shape may be split."""
    rows, cols = shape[-2:]
    lead = tuple(f"l{i}" for i in range(len(shape) - 2))
    results: list[Dims] = []
    if problem.natural:
        results += _operand_dims(lead, "r", "c", problem.block_shape)
    if problem.transposed:
        results += _operand_dims(lead, "c", "r", transposed_block_shape(problem.block_shape, rows, cols))
    if problem.column_sum:
        results.append((*lead, "c"))
    whole_scales = problem.block_shape[1] != SCALE_BLOCK
    scaled_rows = problem.transposed or problem.block_shape[0] > 1
    scaled_cols = problem.natural or problem.block_shape[0] > 1
    units = dict.fromkeys(lead, 1)
    if not (whole_scales and scaled_rows):
        units["r"] = SCALE_BLOCK if scaled_rows else VALUE_ROW_ALIGNMENT
    if not whole_scales:
        units["c"] = SCALE_BLOCK if scaled_cols else VALUE_ROW_ALIGNMENT
    lengths = {**dict(zip(lead, shape, strict=False)), "r": rows, "c": cols}
    return _split_rule([(*lead, "r", "c")], results, units, lengths)


def _split_rule(
    operands: Sequence[Dims], results: Sequence[Dims], units: dict[str, int], lengths: dict[str, int]
) -> SplitRule:
    """Drops the letters that no mesh could split: padded ones, and those of a single unit."""
    units = {a: unit for a, unit in units.items() if unit and lengths[a] % unit == 0 and lengths[a] > unit}
    return SplitRule(tuple(operands), tuple(results), units, {letter: lengths[letter] for letter in units})


def _operand_dims(lead: Sequence[str], rows: str, cols: str, block_shape: tuple[int, int]) -> list[Dims]:
    """Returns the labels of the stored values and scales of a quantised array."""
    lead = tuple(lead)
    col_blocks = f"{cols}/" if block_shape[1] == SCALE_BLOCK else "one"
    if is_mn_major(block_shape):
        return [(*lead, rows, cols), (*lead, col_blocks, rows)]
    row_blocks = f"{rows}/" if block_shape[0] == SCALE_BLOCK else "one"
    return [(*lead, rows, cols), (*lead, row_blocks, col_blocks)]


def _row_unit(block_shape: tuple[int, int]) -> int:
    """Returns what shares of an operand's rows must be a multiple of; 0 if its rows cannot be split."""
    if block_shape == SQUARE_BLOCK:
        return SCALE_BLOCK
    return VALUE_ROW_ALIGNMENT if is_mn_major(block_shape) else 0


def _spec(sharding: Any, mesh: Any) -> Any:
    """Returns how the compiler has split an array, in names of mesh axes; nothing if it split a mesh axis itself.

    The compiler may use a part of a mesh axis, where a letter has fewer units than the axis has devices. No name says
    that, so such an array is gathered.
    """
    try:
        return parse_flatten_op_sharding(sharding._to_xla_hlo_sharding(0), mesh)[0]
    except ValueError:
        return ()


def _letters(dims: Dims) -> set[str]:
    return {dim.removesuffix("/") for dim in dims}


def _as_tuple(axes: Any) -> tuple:
    if axes is None:
        return ()
    return axes if isinstance(axes, tuple) else (axes,)
