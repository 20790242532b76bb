"""The differentiable products: float operands in, FP8 inside, float result out."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm.dot_vjp import DotOptions, scaled_dot
from jaxgemm.explicit_axes import entries_of, run_automatic
from jaxgemm.layout import clip_to_int32
from jaxgemm.manual_axes import varying_axes
from jaxgemm.problem import (
    check_activation,
    check_bias,
    check_float_array,
    check_float_dtype,
    check_implementation,
    check_sizes,
)
from jaxgemm.recipe import DEEPSEEK, Recipe
from jaxgemm.scaled_array import ScaledArray


def fp8_dot(
    lhs: jax.Array,
    rhs: jax.Array | ScaledArray,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = None,
    activation: str | None = None,
    recipe: Recipe = DEEPSEEK,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `activation(lhs @ rhs + bias)` with FP8 operands and float32 accumulation, differentiably.

    Both operands are quantised on the way in (DeepSeek-V3, 3.3: lhs in blocks of 1x128, rhs of 128x128), and once more
    for the gradients, which are FP8 products too. Reverse-mode only. Any sizes work, zero rows included.

    Args:
        lhs: bfloat16, float16 or float32 `[..., k]`.
        rhs: bfloat16, float16 or float32 `[k, n]`; or a `ScaledArray` `[n, k]`, a weight that is FP8 already: then it
            is a constant, and gets no gradient. The gradient of lhs is taken with its transpose, which is quantised
            anew where blocks of one row do not turn with it.
        bias: bfloat16, float16 or float32 `[n]`, or None.
        preferred_element_type: bfloat16, float16 or float32: dtype of the result; None for that of lhs.
        activation: None, "relu", "gelu" (tanh approximation) or "silu", applied in float32. When differentiating, the
            product before it is rounded to the result's dtype first, because it is kept for the backward pass.
        recipe: formats and blocks of the operands.
        implementation: None for the best there is, or "mosaic", "triton", "xla".

    Returns:
        `[..., n]`.

    Raises:
        TypeError: for an operand or dtype that is not supported.
        ValueError: if shapes do not fit together, or a name is unknown.
        NotImplementedError: if the named implementation cannot serve this.

    Example:
        >>> fp8_dot(jnp.ones((2, 3, 7)), jnp.ones((7, 5)), jnp.ones(5)).shape
        (2, 3, 5)
    """
    lhs, rhs, bias = as_array(lhs), as_array(rhs), as_array(bias)
    check_float_array("lhs", lhs, ("...", "k"))
    k, n = check_rhs(rhs, ("k", "n"))
    if lhs.shape[-1] != k:
        raise ValueError(f"lhs must be [..., k] = [..., {k}] to match rhs, got {list(lhs.shape)}")
    check_bias(bias, (n,))
    options = dot_options("dense", lhs, rhs, bias, preferred_element_type, activation, recipe, implementation)

    def product(lhs: Any, rhs: Any, bias: Any) -> jax.Array:
        out = scaled_dot(options, lhs.reshape(math.prod(lhs.shape[:-1]), k), rhs, bias, None)
        return out.reshape(*lhs.shape[:-1], n)

    return run_automatic(product, lambda: (*entries_of(lhs)[:-1], column_entry(rhs)), lhs, rhs, bias)


def grouped_fp8_dot(
    lhs: jax.Array,
    rhs: jax.Array | ScaledArray,
    group_sizes: jax.Array,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = None,
    activation: str | None = None,
    recipe: Recipe = DEEPSEEK,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies contiguous groups of rows, each with its own matrix: a differentiable `jax.lax.ragged_dot` in FP8.

    Args:
        lhs: bfloat16, float16 or float32 `[m, k]`, rows sorted by group.
        rhs: bfloat16, float16 or float32 `[g, k, n]`; or a `ScaledArray` `[g, n, k]`, without gradient.
        group_sizes: integer `[g]`, on the device. A negative size counts as zero, and what lies past m rows is cut
            off. Rows past the sum of the sizes give zero rows and get zero gradients.
        bias: bfloat16, float16 or float32 `[g, n]`, or None.
        preferred_element_type: as in `fp8_dot`.
        activation: as in `fp8_dot`.
        recipe: as in `fp8_dot`.
        implementation: as in `fp8_dot`.

    Returns:
        `[m, n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `fp8_dot` does; also if group_sizes is not integer `[g]`.

    Example:
        >>> grouped_fp8_dot(jnp.ones((3, 8)), jnp.ones((2, 8, 4)), jnp.array([0, 2]))[:, 0].tolist()
        [8.0, 8.0, 0.0]
    """
    lhs, rhs, bias = (as_array(x) for x in (lhs, rhs, bias))
    check_float_array("lhs", lhs, ("m", "k"))
    num_groups, k, n = check_rhs(rhs, ("g", "k", "n"))
    if lhs.shape[1] != k:
        raise ValueError(f"lhs must be [m, k] = [m, {k}] to match rhs, got {list(lhs.shape)}")
    check_sizes("group_sizes", group_sizes, num_groups)
    check_bias(bias, (num_groups, n))
    options = dot_options("grouped", lhs, rhs, bias, preferred_element_type, activation, recipe, implementation)
    product = functools.partial(scaled_dot, options)
    operands = lhs, rhs, bias, clip_to_int32(group_sizes)
    return run_automatic(product, lambda: (entries_of(lhs)[0], column_entry(rhs)), *operands)


def masked_grouped_fp8_dot(
    lhs: jax.Array,
    rhs: jax.Array | ScaledArray,
    masked_m: jax.Array,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = None,
    activation: str | None = None,
    recipe: Recipe = DEEPSEEK,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies groups of which only the first `masked_m[g]` rows count, differentiably.

    Rows past `masked_m[g]` give zero rows and get zero gradients, whatever they hold.

    Args:
        lhs: bfloat16, float16 or float32 `[g, max_m, k]`.
        rhs: bfloat16, float16 or float32 `[g, k, n]`; or a `ScaledArray` `[g, n, k]`, without gradient.
        masked_m: integer `[g]`, on the device; clipped to `[0, max_m]`.
        bias: bfloat16, float16 or float32 `[g, n]`, or None.
        preferred_element_type: as in `fp8_dot`.
        activation: as in `fp8_dot`.
        recipe: as in `fp8_dot`.
        implementation: as in `fp8_dot`.

    Returns:
        `[g, max_m, n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `fp8_dot` does; also if masked_m is not integer `[g]`.

    Example:
        >>> masked_grouped_fp8_dot(jnp.ones((2, 2, 8)), jnp.ones((2, 8, 4)), jnp.array([1, 2]))[:, :, 0].tolist()
        [[8.0, 0.0], [8.0, 8.0]]
    """
    lhs, rhs, bias = (as_array(x) for x in (lhs, rhs, bias))
    check_float_array("lhs", lhs, ("g", "m", "k"))
    num_groups, k, n = check_rhs(rhs, ("g", "k", "n"))
    if (lhs.shape[0], lhs.shape[2]) != (num_groups, k):
        raise ValueError(f"lhs must be [g, m, k] = [{num_groups}, m, {k}] to match rhs, got {list(lhs.shape)}")
    check_sizes("masked_m", masked_m, num_groups)
    check_bias(bias, (num_groups, n))
    options = dot_options("masked", lhs, rhs, bias, preferred_element_type, activation, recipe, implementation)
    product = functools.partial(scaled_dot, options)
    operands = lhs, rhs, bias, clip_to_int32(masked_m)
    return run_automatic(product, lambda: (*entries_of(lhs)[:2], column_entry(rhs)), *operands)


def fp8_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    recipe: Recipe = DEEPSEEK,
    implementation: str | None = None,
) -> jax.Array:
    """Drop-in for `jax.lax.dot_general` that multiplies in FP8, differentiably: pass it to any Flax module.

    rhs is taken for the weight (blocks of 128x128 by default). All dimension numbers work, batch dimensions included.

    Args:
        lhs: bfloat16, float16 or float32, any rank.
        rhs: likewise.
        dimension_numbers: `((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch))`, as `lax.dot_general` takes.
        precision: accepted for compatibility and without effect: operands are FP8, sums float32.
        preferred_element_type: bfloat16, float16 or float32; None for the dtype of lhs.
        out_sharding: must be None.
        recipe: as in `fp8_dot`.
        implementation: as in `fp8_dot`.

    Returns:
        Batch dimensions, then the free ones of lhs, then those of rhs.

    Raises:
        TypeError: for a dtype that is not supported.
        ValueError: if dimension numbers and shapes do not fit together.
        NotImplementedError: if out_sharding is given, or the named implementation cannot serve this.

    Example:
        >>> fp8_dot_general(jnp.ones((2, 3, 8)), jnp.ones((8, 5)), (((2,), (0,)), ((), ()))).shape
        (2, 3, 5)
    """
    del precision
    if out_sharding is not None:
        raise NotImplementedError("out_sharding is not supported: constrain the result with reshard instead")
    lhs, rhs = as_array(lhs), as_array(rhs)
    check_float_array("lhs", lhs, ("...",))
    check_float_array("rhs", rhs, ("...",))
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = _check_dimensions(lhs.shape, rhs.shape, dimension_numbers)
    lhs_free = [d for d in range(lhs.ndim) if d not in (*lhs_contract, *lhs_batch)]
    rhs_free = [d for d in range(rhs.ndim) if d not in (*rhs_contract, *rhs_batch)]
    batch, m, k, n = (
        [array.shape[d] for d in dims]
        for array, dims in ((lhs, lhs_batch), (lhs, lhs_free), (lhs, lhs_contract), (rhs, rhs_free))
    )
    options = dot_options("dense", lhs, rhs, None, preferred_element_type, None, recipe, implementation)

    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        multiply = functools.partial(scaled_dot, options, bias=None, sizes=None)
        for _ in batch:
            multiply = jax.vmap(multiply)
        lhs = lhs.transpose(*lhs_batch, *lhs_free, *lhs_contract).reshape(*batch, math.prod(m), math.prod(k))
        rhs = rhs.transpose(*rhs_batch, *rhs_contract, *rhs_free).reshape(*batch, math.prod(k), math.prod(n))
        return multiply(lhs, rhs).reshape(*batch, *m, *n)

    def out_entries() -> Any:
        return *(entries_of(lhs)[d] for d in (*lhs_batch, *lhs_free)), *(entries_of(rhs)[d] for d in rhs_free)

    return run_automatic(product, out_entries, lhs, rhs)


def column_entry(rhs: Any) -> Any:
    """Says how the columns n of a right operand are explicitly split."""
    return entries_of(rhs.stored_values)[-2] if isinstance(rhs, ScaledArray) else entries_of(rhs)[-1]


def _check_dimensions(lhs_shape: Any, rhs_shape: Any, dimension_numbers: Any) -> Any:
    """Returns dimension numbers as tuples of int, or raises ValueError saying which do not fit."""
    try:
        (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = (
            tuple(tuple(int(d) for d in dims) for dims in pair) for pair in dimension_numbers
        )
    except (TypeError, ValueError):
        raise ValueError(
            "dimension_numbers must be ((lhs_contracting, rhs_contracting), (lhs_batch, rhs_batch)), "
            f"got {dimension_numbers!r}"
        ) from None
    for name, shape, dims in (
        ("lhs", lhs_shape, (*lhs_contract, *lhs_batch)),
        ("rhs", rhs_shape, (*rhs_contract, *rhs_batch)),
    ):
        if len(set(dims)) != len(dims) or not all(0 <= d < len(shape) for d in dims):
            raise ValueError(
                f"dimension_numbers of {name} must be distinct axes of its shape {list(shape)}, got {list(dims)}"
            )
    for name, lhs_dims, rhs_dims in (
        ("contracting", lhs_contract, rhs_contract),
        ("batch", lhs_batch, rhs_batch),
    ):
        lhs_sizes, rhs_sizes = [lhs_shape[d] for d in lhs_dims], [rhs_shape[d] for d in rhs_dims]
        if lhs_sizes != rhs_sizes:
            raise ValueError(
                f"{name} dimensions must have equal sizes, got {lhs_sizes} for lhs and {rhs_sizes} for rhs"
            )
    return (lhs_contract, rhs_contract), (lhs_batch, rhs_batch)


def dot_options(
    kind: str,
    lhs: Any,
    rhs: Any,
    bias: Any,
    out_dtype: Any,
    activation: Any,
    recipe: Recipe,
    implementation: Any,
) -> DotOptions:
    """Checks what remains to be checked of a product, and returns what is static about it."""
    check_activation(activation)
    check_implementation(implementation)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a jaxgemm.Recipe, got {type(recipe).__name__}")
    return DotOptions(
        kind=kind,
        lhs_dtype=np.dtype(lhs.dtype),
        rhs_dtype=None if isinstance(rhs, ScaledArray) else np.dtype(rhs.dtype),
        bias_dtype=None if bias is None else np.dtype(bias.dtype),
        out_dtype=check_float_dtype("preferred_element_type", lhs.dtype if out_dtype is None else out_dtype),
        activation=activation,
        recipe=recipe,
        implementation=implementation,
        varying=(varying_axes(lhs), varying_axes(rhs), varying_axes(bias)),
    )


def check_rhs(rhs: Any, axes: tuple[str, ...], name: str = "rhs") -> tuple[int, ...]:
    """Returns the sizes of the axes of rhs, `[..., k, n]`, also if it is a `ScaledArray` `[..., n, k]`."""
    if not isinstance(rhs, ScaledArray):
        check_float_array(name, rhs, axes)
        return rhs.shape
    if rhs.ndim != len(axes):
        wanted = ", ".join((*axes[:-2], axes[-1], axes[-2]))
        raise ValueError(f"{name} must be a ScaledArray [{wanted}], got {list(rhs.shape)}")
    *lead, n, k = rhs.shape
    return (*lead, k, n)


def as_array(x: Any) -> Any:
    """Puts a numpy array on the device, unless that would silently change its dtype: float64 is refused later."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) and jnp.asarray(x).dtype == x.dtype else x
