"""Matrix products of operands that are FP8 already."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm.layout import clip_to_int32
from jaxgemm.primitives import bind_gemm
from jaxgemm.problem import GemmProblem, check_fill, check_implementation, make_problem
from jaxgemm.scaled_array import ScaledArray


def gemm(
    lhs: ScaledArray,
    rhs: ScaledArray,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    activation: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `activation(lhs @ rhs.T + bias)` of quantised matrices, accumulating in float32.

    Args:
        lhs: `[m, k]`, FP8 with scales of any supported block.
        rhs: `[n, k]`, likewise: the contracted axis last.
        bias: bfloat16, float16 or float32 `[n]`, or None; added in float32.
        preferred_element_type: bfloat16, float16 or float32: the dtype of the result.
        activation: None, "relu", "gelu" (tanh approximation) or "silu", applied in float32.
        implementation: None for the best there is, or "mosaic", "triton" (dense products alone), "xla".

    Returns:
        `[m, n]`.

    Raises:
        TypeError: if an operand is no `ScaledArray`, or a dtype is not supported.
        ValueError: if shapes do not fit together, or a name is unknown.
        NotImplementedError: if the named implementation cannot serve this.

    Example:
        >>> from jaxgemm import quantize
        >>> lhs, rhs = quantize(jnp.ones((7, 300))), quantize(jnp.ones((5, 300)), (128, 128))
        >>> gemm(lhs, rhs, preferred_element_type=jnp.float32)[0, 0].item()
        300.0
    """
    problem = make_problem("dense", lhs, rhs, bias, out_dtype=preferred_element_type, activation=activation)
    return _bind(problem, implementation, lhs, rhs, bias)


def grouped_gemm(
    lhs: ScaledArray,
    rhs: ScaledArray,
    group_sizes: jax.Array,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    activation: str | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies contiguous groups of rows, each with its own matrix: `jax.lax.ragged_dot` in FP8.

    `out[i] = activation(lhs[i] @ rhs[group(i)].T + bias[group(i)])`. Group sizes live on the device and may be
    anything; since they cannot raise there, a negative one counts as zero and what lies past m rows is cut off. Rows
    of no group, past the sum of the sizes, are zero.

    Args:
        lhs: `[m, k]`, rows sorted by group.
        rhs: `[g, n, k]`.
        group_sizes: integer `[g]`.
        bias: bfloat16, float16 or float32 `[g, n]`, or None.
        preferred_element_type: as in `gemm`.
        activation: as in `gemm`.
        implementation: as in `gemm`.

    Returns:
        `[m, n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gemm` does; also if group_sizes is not integer `[g]`.

    Example:
        >>> from jaxgemm import quantize
        >>> lhs, rhs = quantize(jnp.ones((3, 8))), quantize(jnp.ones((2, 4, 8)), (128, 128))
        >>> grouped_gemm(lhs, rhs, jnp.array([0, 2]))[:, 0].tolist()
        [8.0, 8.0, 0.0]
    """
    problem = make_problem(
        "grouped", lhs, rhs, bias, group_sizes, out_dtype=preferred_element_type, activation=activation
    )
    return _bind(problem, implementation, lhs, rhs, bias, group_sizes)


def masked_grouped_gemm(
    lhs: ScaledArray,
    rhs: ScaledArray,
    masked_m: jax.Array,
    bias: jax.Array | None = None,
    *,
    preferred_element_type: Any = jnp.bfloat16,
    activation: str | None = None,
    expected_m: int | None = None,
    fill: str = "zero",
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies groups of which only the first `masked_m[g]` rows count: `out[g] = lhs[g] @ rhs[g].T + bias[g]`.

    For decoding, where the rows of an expert change from step to step but shapes may not. `masked_m` lives on the
    device; it is clipped to `[0, max_m]`. Rows past it are never looked at: NaN there changes nothing.

    Args:
        lhs: `[g, max_m, k]`.
        rhs: `[g, n, k]`.
        masked_m: integer `[g]`.
        bias: bfloat16, float16 or float32 `[g, n]`, or None.
        preferred_element_type: as in `gemm`.
        activation: as in `gemm`.
        expected_m: the usual `masked_m`, if known: helps to choose a tile, changes no result.
        fill: "zero", or "unspecified" if the rows past `masked_m` are of no interest, which saves writing them.
        implementation: as in `gemm`.

    Returns:
        `[g, max_m, n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gemm` does; also if masked_m is not integer `[g]`.

    Example:
        >>> from jaxgemm import quantize
        >>> lhs, rhs = quantize(jnp.ones((2, 3, 8))), quantize(jnp.ones((2, 4, 8)), (128, 128))
        >>> masked_grouped_gemm(lhs, rhs, jnp.array([1, 3]))[:, :, 0].tolist()
        [[8.0, 0.0, 0.0], [8.0, 8.0, 8.0]]
    """
    check_fill(fill)
    if isinstance(expected_m, np.integer):
        expected_m = int(expected_m)
    if expected_m is not None and (not isinstance(expected_m, int) or expected_m < 0):
        raise ValueError(f"expected_m must be None or a non-negative int, got {expected_m!r}")
    problem = make_problem(
        "masked", lhs, rhs, bias, masked_m,
        out_dtype=preferred_element_type, activation=activation, expected_m=expected_m, fill=fill,
    )  # fmt: skip
    return _bind(problem, implementation, lhs, rhs, bias, masked_m)


def k_grouped_gemm(
    lhs: ScaledArray,
    rhs: ScaledArray,
    group_sizes: jax.Array,
    *,
    accumulate: jax.Array | None = None,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Contracts each group of columns by itself: `out[g] = lhs[:, cols_g] @ rhs[:, cols_g].T`, a weight gradient.

    Args:
        lhs: `[m, K]`. Its columns hold the groups one after the other; if `jaxgemm.quantize_grouped` made it, each
            starts at a multiple of 128.
        rhs: `[n, K]`, its groups laid out alike.
        group_sizes: integer `[g]`: the columns of each group, without padding. A negative one counts as zero, and
            what lies past K columns is cut off.
        accumulate: float32 `[g, m, n]` to add the result to, or None. Donate it to the enclosing `jax.jit` to have it
            updated in place.
        preferred_element_type: float32 by default: weight gradients are accumulated.
        implementation: as in `gemm`.

    Returns:
        `[g, m, n]`; exact zeros (or `accumulate`) for an empty group.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gemm` does; also if accumulate is not float32 `[g, m, n]`.

    Example:
        >>> from jaxgemm import quantize_grouped
        >>> sizes = jnp.array([1, 2])
        >>> x, dout = jnp.ones((3, 4)), jnp.ones((3, 5))
        >>> k_grouped_gemm(quantize_grouped(x, sizes), quantize_grouped(dout, sizes), sizes)[:, 0, 0].tolist()
        [1.0, 2.0]
    """
    problem = make_problem(
        "k_grouped",
        lhs,
        rhs,
        None,
        group_sizes,
        out_dtype=preferred_element_type,
        accumulate=accumulate is not None,
    )
    if accumulate is not None:
        if getattr(accumulate, "dtype", None) != jnp.float32:
            raise TypeError(f"accumulate must be float32, got {getattr(accumulate, 'dtype', type(accumulate))}")
        if accumulate.shape != problem.out_shape:
            raise ValueError(f"accumulate must be [g, m, n] = {list(problem.out_shape)}, got {list(accumulate.shape)}")
    return _bind(problem, implementation, lhs, rhs, accumulate, group_sizes)


def k_masked_gemm(
    lhs: ScaledArray,
    rhs: ScaledArray,
    masked_k: jax.Array,
    *,
    preferred_element_type: Any = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Contracts the first `masked_k[g]` columns of each group: `out[g] = lhs[g, :, :k_g] @ rhs[g, :, :k_g].T`.

    The weight gradient of masked groups, and not public. What a kernel reads, it reads in tiles of 128 columns: from
    `masked_k[g]` on to the next multiple of 128, values must be zero with finite scales, as the quantiser of masked
    rows writes them. What lies further on is never looked at.

    Args:
        lhs: `[g, m, k]`.
        rhs: `[g, n, k]`.
        masked_k: integer `[g]`, clipped to `[0, k]`.
        preferred_element_type: as in `gemm`.
        implementation: as in `gemm`.

    Returns:
        `[g, m, n]`; exact zeros for an empty group.

    Raises:
        TypeError, ValueError, NotImplementedError: as `gemm` does; also if masked_k is not integer `[g]`.

    Example:
        >>> from jaxgemm import quantize
        >>> x = quantize((jnp.arange(4) < jnp.array([[0], [3]]))[:, None].astype(jnp.float32))
        >>> k_masked_gemm(x, x, jnp.array([0, 3])).ravel().tolist()
        [0.0, 3.0]
    """
    problem = make_problem("k_masked", lhs, rhs, None, masked_k, out_dtype=preferred_element_type)
    return _bind(problem, implementation, lhs, rhs, None, masked_k)


def _bind(
    problem: GemmProblem,
    implementation: str | None,
    lhs: ScaledArray,
    rhs: ScaledArray,
    addend: jax.Array | None,
    sizes: jax.Array | None = None,
) -> jax.Array:
    check_implementation(implementation)
    operands = [lhs.stored_values, lhs.stored_scales, rhs.stored_values, rhs.stored_scales]
    if addend is not None:
        operands.append(jnp.asarray(addend))
    if sizes is not None:
        operands.append(clip_to_int32(sizes))
    return bind_gemm(problem, implementation, *operands)
