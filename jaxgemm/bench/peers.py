"""What else multiplies matrices on this GPU: XLA in bfloat16 and FP8, cuBLASLt through PyTorch, tokamax."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgemm import ScaledArray, quantize
from jaxgemm.bench import torch_peers
from jaxgemm.bench.measure import Call, Timer, Unavailable, fastest, one_line

FP8_CALL = "__cublas$lt$matmul$f8"
"""Target of the custom call that XLA makes of an FP8 product it recognises; anything else upcasts the operands."""


@dataclasses.dataclass(frozen=True)
class GemmOperands:
    """The same operands for everybody.

    Attributes:
        lhs: bfloat16 `[m, k]`.
        rhs: bfloat16 `[n, k]`, several to rotate through if weights shall be cold.
        scaled_lhs: lhs, quantised as this library does.
        scaled_rhs: rhs, likewise.
        out_dtype: of the product.
    """

    lhs: jax.Array
    rhs: tuple[jax.Array, ...]
    scaled_lhs: ScaledArray
    scaled_rhs: tuple[ScaledArray, ...]
    out_dtype: Any

    @functools.cached_property
    def tensorwise_lhs(self) -> tuple[jax.Array, jax.Array]:
        """FP8 values of lhs and their one float32 scale."""
        return quantize_tensorwise(self.lhs)

    @functools.cached_property
    def tensorwise_rhs(self) -> tuple[tuple[jax.Array, jax.Array], ...]:
        """FP8 values of each rhs and their one float32 scale."""
        return tuple(quantize_tensorwise(rhs) for rhs in self.rhs)


@jax.jit
def quantize_tensorwise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns FP8 values and the one float32 scale of a matrix."""
    q = quantize(x, x.shape, implementation="xla")  # type: ignore[arg-type]
    return q.values, q.scales[0, 0]


def xla_bf16(operands: GemmOperands, timer: Timer) -> Call:
    """XLA's product of bfloat16 operands."""
    del timer
    product = functools.partial(_nt_product, out_dtype=operands.out_dtype)
    return Call.jitted(product, *([operands.lhs, rhs] for rhs in operands.rhs))


def xla_fp8(operands: GemmOperands, timer: Timer) -> Call:
    """XLA's product of FP8 operands with one scale a tensor: cuBLASLt's, if XLA recognises it.

    Versions of XLA differ in whether they fold the scales of the operands into that call. Where they do not, the call
    without scales is faster, and counts: what cuBLASLt can do, since it applies scales on its way.

    Raises:
        Unavailable: if no way of writing it becomes an FP8 custom call here.
    """
    arguments = [[*operands.tensorwise_lhs, *rhs] for rhs in operands.tensorwise_rhs]
    calls = [
        Call.jitted(functools.partial(form, out_dtype=operands.out_dtype), *arguments)
        for form in (_scaled_operands, _plain_product)
    ]
    recognised = [call for call in calls if FP8_CALL in call.function.as_text()]  # type: ignore[attr-defined]
    if not recognised:
        raise Unavailable(f"XLA's program holds no {FP8_CALL}: it would upcast")
    return fastest(timer, recognised)


def _scaled_operands(
    lhs: jax.Array, lhs_scale: jax.Array, rhs: jax.Array, rhs_scale: jax.Array, out_dtype: Any
) -> jax.Array:
    """The form that XLA documents: both operands converted and scaled in bfloat16, then multiplied."""
    lhs, rhs = (x.astype(jnp.bfloat16) * s.astype(jnp.bfloat16) for x, s in ((lhs, lhs_scale), (rhs, rhs_scale)))
    return _nt_product(lhs, rhs, out_dtype)


def _plain_product(
    lhs: jax.Array, lhs_scale: jax.Array, rhs: jax.Array, rhs_scale: jax.Array, out_dtype: Any
) -> jax.Array:
    """The product alone, scales left out."""
    del lhs_scale, rhs_scale
    return _nt_product(lhs, rhs, out_dtype)


def _nt_product(lhs: jax.Array, rhs: jax.Array, out_dtype: Any) -> jax.Array:
    return jax.lax.dot_general(lhs, rhs, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)


GEMM_PEERS: dict[str, Callable[[GemmOperands, Timer], Call]] = {
    "xla-bf16": xla_bf16,
    "xla-fp8": xla_fp8,
    "torch-tensorwise": torch_peers.tensorwise,
    "torch-blockwise": torch_peers.blockwise,
}


def prepare_peers(names: Iterable[str], operands: GemmOperands, timer: Timer) -> tuple[dict[str, Call], dict[str, str]]:
    """Returns the calls of the named peers, and why the others are missing."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            calls[name] = GEMM_PEERS[name](operands, timer)
        except Unavailable as reason:
            missing[name] = str(reason)
    return calls, missing


def tokamax_dot() -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Returns tokamax's `ragged_dot`, a bfloat16 kernel for contiguous groups; its plain XLA product does not count.

    Raises:
        Unavailable: if it is not there.
    """
    try:
        import tokamax
    except ImportError as error:
        raise Unavailable(f"tokamax cannot be imported: {error}") from None

    def dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return tokamax.ragged_dot(lhs, rhs, group_sizes, implementation=("mosaic", "triton"))

    return dot


def prepare(name: str, make: Callable[[], Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Returns a peer's call, or why it is missing: also if it raises while it is compiled."""
    try:
        return {name: make()}, {}
    except Unavailable as reason:
        return {}, {name: str(reason)}
    except Exception as error:  # a peer's failure must not end the run
        return {}, {name: one_line(error)}
