"""`bench quantize`: from floats to the stored operands, in bytes a second."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm.bench.measure import Call
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

PEERS = ("xla",)
ACTIVATIONS = ((8192, 7168), (8192, 4096), (8192, 14336), (8192, 2048))
WEIGHTS = ((4096, 14336), (7168, 2048), (2048, 7168), (2048, 2048))

OPERATIONS: dict[str, Callable[..., Any]] = {
    "activation": jaxgemm.quantize,
    "activation, both": jaxgemm.quantize_both,
    "activation, both, column sum": functools.partial(jaxgemm.quantize_both, column_sum=True),
    "weight, transposed": functools.partial(jaxgemm.quantize_transposed, block_shape=(128, 128)),
    "weight, both": functools.partial(jaxgemm.quantize_both, block_shape=(128, 128)),
}


@dataclasses.dataclass(frozen=True)
class QuantizeCase:
    """One pass over a `[rows, cols]` array.

    Attributes:
        operation: a key of `OPERATIONS`.
        rows: of the array.
        cols: of the array.
        dtype: of the array.
    """

    operation: str
    rows: int
    cols: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"{self.operation} {self.rows}x{self.cols} {self.dtype}"


def quantize_cases() -> list[QuantizeCase]:
    """Returns the passes that a training step makes, at the sizes of Llama's and DeepSeek-V3's layers."""
    return [
        QuantizeCase(operation, *shape)
        for operation in OPERATIONS
        for shape in (WEIGHTS if operation.startswith("weight") else ACTIVATIONS)
    ]


def run_case(case: QuantizeCase, setup: Setup) -> list[Row]:
    """Measures one pass beside XLA's, and compares their results bit by bit."""
    x = normal(0, case.rows, case.cols, dtype=jnp.dtype(case.dtype))
    operation = OPERATIONS[case.operation]
    calls = {OWN: Call.jitted(functools.partial(operation, implementation=setup.implementation), [x])}
    if "xla" in setup.peers:
        calls["xla"] = Call.jitted(functools.partial(operation, implementation="xla"), [x])
    result = calls[OWN].first()
    row = Row(
        case.name,
        dict(group=case.operation, rows=case.rows, cols=case.cols, dtype=case.dtype, cold=False),
        flops=0.0,
        bytes=float(x.nbytes + stored_bytes(result)),
    )
    row.measured(setup, calls)
    row.checks["identical"] = identical(result, jax.jit(functools.partial(operation, implementation="xla"))(x))
    return [row]


def identical(actual: Any, expected: Any) -> bool:
    """Says whether all quantised leaves are equal bit by bit, and the column sums, whose order is free, nearly."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return all(_equal_bits(x, y) if x.ndim > 1 else bool(jnp.allclose(x, y, rtol=1e-4, atol=1e-2)) for x, y in pairs)


def _equal_bits(x: jax.Array, y: jax.Array) -> bool:
    bits = jnp.uint8 if x.dtype.itemsize == 1 else jnp.uint32
    return bool((jax.lax.bitcast_convert_type(x, bits) == jax.lax.bitcast_convert_type(y, bits)).all())
