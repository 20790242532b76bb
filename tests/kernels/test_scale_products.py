"""Scales in parts, for the tensor core to multiply."""

import jax.numpy as jnp
import numpy as np

from jaxgemm.gemm_config import SCALE_PARTS
from jaxgemm.kernels.scale_products import DROPPED_BITS, split_scales

RANDOM = np.exp(np.random.default_rng(0).normal(0, 20, (3, 1000))).astype(np.float32)


def as_tf32(x):
    """What the tensor core takes of a float32."""
    return (x.view(np.uint32) >> DROPPED_BITS << DROPPED_BITS).view(np.float32)


def test_parts_are_tf32_and_add_up_to_the_scale():
    parts = np.asarray(split_scales(jnp.asarray(RANDOM)))
    assert parts.shape == (3, 1000, SCALE_PARTS)
    np.testing.assert_array_equal(as_tf32(parts), parts)
    high, low, rest, again = np.moveaxis(parts, -1, 0)
    np.testing.assert_array_equal(high + (low + rest), RANDOM)
    np.testing.assert_array_equal(again, high)
    assert (low != 0).mean() > 0.9 and (rest != 0).mean() > 0.1  # else one part or two would do


def test_the_table_of_parts_gives_the_product():
    """Depth 8 as the module's table has it: the rows' low part is what is left, which the tensor core truncates."""
    rows, columns = RANDOM[0], RANDOM[1]
    high = as_tf32(rows)
    low = rows - high
    rest = low - as_tf32(low)
    zero = np.zeros_like(rows)
    rows_operand = as_tf32(np.stack([high, high, high, rest, low, low, low, zero], -1)).astype(np.float64)
    parts = np.asarray(split_scales(jnp.asarray(columns)), np.float64)
    product = (rows_operand * np.concatenate([parts, parts], -1)).sum(-1)
    np.testing.assert_allclose(product, rows.astype(np.float64) * columns, rtol=2**-22)


def test_what_is_not_finite_stays_so():
    parts = np.asarray(split_scales(jnp.array([np.nan, np.inf], np.float32)))
    assert not np.isfinite(parts.sum(-1)).any()
