"""What one warpgroup of a quantising kernel does: a slab of 64 output rows by 128 output columns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm import layout
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.kernels.hopper_quantize_plan import BLOCK, SLAB_ROWS, Plan
from jaxgemm.numerics import block_scale, reciprocal


def apply_function(plan: Plan, x_smem, warpgroup) -> None:
    """Applies the elementwise function to a tile in shared memory: results replace the first inputs.

    The warpgroups share the tile in pieces of `SLAB_ROWS` rows by one chunk of columns.
    """
    function, chunks = FUNCTIONS[plan.problem.function], BLOCK // plan.chunk_columns
    num_pieces = chunks * plan.config.tile_m // SLAB_ROWS

    def apply_to_piece(piece) -> None:
        chunk, rows = lax.rem(piece, chunks), pl.ds(lax.div(piece, chunks) * SLAB_ROWS, SLAB_ROWS)
        refs = [x_smem.at[index, chunk, rows] for index in range(function.num_inputs)]
        inputs = [plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False) for ref in refs]
        outputs = function.apply(*(x.astype(jnp.float32) for x in inputs))
        for ref, output in zip(refs[: plan.num_outputs], outputs, strict=False):
            ref[...] = output.astype(plan.in_dtype)

    for first in range(0, num_pieces, plan.num_warpgroups):
        piece = first + warpgroup
        pl.when(piece < num_pieces)(functools.partial(apply_to_piece, piece))
    plgpu.commit_smem()


def quantize_slab(
    plan: Plan, outputs, x_smem, *, transposed, slab, row, column, use, stage, group, valid_rows,
    values_smem, release, scales_smem=None, sums_smem=None, amax_smem=None, amax_ready=None,
) -> None:  # fmt: skip
    """Quantises one slab of a tile in shared memory.

    Args:
        plan: the launch.
        outputs: global memory by name: values and scales of this orientation, and the column sum.
        x_smem: the tile, `[chunks, tile_m, chunk_columns]`.
        transposed: the orientation; below, rows and columns are those of the output.
        slab: which `SLAB_ROWS` rows of the tile.
        row: first output row of the tile.
        column: first output column of the tile.
        use: how many slabs this warpgroup has done, which picks its output buffer.
        stage: which stage the tile is in.
        group: which group the tile belongs to.
        valid_rows: how many rows of the tile count; None for all.
        values_smem: output buffers, `[warpgroups, out_buffers, SLAB_ROWS, BLOCK]`; scales and sums likewise.
        release: called with the orientation once the slab is in registers.
        scales_smem: scales of the slab's rows, if there is one a row.
        sums_smem: sums of the slab's rows, if asked for.
        amax_smem: maxima of the rows of one orientation, by stage, if blocks are square.
        amax_ready: barriers, by stage, that say so.
    """
    first_row, row = row, row + slab * SLAB_ROWS
    limits = (plan.k, plan.m) if transposed else (plan.m, plan.k)
    wants_sums = "column_sum" in outputs
    warpgroup, buffer = lax.axis_index("warpgroup"), lax.rem(use, plan.config.out_buffers)

    # Load the slab to registers, and take the maxima of its rows.
    chunks = _load_slab(plan, x_smem, slab, transposed)
    if valid_rows is not None:
        chunks = [_zero_rows(chunk, valid_rows, slab, transposed) for chunk in chunks]
    amax = _largest_magnitudes(chunks)
    if plan.is_square:
        if transposed != plan.problem.natural:
            amax_smem[stage, pl.ds(slab * SLAB_ROWS, SLAB_ROWS)] = amax
            plgpu.barrier_arrive(amax_ready.at[stage])
        plgpu.barrier_wait(amax_ready.at[stage])
        amax = jnp.max(plgpu.load(amax_smem.at[stage], layout=plgpu.Layout.WGMMA.reduce(0)))
    if wants_sums:
        sums = sum(jnp.sum(chunk.astype(jnp.float32), axis=1) for chunk in chunks)
    release(transposed)

    # Scale and cast.
    amax_bits = lax.bitcast_convert_type(amax, jnp.uint32)
    scale = block_scale(amax_bits, plan.problem.dtype, plan.problem.power_of_two)
    inverse = reciprocal(scale, 1 / scale)
    scaled = [chunk.astype(jnp.float32) * _broadcast_rows(inverse, chunk.shape) for chunk in chunks]
    scaled = jnp.concatenate(scaled, axis=1) if len(scaled) > 1 else scaled[0]
    # NOTE: no clipping. The product exceeds the largest FP8 number by roundings alone, and rounds to it.
    values = _clear_padding(scaled, row, column, limits, plan.is_square).astype(plan.problem.dtype)

    # Wait until the TMA has read this buffer's last slab, and write the new one.
    plgpu.wait_smem_to_gmem(plan.config.out_buffers - 1, wait_read_only=True)
    values_smem[warpgroup, buffer] = values
    if not plan.is_square:
        scales_smem[warpgroup, buffer] = _clear_padded_scales(scale, row, limits[0])
    if wants_sums:
        sums_smem[warpgroup, buffer] = sums
    plgpu.commit_smem()

    # Hand it to the TMA.
    block = lax.div(column, BLOCK)
    if wants_sums:
        _store_row(sums_smem.at[warpgroup, buffer], outputs["column_sum"], (group, block), row)
    if not plan.is_square:
        _store_row(scales_smem.at[warpgroup, buffer], outputs["scales"], (group, block), row)
    target = outputs["values"].at[group, pl.ds(row, SLAB_ROWS), pl.ds(column, BLOCK)]
    plgpu.copy_smem_to_gmem(values_smem.at[warpgroup, buffer], target)
    if plan.is_square:

        @pl.when(slab == 0)
        def _():
            outputs["scales"][group, lax.div(first_row, BLOCK), block] = scale


def _load_slab(plan: Plan, x_smem, slab, transposed: bool) -> list[jax.Array]:
    """Returns a slab `[SLAB_ROWS, BLOCK]` in registers, in column chunks."""
    rows = pl.ds(slab * SLAB_ROWS, SLAB_ROWS)
    wgmma = plgpu.Layout.WGMMA
    if not transposed:
        chunks = range(BLOCK // plan.chunk_columns)
        return [plgpu.load(x_smem.at[chunk, rows], layout=wgmma, optimized=False) for chunk in chunks]
    if plan.in_dtype.itemsize == 2:
        return [plgpu.load(x_smem.at[slab].T, layout=wgmma)]
    columns = plgpu.load(x_smem.at[0, :, rows].T, layout=plgpu.Layout.WGMMA_TRANSPOSED, optimized=False)
    return [plgpu.layout_cast(columns, wgmma)]


def _zero_rows(chunk: jax.Array, valid_rows, slab, transposed: bool) -> jax.Array:
    """Zeroes the rows of the tile that do not count, whatever they hold: columns of a transposed slab."""
    index = plgpu.broadcasted_iota(jnp.int32, chunk.shape, int(transposed), layout=plgpu.Layout.WGMMA)
    first = 0 if transposed else slab * SLAB_ROWS
    return jnp.where(index < valid_rows - first, chunk, jnp.zeros_like(chunk))


def _largest_magnitudes(chunks: list[jax.Array]) -> jax.Array:
    """Returns the float32 maximum of each row's magnitudes, NaN if there is one."""
    if chunks[0].dtype != jnp.float32:
        maxima = [jnp.max(jnp.abs(chunk), axis=1) for chunk in chunks]
        return functools.reduce(jnp.maximum, maxima).astype(jnp.float32)
    # As integers, since XLA's CPU backend, which interprets this, loses NaN in a float32 maximum.
    bits = [lax.bitcast_convert_type(chunk, jnp.int32) & np.int32(0x7FFFFFFF) for chunk in chunks]
    maxima = [jnp.max(chunk, axis=1) for chunk in bits]
    return lax.bitcast_convert_type(functools.reduce(jnp.maximum, maxima), jnp.float32)


def _store_row(source, target, index, start) -> None:
    """Starts storing `SLAB_ROWS` numbers to a row of `target`, from `start` on, without going past its end.

    NOTE: a contiguous piece goes out as a bulk copy, which is cut off at the array's end, not the row's.
    """
    length = target.shape[-1]
    fits = start + SLAB_ROWS <= length

    def store(count: int) -> None:
        piece = source.at[pl.ds(0, count)]
        plgpu.copy_smem_to_gmem(piece, target.at[*index, pl.ds(start, count)], commit_group=False)

    pl.when(fits)(functools.partial(store, SLAB_ROWS))
    if length % SLAB_ROWS:
        is_last = (start < length) & (start + SLAB_ROWS > length)
        pl.when(is_last)(functools.partial(store, length % SLAB_ROWS))


def _broadcast_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0] if x.ndim else [])


def _clear_padding(x: jax.Array, row, column, limits: tuple[int, int], is_square: bool) -> jax.Array:
    """Zeroes what lies past the logical array and is stored: it would be NaN where its block is."""
    if limits[1] % BLOCK:
        columns = plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
        x = jnp.where(columns < limits[1] - column, x, np.float32(0))
    if is_square and limits[0] % layout.VALUE_ROW_ALIGNMENT:
        rows = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=plgpu.Layout.WGMMA)
        x = jnp.where(rows < limits[0] - row, x, np.float32(0))
    return x


def _clear_padded_scales(scale: jax.Array, row, limit: int) -> jax.Array:
    """Zeroes the scales of rows that are stored for alignment alone."""
    if limit % 4 == 0:
        return scale
    rows = plgpu.broadcasted_iota(jnp.int32, scale.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
    return jnp.where(rows < limit - row, scale, np.float32(0))
