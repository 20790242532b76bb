"""The arithmetic of scales, shared by every implementation so that all quantise to the same bits.

Plain `jnp` on float32 and 32-bit integers: it runs as it is in XLA and inside the Pallas kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
INFINITY_BITS = 0x7F800000
MANTISSA_BITS = 0x7FFFFF


def block_scale(amax_bits: jax.Array, dtype: np.dtype, power_of_two: bool) -> jax.Array:
    """Returns the float32 scale of blocks from the bits of their largest magnitude.

    The largest magnitude is handled as an unsigned integer, which orders non-negative floats and puts Inf and NaN on
    top: no compiler flag can then reason NaN away. `scale = amax * (1 / max(dtype))`, a product because XLA turns the
    division into one anyway; at least the smallest normal float32, so that its reciprocal is finite; 1 for a zero
    block; NaN for a block that holds Inf or NaN.

    Args:
        amax_bits: uint32, any shape: the float32 bits of each block's largest magnitude.
        dtype: FP8 dtype of the values.
        power_of_two: whether to round the scale up to a power of two.

    Returns:
        float32 of the same shape.
    """
    amax = lax.bitcast_convert_type(amax_bits, jnp.float32)
    scale = jnp.maximum(amax * np.float32(1 / float(jnp.finfo(dtype).max)), np.float32(SMALLEST_NORMAL))
    if power_of_two:
        bits = lax.bitcast_convert_type(scale, jnp.uint32)
        scale = lax.bitcast_convert_type((bits + np.uint32(MANTISSA_BITS)) & np.uint32(INFINITY_BITS), jnp.float32)
    scale = jnp.where(amax_bits == np.uint32(0), np.float32(1), scale)
    return jnp.where(amax_bits >= np.uint32(INFINITY_BITS), np.float32(np.nan), scale)


def reciprocal(scale: jax.Array, quotient: jax.Array) -> jax.Array:
    """Returns `1 / scale`, correctly rounded, of positive normal float32; NaN for NaN.

    A GPU divides approximately: `quotient` is within one unit in the last place. Let S and R be the 24-bit
    mantissas of scale and quotient. S * R differs from a power of two at or above 2^46, which is 0 modulo
    2^32, by about S at most. So 32-bit integers hold that remainder exactly, and it says whether R is one too
    small or one too large.

    Args:
        scale: float32, any shape, positive and normal, or NaN.
        quotient: `1 / scale` as the platform divides.

    Returns:
        float32 of the same shape.
    """
    scale_bits, bits = (lax.bitcast_convert_type(x, jnp.int32) for x in (scale, quotient))
    implicit_one = np.int32(MANTISSA_BITS + 1)
    mantissa = (scale_bits & np.int32(MANTISSA_BITS)) | implicit_one
    remainder = -(mantissa * ((bits & np.int32(MANTISSA_BITS)) | implicit_one))
    one, zero = np.int32(1), np.int32(0)
    too_small = jnp.where(remainder * np.int32(2) > mantissa, one, zero)
    too_large = jnp.where(remainder * np.int32(2) < -mantissa, one, zero)
    inverse = lax.bitcast_convert_type(bits + too_small - too_large, jnp.float32)
    return jnp.where(scale_bits >= np.int32(INFINITY_BITS), np.float32(np.nan), inverse)
