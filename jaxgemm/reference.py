"""Implementation "xla": plain JAX, right on every platform. The oracle of the tests and what a CPU runs.

Products are taken of the *dequantised* operands in float32, with the highest precision the platform has. Everything
works on the stored arrays of `jaxgemm.scaled_array`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm import layout
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.manual_axes import match_varying
from jaxgemm.numerics import INFINITY_BITS, block_scale, reciprocal
from jaxgemm.problem import GemmProblem, QuantizeProblem
from jaxgemm.scaled_array import is_mn_major, store_scales, store_values, transposed_block_shape

GROUP_TILE = 128
"""Rows of one step of the grouped product: enough to fill a matrix unit, few enough to waste little on small groups."""


def quantize(problem: QuantizeProblem, *inputs: jax.Array) -> list[jax.Array]:
    """Quantises `[..., rows, cols]`, or the results of a function of such, into the stored arrays of `problem`.

    Returns:
        For each quantised array: `[values, scales]` if natural, then `[values, scales]` of the transpose if
        transposed, then the float32 column sum `[..., cols]` if asked for.
    """
    arrays, sizes = problem.split_inputs(inputs)
    if problem.rows == "segments":
        return _quantize_segments(problem, arrays[0], sizes)
    if problem.rows == "masked":
        index = jnp.arange(arrays[0].shape[-2], dtype=jnp.int32)
        valid = (jnp.expand_dims(index, range(sizes.ndim)) < sizes[..., None])[..., None]
        arrays = [jnp.where(valid, x, jnp.zeros((), x.dtype)) for x in arrays]
    results = problem.results([x.shape for x in arrays])
    arrays = apply_function(problem, *arrays) if problem.function else arrays
    return [y for x, (plain, _) in zip(arrays, results, strict=True) for y in _quantize_array(x, plain)]


def _quantize_segments(problem: QuantizeProblem, x: jax.Array, sizes: jax.Array) -> list[jax.Array]:
    """Quantises the transpose of groups of rows, in segments aligned to 128."""
    [(plain, (capacity, _))] = problem.results([x.shape])
    offsets = layout.group_offsets(sizes, x.shape[0])
    source, group, valid = layout.aligned_source_rows(offsets, capacity)
    segments = jnp.where(valid[:, None], x[source], jnp.zeros((), x.dtype)) if capacity else x[:0]
    outputs = _quantize_array(segments, dataclasses.replace(plain, column_sum=False))
    if problem.column_sum:
        outputs.append(jax.ops.segment_sum(segments.astype(jnp.float32), group, problem.num_groups))
    return outputs


def apply_function(problem: QuantizeProblem, *inputs: jax.Array) -> list[jax.Array]:
    """Returns the arrays that a problem with a function quantises, in the inputs' dtype."""
    assert problem.function is not None
    function, dtype = FUNCTIONS[problem.function], inputs[0].dtype
    if problem.joined:
        inputs = (*inputs[:-1], *jnp.split(inputs[-1], 2, -1))
    outputs = [_round(x, dtype) for x in function.apply(*(x.astype(jnp.float32) for x in inputs))]
    results, hidden = outputs[: function.num_outputs], outputs[function.num_outputs :]
    if problem.joined:
        results = [jnp.concatenate(results, -1)] if len(results) > 1 else results
    return [*results, *(hidden if problem.hidden else [])]


def _round(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rounds float32 to a dtype, in a way that the compiler does not leave out as excess precision."""
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if dtype == jnp.float16:  # whose subnormal numbers it would flush to zero
        step = np.float32(info.smallest_subnormal)
        subnormal = jax.lax.round(x / step, jax.lax.RoundingMethod.TO_NEAREST_EVEN) * step
        rounded = jnp.where(jnp.abs(x) < np.float32(info.smallest_normal), subnormal, rounded)
    return rounded.astype(dtype)


def _quantize_array(x: jax.Array, problem: QuantizeProblem) -> list[jax.Array]:
    x = x.astype(jnp.float32)
    outputs: list[jax.Array] = []
    if problem.natural:
        values, scales = _quantize_blocks(x, problem.block_shape, problem)
        outputs += [store_values(values), store_scales(scales, problem.block_shape)]
    if problem.transposed:
        # Transposing one byte an element after quantising is cheaper than four before.
        block_shape = transposed_block_shape(problem.block_shape, *x.shape[-2:])
        values, scales = (y.swapaxes(-1, -2) for y in _quantize_blocks(x, block_shape[::-1], problem))
        outputs += [store_values(values), store_scales(scales, block_shape)]
    if problem.column_sum:
        outputs.append(x.sum(-2))
    return outputs


def _quantize_blocks(
    x: jax.Array, block_shape: tuple[int, int], problem: QuantizeProblem
) -> tuple[jax.Array, jax.Array]:
    """Returns logical FP8 values and float32 scales of float32 `[..., rows, cols]`."""
    rows, cols = x.shape[-2:]
    magnitude_bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    scale = block_scale(_block_max(magnitude_bits, block_shape), problem.dtype, problem.power_of_two)
    # Multiplying by the reciprocal, as the kernels do, keeps every implementation bitwise equal.
    inverse = expand_scales(reciprocal(scale, 1 / scale), block_shape, rows, cols)
    limit = float(jnp.finfo(problem.dtype).max)
    values = jnp.clip(x * inverse, -limit, limit).astype(problem.dtype)
    # NOTE: set apart from the arithmetic, since fast-math flags may assume that no NaN flows through it.
    bad = expand_scales(jnp.where(is_finite_bits(scale), 0, 1), block_shape, rows, cols)
    return jnp.where(bad == 1, jnp.array(jnp.nan, problem.dtype), values), scale


def _block_max(bits: jax.Array, block_shape: tuple[int, int]) -> jax.Array:
    """Returns the largest entry of every block, `[..., rows, cols] -> [..., row_blocks, col_blocks]`."""
    row_blocks, col_blocks = (
        layout.cdiv(size, block) for size, block in zip(bits.shape[-2:], block_shape, strict=True)
    )
    padded = layout.pad_trailing(bits, (row_blocks * block_shape[0], col_blocks * block_shape[1]))
    blocks = padded.reshape(*bits.shape[:-2], row_blocks, block_shape[0], col_blocks, block_shape[1])
    return blocks.max((-3, -1), initial=0)


def is_finite_bits(x: jax.Array) -> jax.Array:
    """Says which float32 are finite, by their bits: right under any fast-math flag."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return (bits & np.uint32(INFINITY_BITS)) != np.uint32(INFINITY_BITS)


def expand_scales(scales: jax.Array, block_shape: tuple[int, int], rows: int, cols: int) -> jax.Array:
    """Repeats one entry per block, `[..., row_blocks, col_blocks]`, to one per element, `[..., rows, cols]`."""
    expanded = jnp.repeat(jnp.repeat(scales, block_shape[0], -2), block_shape[1], -1)
    return expanded[..., :rows, :cols]


def dequantize(values: jax.Array, scales: jax.Array, rows: int, cols: int, block_shape: tuple[int, int]) -> jax.Array:
    """Returns the float32 `[..., rows, cols]` that stored values and scales stand for."""
    if is_mn_major(block_shape):
        scales = layout.from_mn_major_tma_aligned(scales, rows)
    return values[..., :rows, :cols].astype(jnp.float32) * expand_scales(scales, block_shape, rows, cols)


def gemm(problem: GemmProblem, lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None) -> jax.Array:
    """The dense product of dequantised operands, `[m, k] x [n, k] -> [m, n]`."""
    return epilogue(problem, _matmul_nt(lhs, rhs), bias)


def grouped_gemm(
    problem: GemmProblem, lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None, group_sizes: jax.Array
) -> jax.Array:
    """The product with contiguous groups of rows, `[m, k] x [g, n, k] -> [m, n]`; rows of no group are zero."""
    offsets = layout.group_offsets(group_sizes, problem.m)
    capacity = layout.aligned_capacity(problem.m, problem.num_groups, GROUP_TILE)
    source, group, valid = layout.aligned_source_rows(offsets, capacity, GROUP_TILE)
    if capacity == 0:
        return jnp.zeros(problem.out_shape, problem.out_dtype)

    def tile_product(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, tile_group = tile
        tile_bias = None if bias is None else bias[tile_group]
        return epilogue(problem, _matmul_nt(lhs[rows], rhs[tile_group]), tile_bias)

    tiles = jax.lax.map(tile_product, (source.reshape(-1, GROUP_TILE), group[::GROUP_TILE]))
    # Send the rows of no group past the end, where the scatter drops them.
    target = jnp.where(valid, source, problem.m)
    out = jnp.zeros(problem.out_shape, problem.out_dtype)
    return out.at[target].set(tiles.reshape(capacity, problem.n), mode="drop")


def masked_grouped_gemm(
    problem: GemmProblem, lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None, masked_m: jax.Array
) -> jax.Array:
    """The product with masked groups, `[g, m, k] x [g, n, k] -> [g, m, n]`; rows past `masked_m[g]` are zero."""
    return finish_partial_sum(problem, _matmul_nt(lhs, rhs), bias, masked_m)


def k_grouped_gemm(
    problem: GemmProblem, lhs: jax.Array, rhs: jax.Array, accumulate: jax.Array | None, group_sizes: jax.Array
) -> jax.Array:
    """The product with groups of contracted columns, `[m, k] x [n, k] -> [g, m, n]`, added to `accumulate` if given."""
    start = jnp.zeros(problem.out_shape, jnp.float32) if accumulate is None else accumulate
    if problem.k == 0:
        return start.astype(problem.out_dtype)
    sizes = layout.clip_aligned_sizes(group_sizes, problem.k, problem.segment_alignment)
    offsets = layout.aligned_group_offsets(sizes, 1)
    capacity = layout.aligned_capacity(problem.k, problem.num_groups)
    source, group, valid = layout.aligned_source_rows(offsets, capacity)
    # Contiguous columns are found through their group's offset; aligned ones start where their segment does.
    starts = layout.aligned_group_offsets(sizes, problem.segment_alignment)
    columns = jnp.where(valid, source - offsets[group] + starts[group], 0)
    start, *_ = match_varying([start, lhs])  # a carry must vary over the mesh as its updates do

    def add_block(out: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        block_columns, block_valid, block_group = block
        lhs_block = jnp.where(block_valid, lhs[:, block_columns], 0)
        rhs_block = jnp.where(block_valid, rhs[:, block_columns], 0)
        return out.at[block_group].add(_matmul_nt(lhs_block, rhs_block)), None

    blocks = (columns.reshape(-1, layout.SCALE_BLOCK), valid.reshape(-1, layout.SCALE_BLOCK))
    out, _ = jax.lax.scan(add_block, start, (*blocks, group[:: layout.SCALE_BLOCK]))
    return out.astype(problem.out_dtype)


def k_masked_gemm(
    problem: GemmProblem, lhs: jax.Array, rhs: jax.Array, bias: jax.Array | None, masked_k: jax.Array
) -> jax.Array:
    """The product of each group's first `masked_k[g]` columns, `[g, m, k] x [g, n, k] -> [g, m, n]`."""
    valid = (jnp.arange(problem.k, dtype=jnp.int32)[None] < masked_k[:, None])[:, None]
    lhs, rhs = (jnp.where(valid, x, jnp.float32(0)) for x in (lhs, rhs))
    return epilogue(problem, _matmul_nt(lhs, rhs), bias)


def epilogue(problem: GemmProblem, accumulator: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds the bias, applies the activation, both in float32, and casts."""
    if bias is not None:
        bias = jnp.expand_dims(bias.astype(jnp.float32), range(accumulator.ndim - bias.ndim))
        accumulator = accumulator + bias
    return activate(problem.activation, accumulator).astype(problem.out_dtype)


def finish_partial_sum(
    problem: GemmProblem, total: jax.Array, bias: jax.Array | None, sizes: jax.Array | None = None
) -> jax.Array:
    """The epilogue of a product whose float32 sum was put together outside: bias, activation, rows that do not count.

    Args:
        problem: dense, grouped or masked.
        total: float32, of the result's shape.
        bias: as the product takes it, or None.
        sizes: `group_sizes` or `masked_m`; None if dense.
    """
    if sizes is None:
        return epilogue(problem, total, bias)
    rows = jnp.arange(problem.m, dtype=jnp.int32)
    if problem.kind == "grouped":
        offsets = layout.group_offsets(sizes, problem.m)
        valid = rows < offsets[-1]
        bias = None if bias is None else bias[layout.group_of_row(offsets, problem.m)]
    else:
        valid = rows[None] < sizes[:, None]
        bias = None if bias is None else bias[:, None]
    return jnp.where(valid[..., None], epilogue(problem, total, bias), jnp.zeros((), problem.out_dtype))


def activate(activation: str | None, x: jax.Array) -> jax.Array:
    """Applies an activation by name; gelu is its tanh approximation, flax's default."""
    match activation:
        case None:
            return x
        case "relu":
            return jax.nn.relu(x)
        case "gelu":
            return jax.nn.gelu(x, approximate=True)
        case "silu":
            return jax.nn.silu(x)
    raise ValueError(f"unknown activation {activation!r}")


def _matmul_nt(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """`[..., m, k] x [..., n, k] -> [..., m, n]` in float32."""
    return jnp.einsum(
        "...mk,...nk->...mn",
        lhs,
        rhs,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
