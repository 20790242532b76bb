"""Quantising: float arrays to `ScaledArray` and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm import layout, reference
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.explicit_axes import entries_of, run_automatic
from jaxgemm.layout import clip_to_int32
from jaxgemm.primitives import bind_quantize
from jaxgemm.problem import (
    QuantizeProblem,
    check_float_array,
    check_float_dtype,
    check_fp8_dtype,
    check_implementation,
    check_sizes,
)
from jaxgemm.scaled_array import (
    ROW_BLOCK,
    ScaledArray,
    resolve_block_shape,
    transposed_block_shape,
)

QuantizedResult = tuple[ScaledArray | None, ScaledArray | None, jax.Array | None]
"""An array as it lies, its transpose, and its column sum: what was asked for of them."""


def quantize(
    x: jax.Array,
    block_shape: tuple[int, int] = ROW_BLOCK,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    power_of_two: bool = False,
    valid_rows: jax.Array | None = None,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantises an array to FP8 with one float32 scale per block: `scale = amax(block) / max(dtype)`.

    A block of zeros gets scale 1. A NaN or Inf makes its whole block, and so every product that reads it, NaN. Scales
    are at least the smallest normal float32, so blocks of tiny numbers (down to 1e-38) stay finite.

    Args:
        x: bfloat16, float16 or float32 `[..., m, k]`; the last axis is the one a product will contract.
        block_shape: `(1, 128)` for activations and gradients, `(128, 128)` for weights (DeepSeek-V3, 3.3.2), `(1, k)`
            for one scale a row, `(m, k)` for one scale a matrix. Blocks at the edges may be partial.
        dtype: float8_e4m3fn (largest 448) or float8_e5m2 (largest 57344).
        power_of_two: rounds scales up to powers of two, which makes scaling exact.
        valid_rows: None, or integer `[...]`, as many as there are matrices: how many of the first rows of each count.
            The others are zeros to the result, whatever they hold, and kernels do not read them.
        implementation: None for the best there is, or "mosaic", "xla".

    Returns:
        A `ScaledArray` of x's shape.

    Raises:
        TypeError: if x or dtype has another dtype.
        ValueError: if x has fewer than two axes, or the block shape or implementation is unknown.
        NotImplementedError: if the named implementation cannot serve this.

    Example:
        >>> q = quantize(jnp.arange(14.0).reshape(2, 7))
        >>> q
        ScaledArray(shape=(2, 7), dtype=float8_e4m3fn, block_shape=(1, 128))
        >>> q.scales.shape
        (2, 1)
    """
    check_float_array("x", x, ("...", "m", "k"))
    problem = _quantize_problem(x, block_shape, dtype, power_of_two, implementation)
    values, scales = _bind(problem, implementation, valid_rows, x)
    return ScaledArray(values, scales, x.shape[-2], x.shape[-1], problem.block_shape)


def quantize_both(
    x: jax.Array,
    block_shape: tuple[int, int] = ROW_BLOCK,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    power_of_two: bool = False,
    column_sum: bool = False,
    valid_rows: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[ScaledArray, ScaledArray, jax.Array | None]:
    """Quantises an array and its transpose in one pass over it, as training needs both.

    For blocks of one row, the transpose is scaled along the *other* axis than the array is: it is quantised from the
    original, never made by transposing the quantised one. Square blocks give the same scales both ways.

    Args:
        x: bfloat16, float16 or float32 `[..., m, k]`.
        block_shape: as in `quantize`.
        dtype: as in `quantize`.
        power_of_two: as in `quantize`.
        column_sum: whether to sum over the rows too: the gradient of a bias, if x is that of the output.
        valid_rows: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        `(natural [..., m, k], transposed [..., k, m], column_sum)`; the last is float32 `[..., k]`, or None.

    Raises:
        TypeError, ValueError, NotImplementedError: as `quantize` does.

    Example:
        >>> natural, transposed, total = quantize_both(jnp.ones((3, 200)), column_sum=True)
        >>> natural.shape, transposed.shape, total.shape
        ((3, 200), (200, 3), (200,))
    """
    check_float_array("x", x, ("...", "m", "k"))
    problem = _quantize_problem(
        x, block_shape, dtype, power_of_two, implementation, transposed=True, column_sum=column_sum
    )
    values, scales, values_t, scales_t, *total = _bind(problem, implementation, valid_rows, x)
    (rows, cols), block = x.shape[-2:], problem.block_shape
    transposed = ScaledArray(values_t, scales_t, cols, rows, transposed_block_shape(block, rows, cols))
    return ScaledArray(values, scales, rows, cols, block), transposed, total[0] if total else None


def quantize_transposed(
    x: jax.Array,
    block_shape: tuple[int, int] = ROW_BLOCK,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    power_of_two: bool = False,
    valid_rows: jax.Array | None = None,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantises the transpose of the last two axes: `quantize(x.swapaxes(-1, -2))` without a transposed copy of x.

    This is how a weight `[k, n]` becomes the right operand `[n, k]` of a product.

    Args:
        x: bfloat16, float16 or float32 `[..., m, k]`.
        block_shape: of the *untransposed* array, as in `quantize`; blocks of one row lie along the transpose's rows.
        dtype: as in `quantize`.
        power_of_two: as in `quantize`.
        valid_rows: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        A `ScaledArray` `[..., k, m]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `quantize` does.

    Example:
        >>> quantize_transposed(jnp.ones((300, 200)), (128, 128))
        ScaledArray(shape=(200, 300), dtype=float8_e4m3fn, block_shape=(128, 128))
    """
    check_float_array("x", x, ("...", "m", "k"))
    problem = _quantize_problem(x, block_shape, dtype, power_of_two, implementation, natural=False, transposed=True)
    values, scales = _bind(problem, implementation, valid_rows, x)
    rows, cols = x.shape[-2:]
    return ScaledArray(values, scales, cols, rows, transposed_block_shape(problem.block_shape, rows, cols))


def quantize_function(
    function: str,
    *inputs: jax.Array,
    dtype: Any = jnp.float8_e4m3fn,
    power_of_two: bool = False,
    natural: bool = True,
    transposed: bool = True,
    column_sum: bool = False,
    joined: bool = False,
    hidden: bool = False,
    valid_rows: jax.Array | None = None,
    implementation: str | None = None,
) -> list[QuantizedResult]:
    """Quantises an elementwise function's results, in blocks of 1x128, without storing them in high precision.

    The function is taken in float32, and its results are rounded to the dtype of the inputs, as if they were stored.
    Kernels round a sigmoid's last bit as the GPU does: with relu all implementations give the same bits, with gelu and
    silu but for values at the border of two FP8 numbers.

    Args:
        function: an activation ("relu", "gelu", "silu") of `x`; with "_gate" behind it, of `gate`, times `up`; with
            "_backward" behind that, the gradients of these inputs, of which dout comes first.
        *inputs: bfloat16, float16 or float32 `[..., m, k]`, of one shape and dtype.
        dtype: as in `quantize`.
        power_of_two: as in `quantize`.
        natural: whether to return each result as it lies.
        transposed: whether to return its transpose, scaled along m.
        column_sum: whether to sum it over the rows.
        joined: whether gate and up are one array `[..., m, 2 k]`, side by side, as are then their gradients.
        hidden: with "_backward", whether to return the forward function's result too, transposed alone.
        valid_rows: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        For each result `(natural, transposed, column_sum)`, None for what was not asked for.

    Raises:
        TypeError, ValueError, NotImplementedError: as `quantize` does; also if inputs or options do not fit the
            function.

    Example:
        >>> gate, up = jnp.ones((3, 200)), jnp.ones((3, 200))
        >>> [(natural, transposed, _)] = quantize_function("silu_gate", gate, up)
        >>> natural.shape, transposed.shape
        ((3, 200), (200, 3))
    """
    _check_function(function, inputs, joined, hidden)
    check_implementation(implementation)
    problem = QuantizeProblem(
        ROW_BLOCK, check_fp8_dtype("dtype", dtype), bool(power_of_two), natural, transposed, column_sum,
        function, joined, hidden,
    )  # fmt: skip
    outputs = iter(_bind(problem, implementation, valid_rows, *inputs))
    results = []
    for part, (*_, rows, cols) in problem.results([x.shape for x in inputs]):
        q = ScaledArray(next(outputs), next(outputs), rows, cols, ROW_BLOCK) if part.natural else None
        q_t = ScaledArray(next(outputs), next(outputs), cols, rows, ROW_BLOCK) if part.transposed else None
        results.append((q, q_t, next(outputs) if part.column_sum else None))
    return results


def quantize_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> ScaledArray:
    """Quantises contiguous groups of rows, transposed, as an operand of `jaxgemm.k_grouped_gemm`.

    Row groups become column segments: each starts at a multiple of 128 and is padded with zeros, so no block of 128
    mixes two groups. The segments are laid out on the device, from `group_sizes`; sizes may be anything (a negative
    one counts as zero, and what lies past m rows is cut off), and rows of no group are left out, unread.

    Args:
        x: bfloat16, float16 or float32 `[m, k]`, its rows sorted by group.
        group_sizes: integer `[g]`.
        dtype: as in `quantize`.
        power_of_two: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        A `ScaledArray` `[k, aligned_capacity(m, g)]` of blocks `(1, 128)` with `segment_alignment` 128.

    Raises:
        TypeError: if x is not float or group_sizes not integer.
        ValueError: if x is not `[m, k]` or group_sizes not `[g]`.
        NotImplementedError: if the named implementation cannot serve this.

    Example:
        >>> quantize_grouped(jnp.ones((300, 64)), jnp.array([299, 1]))
        ScaledArray(shape=(64, 512), dtype=float8_e4m3fn, block_shape=(1, 128), segment_alignment=128)
    """
    check_float_array("x", x, ("m", "k"))
    check_sizes("group_sizes", group_sizes, None)
    return quantize_segments(x, group_sizes, dtype, power_of_two=power_of_two, implementation=implementation)[0]


def quantize_segments(
    x: jax.Array,
    group_sizes: jax.Array,
    dtype: Any,
    *,
    power_of_two: bool = False,
    column_sum: bool = False,
    implementation: str | None = None,
) -> tuple[ScaledArray, jax.Array | None]:
    """`quantize_grouped`, and the float32 sum `[g, k]` over the rows of each group if asked for."""
    problem = _quantize_problem(
        x, ROW_BLOCK, dtype, power_of_two, implementation,
        natural=False, transposed=True, column_sum=column_sum, rows="segments", num_groups=group_sizes.shape[0],
    )  # fmt: skip
    [(_, (capacity, cols))] = problem.results([x.shape])
    values, scales, *total = bind_quantize(problem, implementation, x, clip_to_int32(group_sizes))
    q = ScaledArray(values, scales, cols, capacity, ROW_BLOCK, layout.SCALE_BLOCK)
    return q, total[0] if total else None


def dequantize(q: ScaledArray, dtype: Any = jnp.float32) -> jax.Array:
    """Returns what a `ScaledArray` stands for: values times scales, block by block.

    Args:
        q: `[..., rows, cols]`.
        dtype: bfloat16, float16 or float32, of the result; the product is taken in float32.

    Returns:
        `[..., rows, cols]`.

    Raises:
        TypeError: if q is no `ScaledArray` or the dtype is another.

    Example:
        >>> dequantize(quantize(jnp.array([[1.0, -448.0]]))).tolist()
        [[1.0, -448.0]]
    """
    if not isinstance(q, ScaledArray):
        raise TypeError(f"q must be a ScaledArray, got {type(q).__name__}")
    dtype = check_float_dtype("dtype", dtype)

    def product(values: jax.Array, scales: jax.Array) -> jax.Array:
        return reference.dequantize(values, scales, q.rows, q.cols, q.block_shape).astype(dtype)

    return run_automatic(product, lambda: entries_of(q.stored_values), q.stored_values, q.stored_scales)


def _check_function(function: str, inputs: tuple[jax.Array, ...], joined: bool, hidden: bool) -> None:
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(map(repr, FUNCTIONS))}, got {function!r}")
    if joined and "_gate" not in function:
        raise ValueError(f"joined must be False for {function!r}, which has no gate")
    if hidden and not FUNCTIONS[function].has_hidden:
        raise ValueError(f"hidden must be False for {function!r}, which is no backward function")
    num_inputs = FUNCTIONS[function].num_inputs - joined
    if len(inputs) != num_inputs:
        raise ValueError(f"inputs of {function!r} must be {num_inputs} arrays, got {len(inputs)}")
    for x in inputs:
        check_float_array("inputs", x, ("...", "m", "k"))
        if x.dtype != inputs[0].dtype:
            raise TypeError(f"inputs must have one dtype, got {inputs[0].dtype} and {x.dtype}")
    # Joined, the last input is twice as wide as the others, or as any even width where it is alone.
    shapes = [x.shape for x in inputs]
    *lead, cols = shapes[0]
    widths = [cols] * (len(inputs) - joined) + [2 * cols if len(inputs) > 1 else cols // 2 * 2] * joined
    if shapes != [(*lead, width) for width in widths]:
        raise ValueError(f"inputs of {function!r} must fit together, got shapes {[list(shape) for shape in shapes]}")


def _bind(problem: QuantizeProblem, implementation: str | None, valid_rows: Any, *arrays: jax.Array) -> list[jax.Array]:
    """Binds a pass over arrays, of which only some rows count unless `valid_rows` is None."""
    if valid_rows is None:
        return bind_quantize(problem, implementation, *arrays)
    valid_rows = valid_rows if hasattr(valid_rows, "dtype") else np.asarray(valid_rows)
    if not jnp.issubdtype(valid_rows.dtype, jnp.integer):
        raise TypeError(f"valid_rows must be an integer array, got {valid_rows.dtype}")
    lead = arrays[0].shape[:-2]
    if valid_rows.shape != lead:
        raise ValueError(f"valid_rows must be [...] = {list(lead)}, got shape {list(valid_rows.shape)}")
    masked = dataclasses.replace(problem, rows="masked")
    return bind_quantize(masked, implementation, *arrays, clip_to_int32(valid_rows))


def _quantize_problem(
    x: jax.Array,
    block_shape: tuple[int, int],
    dtype: Any,
    power_of_two: bool,
    implementation: str | None,
    **outputs: Any,
) -> QuantizeProblem:
    check_implementation(implementation)
    block = resolve_block_shape(block_shape, *x.shape[-2:])
    return QuantizeProblem(block, check_fp8_dtype("dtype", dtype), bool(power_of_two), **outputs)
