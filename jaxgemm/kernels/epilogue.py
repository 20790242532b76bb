"""The end of a tile: bias and activation on the float32 sums, and their way to the output."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.gemm_config import SWIZZLE_BYTES, GemmConfig, staged_chunks
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, load
from jaxgemm.problem import GemmProblem


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


def output_buffer(problem: GemmProblem, config: GemmConfig, columns: int) -> Any:
    """The shared-memory type in which each compute warpgroup stages (a part of) its share of an output tile.

    `[warpgroups, chunks, 64, chunk]`, swizzled; if the tile is computed transposed, `[warpgroups, columns, 64]`.

    Args:
        problem: what is computed.
        config: tiles.
        columns: of the tile as computed, that a block stores.
    """
    itemsize = problem.out_dtype.itemsize
    if config.swap_operands:
        transforms = (plgpu.SwizzleTransform(SWIZZLE_BYTES),) if WAVE_ROWS * itemsize == SWIZZLE_BYTES else ()
        return plgpu.SMEM((config.warpgroups, columns, WAVE_ROWS), problem.out_dtype, transforms=transforms)
    chunk = output_chunk(columns, problem.out_dtype)
    shape = (config.warpgroups, staged_chunks(problem, config), WAVE_ROWS, chunk)
    return plgpu.SMEM(shape, problem.out_dtype, transforms=(plgpu.SwizzleTransform(chunk * itemsize),))


def load_bias(bias_smem: Any, row: Any, parts: list[jax.Array], transposed: bool) -> list[jax.Array]:
    """Loads the `bias [n]` of a wave, one vector a chunk: along the columns, or along the rows of a transposed tile.

    Args:
        bias_smem: the tile's slice of the bias.
        row: the wave's first row within the tile.
        parts: chunks `[64, chunk]` of the wave.
        transposed: whether n lies along the rows.

    Returns:
        float32 vectors, to be broadcast over the chunks.
    """
    biases, column = [], 0
    for part in parts:
        start, length, axis = (row, WAVE_ROWS, 0) if transposed else (column, part.shape[1], 1)
        window = bias_smem.at[pl.ds(start, length)]
        biases.append(load(window, layout=ACCUMULATOR_LAYOUT.reduce(1 - axis)).astype(jnp.float32))
        column += part.shape[1]
    return biases


def add_bias(parts: list[jax.Array], biases: list[jax.Array], transposed: bool) -> list[jax.Array]:
    """Adds what `load_bias` returned."""
    axes = [0 if transposed else 1]
    return [part + lax.broadcast_in_dim(bias, part.shape, axes) for part, bias in zip(parts, biases, strict=True)]


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


class Staging(NamedTuple):
    """Barriers between a compute warpgroup and the warp that stores for it.

    Attributes:
        full: the warpgroup arrives when it has written to its part of the staging buffer; the warp waits.
        empty: the warp arrives when that has been read; the warpgroup waits.
    """

    full: Any
    empty: Any


def stage_waves(waves: list[list[jax.Array]], out_smem: Any, staging: Staging) -> None:
    """Stages the waves of a warpgroup, each `[64, tile_columns]` of the output, for `for_each_staged`.

    Args:
        waves: float32 chunks `[64, chunk]` of each wave.
        out_smem: this warpgroup's part of the buffer; as many chunks as it holds are staged together.
        staging: this warpgroup's barriers.
    """
    num_chunks, chunk = out_smem.shape[0], out_smem.shape[-1]
    pieces = [part[:, i : i + chunk] for parts in waves for part in parts for i in range(0, part.shape[1], chunk)]
    for first in range(0, len(pieces), num_chunks):
        plgpu.barrier_wait(staging.empty)
        for index, piece in enumerate(pieces[first : first + num_chunks]):
            out_smem[index] = piece.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(staging.full)


class StagedChunk(NamedTuple):
    """What of a tile a chunk of the staging buffer holds: rows of a wave, columns from `start` on.

    Attributes:
        index: number of the chunk in the warpgroup's part of the buffer.
        wave: number of the wave.
        start: first column within the tile.
    """

    index: int
    wave: int
    start: int


def for_each_staged(
    out_smem: Any, num_waves: int, columns: int, staging: Staging, store: Callable[[list[StagedChunk]], None]
) -> None:
    """Calls `store` with what `stage_waves` stages of a tile, as often as it does, for the warp that stores it.

    Args:
        out_smem: the warpgroup's part of the buffer.
        num_waves: waves of the warpgroup.
        columns: of the tile.
        staging: the warpgroup's barriers.
        store: stores chunks; when it returns, their part of the buffer may be written again.
    """
    num_chunks, chunk = out_smem.shape[0], out_smem.shape[-1]
    places = [(wave, start) for wave in range(num_waves) for start in range(0, columns, chunk)]
    for first in range(0, len(places), num_chunks):
        staged = [StagedChunk(index, *place) for index, place in enumerate(places[first : first + num_chunks])]
        plgpu.barrier_wait(staging.full)
        store(staged)
        plgpu.barrier_arrive(staging.empty)


def store_chunks(
    chunks: list[StagedChunk],
    out_smem: Any,
    out_gmem: Any,
    rows: list[jax.Array],
    column: jax.Array,
    rows_left: list[Any],
    adds: bool = False,
) -> None:
    """Stores staged chunks by TMA, which clips what is past the output, and waits until it has read them.

    Args:
        chunks: what is staged.
        out_smem: the warpgroup's part of the buffer.
        out_gmem: the output `[m, n]`.
        rows: first row of the output of each wave.
        column: first column of the output of the tile.
        rows_left: of each wave, how many rows to store, at most (int32 scalar; may be negative); None for all.
        adds: whether to add to what the output holds; each element once, so the result is the same in every run.
    """
    for wave in sorted({chunk.wave for chunk in chunks}):
        of_wave = [chunk for chunk in chunks if chunk.wave == wave]
        store = functools.partial(_store_chunks, out_smem, out_gmem, rows[wave], column, of_wave, adds)
        _store_ladder(store, WAVE_ROWS, rows_left[wave])
    plgpu.commit_smem_to_gmem_group()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _store_chunks(
    out_smem: Any,
    out_gmem: Any,
    row: Any,
    column: Any,
    chunks: list[StagedChunk],
    adds: bool,
    offset: Any,
    length: int,
) -> None:
    """Starts to store `length` rows from `offset` on of staged chunks of one wave."""
    for index, _, start in chunks:
        window = out_gmem.at[pl.ds(row + offset, length), pl.ds(column + start, out_smem.shape[-1])]
        source = out_smem.at[index, pl.ds(offset, length)]
        plgpu.copy_smem_to_gmem(source, window, commit_group=False, reduction_op="add" if adds else None)


def store_wave_transposed(
    sums: list[jax.Array], out_smem: Any, out_gmem: Any, row: jax.Array, column: jax.Array, rows_left: Any = None
) -> None:
    """Stores one wave `[64, tile_columns]` as `[tile_columns, 64]` of the output; arguments as for `store_chunks`."""
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
