"""`bench dense`: linear layers forward and backward, quantising included, beside the same layers in bfloat16."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm.bench import block
from jaxgemm.bench.measure import Call
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

PEERS = ("xla-bf16",)
PRODUCTS = f"{OWN}, products alone"
"""Column without quantising: the products of operands that are FP8 already."""

Layers = tuple[tuple[Any, jax.Array], ...]
"""Weights `[k, n]` (or a `ScaledArray` `[n, k]`) and biases `[n]`."""


@dataclasses.dataclass(frozen=True)
class DenseCase:
    """Linear layers, one after the other.

    Attributes:
        m: rows of the input.
        widths: of the input, then of each layer's output.
    """

    m: int
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"{self.m} rows, {' -> '.join(map(str, self.widths))}"

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has twice as many."""
        return 2.0 * self.m * sum(k * n for k, n in itertools.pairwise(self.widths))


def dense_cases(rows: int = 8192) -> list[DenseCase | block.MlpCase | block.BlockCase]:
    """Returns an MLP's first layer, a pair down and up again, a small square layer, an MLP, and a transformer block."""
    layers = [DenseCase(rows, widths) for widths in ((4096, 14336), (7168, 2048, 7168), (2048, 2048))]
    return [*layers, block.MlpCase(rows), block.BlockCase()]


def run_case(case: DenseCase | block.MlpCase | block.BlockCase, setup: Setup) -> list[Row]:
    """Measures a training step, and of plain layers a forward pass with weights already quantised."""
    if not isinstance(case, DenseCase):
        return block.run_case(case, setup)
    keys = itertools.count()
    x = normal(next(keys), case.m, case.widths[0])
    layers = tuple(
        (normal(next(keys), k, n) * jnp.bfloat16(k**-0.5), normal(next(keys), n))
        for k, n in itertools.pairwise(case.widths)
    )
    dout = normal(next(keys), case.m, case.widths[-1])
    return [_train_row(case, setup, x, layers, dout), _forward_row(case, setup, x, layers)]


def _train_row(case: DenseCase, setup: Setup, x: jax.Array, layers: Layers, dout: jax.Array) -> Row:
    """Forward and backward: out, dx, and dw, db of each layer; weights quantised in each step."""
    calls = {
        OWN: Call.jitted(_training_step(_fp8_dot(setup)), [x, layers, dout]),
        PRODUCTS: Call.jitted(_products(setup, backward=True), [_quantized_steps(x, layers, dout)]),
    }
    return _measured_row("train", 3 * case.flops, case, setup, calls, _training_step(_bf16_dot), [x, layers, dout])


def _forward_row(case: DenseCase, setup: Setup, x: jax.Array, layers: Layers) -> Row:
    """Forward alone, as for inference: the weights are FP8 already, the activations are not."""
    quantized = tuple((jaxgemm.quantize_transposed(w, (128, 128), implementation="xla"), b) for w, b in layers)
    steps = _quantized_steps(x, layers, None)
    calls = {
        OWN: Call.jitted(_forward(_fp8_dot(setup)), [x, quantized]),
        PRODUCTS: Call.jitted(_products(setup, backward=False), [steps]),
    }
    return _measured_row("forward", case.flops, case, setup, calls, _forward(_bf16_dot), [x, layers])


def _measured_row(
    what: str, flops: float, case: DenseCase, setup: Setup, calls: dict[str, Call], bf16: Any, arguments: list[Any]
) -> Row:
    if "xla-bf16" in setup.peers:
        calls = {**calls, "xla-bf16": Call.jitted(bf16, arguments)}
    problem = dict(group=what, m=case.m, widths=list(case.widths), cold=False)
    result = calls[OWN].first()
    row = Row(f"{what}: {case.name}", problem, flops, float(stored_bytes(arguments, result)))
    row.measured(setup, calls)
    row.compared_with_bf16(calls, result)
    return row


def _fp8_dot(setup: Setup) -> Callable[..., jax.Array]:
    return lambda x, w, b: jaxgemm.fp8_dot(x, w, b, implementation=setup.implementation)


def _bf16_dot(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    return x @ w + b


def _forward(dot: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    def forward(x: jax.Array, layers: Layers) -> jax.Array:
        for w, b in layers:
            x = dot(x, w, b)
        return x

    return forward


def _training_step(dot: Callable[..., jax.Array]) -> Callable[..., Any]:
    def training_step(x: jax.Array, layers: Layers, dout: jax.Array) -> Any:
        out, pull_back = jax.vjp(_forward(dot), x, layers)
        return out, pull_back(dout)

    return training_step


def _quantized_steps(x: jax.Array, layers: Layers, dout: jax.Array | None) -> list[dict[str, Any]]:
    """Returns the FP8 operands of every product of a training step (without dout: of a forward pass)."""
    inputs = list(itertools.accumulate(layers, lambda x, layer: _bf16_dot(x, *layer), initial=x))
    steps: list[dict[str, Any]] = []
    for (w, b), layer_input in zip(reversed(layers), reversed(inputs[:-1]), strict=True):
        lhs, lhs_t, _ = jaxgemm.quantize_both(layer_input, implementation="xla")
        w_natural, w_t, _ = jaxgemm.quantize_both(w, (128, 128), implementation="xla")
        step: dict[str, Any] = dict(lhs=lhs, rhs=w_t, bias=b)
        if dout is not None:
            dout_q, dout_t, _ = jaxgemm.quantize_both(dout, implementation="xla")
            step |= dict(dout=dout_q, rhs_natural=w_natural, lhs_t=lhs_t, dout_t=dout_t)
            dout = dout @ w.T
        steps.append(step)
    return steps


def _products(setup: Setup, backward: bool) -> Callable[..., Any]:
    def products(steps: list[dict[str, Any]]) -> Any:
        name = setup.implementation
        outs = [jaxgemm.gemm(s["lhs"], s["rhs"], s["bias"], implementation=name) for s in steps]
        if not backward:
            return outs
        dlhs = [jaxgemm.gemm(s["dout"], s["rhs_natural"], implementation=name) for s in steps]
        drhs = [
            jaxgemm.gemm(s["lhs_t"], s["dout_t"], preferred_element_type=s["bias"].dtype, implementation=name)
            for s in steps
        ]
        return outs, dlhs, drhs

    return products
