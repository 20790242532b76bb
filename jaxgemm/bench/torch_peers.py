"""cuBLASLt's FP8 products through PyTorch, on the operands that JAX holds: nothing is copied."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxgemm import ScaledArray, layout
from jaxgemm.bench.measure import Call, Timer, Unavailable

if TYPE_CHECKING:
    from jaxgemm.bench.peers import GemmOperands

enabled = True
"""Whether PyTorch may be imported at all: `--no-torch` turns it off."""


class TorchResult:
    """A tensor that `jax.block_until_ready` can wait for."""

    def __init__(self, tensor: Any):
        self.tensor = tensor
        self.nbytes = tensor.numel() * tensor.element_size()

    def block_until_ready(self) -> "TorchResult":
        """Waits for all that PyTorch has launched."""
        _torch().cuda.synchronize()
        return self

    def numpy(self) -> Any:
        """Returns the tensor as a float32 numpy array."""
        return self.tensor.float().cpu().numpy()


def tensorwise(operands: "GemmOperands", timer: Timer) -> Call:
    """`torch._scaled_mm` with one scale a tensor, fast accumulation."""
    del timer
    torch = _torch()
    lhs, lhs_scale = (to_torch(x) for x in operands.tensorwise_lhs)
    out_dtype = _torch_dtype(operands.out_dtype)

    def product(rhs: Any, rhs_scale: Any) -> TorchResult:
        return TorchResult(
            torch._scaled_mm(lhs, rhs.t(), lhs_scale, rhs_scale, out_dtype=out_dtype, use_fast_accum=True)
        )

    return _checked(Call(product, *([to_torch(x) for x in rhs] for rhs in operands.tensorwise_rhs)))


def blockwise(operands: "GemmOperands", timer: Timer) -> Call:
    """`torch._scaled_mm` with scales of 1x128 by 128x128 (or 1x128 by 1x128), from the stored operands as they are."""
    del timer
    torch = _torch()
    lhs, lhs_scale = _stored_operand(operands.scaled_lhs)
    out_dtype = _torch_dtype(operands.out_dtype)

    def product(rhs: Any, rhs_scale: Any) -> TorchResult:
        return TorchResult(torch._scaled_mm(lhs, rhs.t(), lhs_scale, rhs_scale.t(), out_dtype=out_dtype))

    return _checked(Call(product, *(_stored_operand(rhs) for rhs in operands.scaled_rhs)))


def copy_bandwidth(size: int) -> float | None:
    """Returns the GB/s, read and written, of a memory copy of `size` bytes; None without PyTorch and its GPU."""
    try:
        torch = _torch()
    except Unavailable:
        return None
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    milliseconds = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        milliseconds.append(start.elapsed_time(end))
    return 2 * size / sorted(milliseconds[1:])[2] / 1e6


def version() -> str | None:
    """Returns PyTorch's version, None if it is not there."""
    try:
        return str(_torch().__version__)
    except Unavailable:
        return None


def to_torch(x: jax.Array) -> Any:
    """Returns the tensor that shares the memory of an array; FP8 passes through as bytes."""
    torch = _torch()
    if x.dtype.itemsize > 1:
        return torch.from_dlpack(x)
    fp8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}[x.dtype.name]
    return torch.from_dlpack(jax.lax.bitcast_convert_type(x, jnp.uint8)).view(fp8)


def _stored_operand(q: ScaledArray) -> tuple[Any, Any]:
    """Returns values `[rows, cols]` and scales in the strides that cuBLASLt wants.

    Blocks of one row: scales `[rows, cols / 128]`, the rows adjacent in memory, which is how this library stores them.
    Square blocks: `[rows / 128, align_up(cols / 128, 4)]`.
    """
    values = to_torch(q.values)
    if q.block_shape[0] == 1:
        scales = q.stored_scales[:, : q.rows]
        return values, to_torch(jnp.asarray(scales)).t()
    return values, to_torch(layout.pad_trailing(q.scales, (q.scales.shape[0], layout.align_up(q.scales.shape[1], 4))))


def _checked(call: Call) -> Call:
    """Tries the call once: cuBLASLt refuses some shapes, and says so only when called."""
    try:
        call.first()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        message = str(error).strip().splitlines()[0][:200]
        raise Unavailable(f"PyTorch refuses: {message}") from None
    return call


def _torch_dtype(dtype: Any) -> Any:
    torch = _torch()
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[jnp.dtype(dtype).name]


def _torch() -> Any:
    if not enabled:
        raise Unavailable("PyTorch was left out")
    try:
        import torch
    except ImportError:
        raise Unavailable("PyTorch is not installed") from None
    if not torch.cuda.is_available():
        raise Unavailable("PyTorch sees no GPU")
    return torch
