"""`Recipe`: how the operands of a layer are quantised, forward and backward."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgemm.problem import check_fp8_dtype
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Formats and scaling blocks of the three products of a linear layer. Immutable and hashable.

    With `y = lhs @ rhs`, lhs `[m, k]`, rhs `[k, n]`:

    | product | operands | contracts |
    |---|---|---|
    | fprop | lhs by rhs | k |
    | dgrad | dout by rhs transposed | n |
    | wgrad | lhs transposed by dout | m; both operands are quantised once more, along m |

    Attributes:
        lhs_block_shape: of lhs in fprop: `(1, 128)` or `(128, 128)`.
        rhs_block_shape: of rhs in fprop and dgrad. With `(128, 128)` one quantised weight serves both.
        dout_block_shape: of dout in dgrad. DeepSeek-V3 (appendix B.2) saw training diverge with `(128, 128)` here.
        lhs_dtype: FP8 dtype of lhs, in fprop and wgrad.
        rhs_dtype: FP8 dtype of rhs.
        dout_dtype: FP8 dtype of dout, in dgrad and wgrad; float8_e5m2 trades precision for range.
        power_of_two: rounds every scale up to a power of two.
        wgrad_dtype: "fp8", or "bf16" for a weight gradient of lhs and dout in bfloat16: more exact, at half the
            speed. lhs is then kept in its own dtype, two or four bytes an element in place of one.
    """

    lhs_block_shape: tuple[int, int] = ROW_BLOCK
    rhs_block_shape: tuple[int, int] = SQUARE_BLOCK
    dout_block_shape: tuple[int, int] = ROW_BLOCK
    lhs_dtype: Any = np.dtype(jnp.float8_e4m3fn)
    rhs_dtype: Any = np.dtype(jnp.float8_e4m3fn)
    dout_dtype: Any = np.dtype(jnp.float8_e4m3fn)
    power_of_two: bool = False
    wgrad_dtype: str = "fp8"

    def __post_init__(self) -> None:
        for name in ("lhs_block_shape", "rhs_block_shape", "dout_block_shape"):
            given = getattr(self, name)
            block = tuple(given) if isinstance(given, (tuple, list)) else given
            if block not in (ROW_BLOCK, SQUARE_BLOCK):
                raise ValueError(f"{name} must be (1, 128) or (128, 128), got {getattr(self, name)!r}")
            object.__setattr__(self, name, block)
        for name in ("lhs_dtype", "rhs_dtype", "dout_dtype"):
            object.__setattr__(self, name, check_fp8_dtype(name, getattr(self, name)))
        if not isinstance(self.power_of_two, bool):
            raise TypeError(f"power_of_two must be True or False, got {self.power_of_two!r}")
        if self.wgrad_dtype not in ("fp8", "bf16"):
            raise ValueError(f"wgrad_dtype must be 'fp8' or 'bf16', got {self.wgrad_dtype!r}")


DEEPSEEK = Recipe()
"""That of DeepSeek-V3 (arXiv 2412.19437, 3.3): e4m3 everywhere, 1x128 activations and gradients, 128x128 weights."""
