"""Weight gradients of operands in bfloat16, for `Recipe(wgrad_dtype="bf16")`: products that XLA computes."""

import math

import jax
import jax.numpy as jnp

from jaxgemm import layout

OVER_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)
"""Of a product that contracts the rows of both operands, group by group."""


def wgrad_bf16(lhs: jax.Array, dout: jax.Array) -> jax.Array:
    """Computes `lhs.T @ dout` in float32, `[..., m, k] x [..., m, n] -> [..., k, n]`.

    Args:
        lhs: float `[..., m, k]`.
        dout: float `[..., m, n]`.

    Returns:
        float32 `[..., k, n]`.

    Example:
        >>> wgrad_bf16(jnp.ones((3, 2)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
    """
    operands = lhs.astype(jnp.bfloat16), dout.astype(jnp.bfloat16)
    return jax.lax.platform_dependent(*operands, cpu=_wide_product, default=_tn_product)


def grouped_wgrad_bf16(lhs: jax.Array, dout: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Computes `lhs[rows_g].T @ dout[rows_g]` of each contiguous group of rows, in float32.

    Args:
        lhs: float `[m, k]`, its rows sorted by group. What the rows of no group hold changes nothing.
        dout: float `[m, n]`.
        group_sizes: integer `[g]`, made valid as `layout.group_offsets` does.

    Returns:
        float32 `[g, k, n]`.

    Example:
        >>> grouped_wgrad_bf16(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.array([1, 0]))[:, :, 0].tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    offsets = layout.group_offsets(group_sizes, lhs.shape[0])
    valid = (jnp.arange(lhs.shape[0], dtype=jnp.int32) < offsets[-1])[:, None]
    lhs, dout = (jnp.where(valid, x.astype(jnp.bfloat16), jnp.zeros((), jnp.bfloat16)) for x in (lhs, dout))
    return _ragged_products(lhs[None], dout[None], jnp.diff(offsets)[None])[0]


@jax.custom_batching.custom_vmap
def _ragged_products(lhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
    """`[b, m, k] x [b, m, n] -> [b, g, k, n]` in float32, with the groups of rows of `sizes` `[b, g]`."""
    if lhs.shape[0] == 1:
        return _ragged_product(lhs[0], dout[0], sizes[0])[None]
    return jax.vmap(_ragged_product)(lhs, dout, sizes)


@_ragged_products.def_vmap
def _batch_ragged_products(axis_size: int, in_batched: list[bool], *operands: jax.Array) -> tuple[jax.Array, bool]:
    """Joins a batch with the one there is: JAX batches `ragged_dot_general` once, in the first axes of all operands."""
    shapes = [x.shape[is_batched:] for x, is_batched in zip(operands, in_batched, strict=True)]
    batches = [jnp.broadcast_to(x, (axis_size, *shape)) for x, shape in zip(operands, shapes, strict=True)]
    out = _ragged_products(*(x.reshape(math.prod(x.shape[:2]), *x.shape[2:]) for x in batches))
    return out.reshape(axis_size, shapes[0][0], *out.shape[1:]), True


def _ragged_product(lhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot_general(lhs, dout, sizes, OVER_ROWS, preferred_element_type=jnp.float32)


def _tn_product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """`[..., m, k] x [..., m, n] -> [..., k, n]` in float32."""
    return jnp.einsum("...mk,...mn->...kn", lhs, rhs, preferred_element_type=jnp.float32)


def _wide_product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The same of float32 operands, where XLA has no product of bfloat16 with these axes, as for some on a CPU."""
    return _tn_product(lhs.astype(jnp.float32), rhs.astype(jnp.float32))
