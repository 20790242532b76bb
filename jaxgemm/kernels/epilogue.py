"""The end of a tile: bias and activation on the float32 sums, and their way to the output."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, load
from jaxgemm.tuning import STAGED_BYTES, SWIZZLE_BYTES


def activate(values: jax.Array, activation: str | None) -> jax.Array:
    """Applies "relu", "gelu" (tanh form) or "silu" to float32 values."""
    if activation == "relu":
        return jnp.maximum(values, 0.0)
    if activation == "gelu":
        return 0.5 * values * (1.0 + jnp.tanh(0.7978845608028654 * (values + 0.044715 * values * values * values)))
    if activation == "silu":
        return values / (1.0 + jnp.exp(-values))
    return values


def output_chunk(columns: int, out_dtype: Any) -> int:
    """Columns of the output that are staged and stored together: at most one row of the swizzle."""
    swizzle = plgpu.find_swizzle(columns * jnp.dtype(out_dtype).itemsize * 8, "the output")
    return swizzle // jnp.dtype(out_dtype).itemsize


def output_buffer(num_warpgroups: int, tile_columns: int, out_dtype: Any, transposed: bool) -> Any:
    """The shared-memory type in which each compute warpgroup stages (a part of) one wave of the output.

    `[warpgroups, chunks, 64, chunk]`, swizzled; if the tile is computed transposed, `[warpgroups, tile_columns, 64]`.
    """
    if transposed:
        row_bytes = WAVE_ROWS * jnp.dtype(out_dtype).itemsize
        transforms = (plgpu.SwizzleTransform(SWIZZLE_BYTES),) if row_bytes == SWIZZLE_BYTES else ()
        return plgpu.SMEM((num_warpgroups, tile_columns, WAVE_ROWS), out_dtype, transforms=transforms)
    chunk = output_chunk(tile_columns, out_dtype)
    chunk_bytes = chunk * jnp.dtype(out_dtype).itemsize
    num_chunks = min(tile_columns // chunk, max(1, STAGED_BYTES // (WAVE_ROWS * chunk_bytes)))
    shape = (num_warpgroups, num_chunks, WAVE_ROWS, chunk)
    return plgpu.SMEM(shape, out_dtype, transforms=(plgpu.SwizzleTransform(chunk_bytes),))


def add_bias(sums: list[jax.Array], bias_smem: Any, row: jax.Array, transposed: bool) -> list[jax.Array]:
    """Adds `bias [n]`, along the columns, or along the rows of a transposed tile.

    Args:
        sums: float32 chunks `[64, chunk]` of one wave.
        bias_smem: the tile's slice of the bias.
        row: the wave's first row within the tile.
        transposed: whether n lies along the rows.

    Returns:
        The sums with the bias.
    """
    biased, column = [], 0
    for part in sums:
        width = part.shape[1]
        start, length, axis = (row, WAVE_ROWS, 0) if transposed else (column, width, 1)
        window = bias_smem.at[pl.ds(start, length)]
        bias = load(window, layout=ACCUMULATOR_LAYOUT.reduce(1 - axis)).astype(jnp.float32)
        biased.append(part + lax.broadcast_in_dim(bias, part.shape, [axis]))
        column += width
    return biased


def zero_masked(
    sums: list[jax.Array], row: Any, column: Any, rows_left: jax.Array, transposed: bool
) -> list[jax.Array]:
    """Zeroes what belongs to rows of lhs past the end of the group, whatever they held.

    Args:
        sums: float32 chunks `[64, chunk]` of one wave.
        row: the wave's first row within the tile.
        column: its first column within the tile.
        rows_left: rows of lhs from the tile's start to the end of its group.
        transposed: whether rows of lhs lie along the columns.

    Returns:
        The sums, or zeros.
    """
    kept, first = [], column if transposed else row
    for part in sums:
        index = plgpu.broadcasted_iota(jnp.int32, part.shape, int(transposed), layout=ACCUMULATOR_LAYOUT)
        kept.append(jnp.where(index < rows_left - first, part, jnp.zeros_like(part)))
        first = first + (part.shape[1] if transposed else 0)
    return kept


def store_wave(
    sums: list[jax.Array],
    out_smem: Any,
    out_gmem: Any,
    row: jax.Array,
    column: jax.Array,
    rows_left: Any = None,
    adds: bool = False,
) -> None:
    """Stores one wave as `[64, tile_columns]` of the output; what lies past its end is clipped by TMA.

    NOTE: the store is awaited only before the buffer is written again, so that it overlaps the next tile.

    Args:
        sums: float32 chunks `[64, chunk]`.
        out_smem: this warpgroup's part of the buffer.
        out_gmem: the output `[m, n]`.
        row: first row of the output.
        column: first column of the output.
        rows_left: how many of the rows to store, at most (int32 scalar; may be negative); None for all.
        adds: whether to add to what the output holds; each element once, so the result is the same in every run.
    """
    copy = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False, reduction_op="add" if adds else None)
    num_chunks, chunk = out_smem.shape[0], out_smem.shape[-1]
    pieces = [part[:, i : i + chunk] for part in sums for i in range(0, part.shape[1], chunk)]
    for first in range(0, len(pieces), num_chunks):
        staged = pieces[first : first + num_chunks]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for index, piece in enumerate(staged):
            out_smem[index] = piece.astype(out_smem.dtype)
        plgpu.commit_smem()

        def store_rows(offset, length, first=first, staged=staged):
            for index in range(len(staged)):
                window = pl.ds(row + offset, length), pl.ds(column + (first + index) * chunk, chunk)
                source = out_smem.at[index, pl.ds(offset, length)]
                copy(source, out_gmem.at[window])

        _store_ladder(store_rows, WAVE_ROWS, rows_left)
        plgpu.commit_smem_to_gmem_group()


def store_wave_transposed(
    sums: list[jax.Array], out_smem: Any, out_gmem: Any, row: jax.Array, column: jax.Array, rows_left: Any = None
) -> None:
    """Stores one wave `[64, tile_columns]` as `[tile_columns, 64]` of the output; arguments as for `store_wave`."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    first = 0
    for part in sums:
        values = plgpu.layout_cast(part.astype(out_smem.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        _store(out_smem.at[first : first + part.shape[1]].T, values)
        first += part.shape[1]
    plgpu.commit_smem()

    # NOTE: a contiguous window that is not swizzled goes out as a bulk copy, which is cut off at the array's end alone.
    may_be_bulk = WAVE_ROWS * out_smem.dtype.itemsize != SWIZZLE_BYTES
    if may_be_bulk and out_gmem.shape[1] == WAVE_ROWS:
        most = jnp.int32(out_smem.shape[0]) if rows_left is None else rows_left
        rows_left = lax.min(out_gmem.shape[0] - column, most)

    def store_rows(offset, length):
        def store_columns(count):
            window = pl.ds(column + offset, length), pl.ds(row, count)
            source = out_smem.at[pl.ds(offset, length), pl.ds(0, count)]
            plgpu.copy_smem_to_gmem(source, out_gmem.at[window], commit_group=False)

        past_the_end = out_gmem.shape[1] % WAVE_ROWS
        if length > 1 or not may_be_bulk or not past_the_end:
            return store_columns(WAVE_ROWS)
        pl.when(row + WAVE_ROWS <= out_gmem.shape[1])(lambda: store_columns(WAVE_ROWS))
        pl.when(row + WAVE_ROWS > out_gmem.shape[1])(lambda: store_columns(past_the_end))

    _store_ladder(store_rows, out_smem.shape[0], rows_left)
    plgpu.commit_smem_to_gmem_group()


def _store_ladder(store_rows: Callable[[Any, int], None], most: int, rows_left: Any) -> None:
    """Calls `store_rows(offset, length)` for the first `rows_left` of `most` rows: in one go, or by powers of two.

    A copy has a static length, so a ragged number of rows takes one for each of its binary digits.
    """
    if rows_left is None:
        return store_rows(0, most)
    pl.when(rows_left >= most)(lambda: store_rows(0, most))

    @pl.when(lax.bitwise_and(rows_left > 0, rows_left < most))
    def store_ragged():
        length = 1 << (most - 1).bit_length()
        while length := length >> 1:
            offset = lax.bitwise_and(rows_left, jnp.int32(-2 * length))
            pl.when(lax.bitwise_and(rows_left, jnp.int32(length)) != 0)(functools.partial(store_rows, offset, length))


def _store(target: Any, values: jax.Array) -> None:
    """Stores registers to transposed shared memory.

    NOTE: 32-bit numbers have no such store without bank conflicts; jax >= 0.12 wants to be told that this is known.
    """
    if values.dtype.itemsize == 4 and hasattr(plgpu, "store"):
        plgpu.store(target, values, optimized=False)
    else:
        target[...] = values
