"""The main loop shared by every FP8 kernel on Hopper: one warp loads, two or three warpgroups multiply and promote.

A tile is computed from a *rows* operand (the M side of wgmma) and a *columns* operand (its N side), both K-major.
Either may be scaled by 1x128 blocks (one scale a row and k tile) or by 128x128 blocks (one scale for 128 rows).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.gemm_config import ScalesAreRead
from jaxgemm.kernels.schedule import SHARE_AXIS, Tile
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, OPERAND_TRANSFORMS, TILE_K, WAVE_ROWS, load
from jaxgemm.layout import align_up, cdiv

SCALE_BLOCK_ROWS = 128
SLAB_ALIGNMENT = 32


@dataclasses.dataclass(frozen=True)
class Operand:
    """One side of the product.

    Attributes:
        tile: rows of it in a tile.
        scale_per_row: True if scaled by 1x128 blocks, False if by 128x128.
        num_scale_blocks: rows of the stored 128x128 scales of a group; unused if scale_per_row.
        k_tiles: k tiles, and columns of the stored 128x128 scales.
        dtype: FP8.
        multicast: whether the blocks of a cluster share its loads.
        num_groups: size of its leading axis; 0 if it has none.
    """

    tile: int
    scale_per_row: bool
    num_scale_blocks: int
    k_tiles: int
    dtype: Any
    multicast: bool = False
    num_groups: int = 0

    @property
    def slab(self) -> int:
        """1x128 scales held in shared memory for one k tile; a TMA copy brings multiples of 128 bytes."""
        return align_up(self.tile, SLAB_ALIGNMENT)

    @property
    def blocks_per_tile(self) -> int:
        """128x128 blocks that a tile can touch along its rows."""
        furthest_start = SCALE_BLOCK_ROWS - math.gcd(self.tile, SCALE_BLOCK_ROWS)
        return cdiv(furthest_start + self.tile, SCALE_BLOCK_ROWS)

    @property
    def scale_row(self) -> int:
        """128x128 scales that a warpgroup loads at once: those of every k tile, and a few more."""
        return align_up(self.k_tiles, 128)

    @property
    def keeps_block_scales(self) -> bool:
        """Whether 128x128 scales are loaded a row at a time: if there are that many; else one by one, as needed."""
        stored = max(1, self.num_groups) * self.num_scale_blocks * self.k_tiles
        return not self.scale_per_row and stored >= self.scale_row

    def scale_block(self, group: Any, block: Any) -> jax.Array:
        """The row of the stored 128x128 scales for this block of a group's rows; the last one, past its end."""
        within = lax.min(block, jnp.int32(self.num_scale_blocks - 1))
        return group * self.num_scale_blocks + within if self.num_groups else within

    @property
    def num_copies(self) -> int:
        """TMA copies that bring one k tile of it."""
        return 1 + self.scale_per_row


class OperandRefs(NamedTuple):
    """References to one operand: stored values and scales in GMEM, and their stages in SMEM."""

    values_gmem: Any
    scales_gmem: Any
    values_smem: Any
    scales_smem: Any


def operand_buffers(operand: Operand, stages: int, num_warpgroups: int) -> tuple[Any, Any]:
    """The shared-memory types of an operand's values and scales.

    1x128 scales come with each k tile; 128x128 scales stay for a tile, each warpgroup with a copy of its own.
    """
    values = plgpu.SMEM((stages, operand.tile, TILE_K), operand.dtype, transforms=OPERAND_TRANSFORMS)
    blocks = (num_warpgroups, operand.blocks_per_tile, operand.scale_row)
    return values, plgpu.SMEM((stages, operand.slab) if operand.scale_per_row else blocks, jnp.float32)


class BlockScales(NamedTuple):
    """128x128 scales of a tile: for each block that it touches, a row of them, and where k tile 0 lies in it."""

    rows: list[jax.Array]
    shifts: list[jax.Array]


def load_block_scales(side: tuple[Operand, OperandRefs], group: Any, start: jax.Array) -> BlockScales | None:
    """Begins to load a tile's 128x128 scales into registers; None if there are none to keep."""
    operand, refs = side
    if not operand.keeps_block_scales:
        return None
    layout = plgpu.Layout.WG_STRIDED((operand.scale_row,), vec_size=1)
    last = refs.scales_gmem.shape[0] - operand.scale_row
    rows, shifts = [], []
    for i in range(operand.blocks_per_tile):
        block = operand.scale_block(group, lax.div(start, SCALE_BLOCK_ROWS) + i)
        first = lax.min(block * operand.k_tiles, last)
        rows.append(load(refs.scales_gmem.at[pl.ds(first, operand.scale_row)], layout=layout))
        shifts.append(block * operand.k_tiles - first)
    return BlockScales(rows, shifts)


def keep_block_scales(side: tuple[Operand, OperandRefs], scales: BlockScales | None, warpgroup: jax.Array) -> None:
    """Writes loaded scales to this warpgroup's copy in shared memory; the caller commits them."""
    if scales is not None:
        for i, row in enumerate(scales.rows):
            side[1].scales_smem[warpgroup, i] = row


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """The stage after this one."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def load_tile(
    operands: tuple[tuple[Operand, OperandRefs], ...],
    tile: Tile,
    stages: int,
    full_barrier: Any,
    empty_barrier: Any,
    iteration: jax.Array,
) -> jax.Array:
    """The loading warp's part of a tile: brings every k tile of both operands into the next free stage.

    Waits on `empty_barrier` (arrived at by every compute warpgroup), arrives at `full_barrier`. 128x128 scales are
    left to the compute warpgroups: their rows are too short for TMA.

    Args:
        operands: (description, references) of the rows and of the columns operand.
        tile: where the tile starts along each, and its k tiles.
        stages: stages of the pipeline.
        full_barrier: one barrier a stage.
        empty_barrier: one barrier a stage.
        iteration: k tiles loaded before, in all tiles.

    Returns:
        `iteration + tile.k.num_tiles`.
    """

    def load_k_tile(step, slot):
        k_index = tile.k.first + step

        @pl.when(iteration + step >= stages)
        def wait_until_consumed():
            plgpu.barrier_wait(empty_barrier.at[slot])

        barrier = full_barrier.at[slot]
        starts = tile.row_start, tile.column_start
        for (operand, refs), start, scale_start in zip(operands, starts, tile.scale_starts or starts, strict=True):
            group = (tile.group,) if operand.num_groups else ()
            if operand.scale_per_row:
                slab = *group, k_index, pl.ds(scale_start, operand.slab)
                plgpu.copy_gmem_to_smem(refs.scales_gmem.at[slab], refs.scales_smem.at[slot], barrier)
            box = *group, pl.ds(start, operand.tile), pl.ds(k_index * TILE_K, TILE_K)
            axes = SHARE_AXIS if operand.multicast else None
            plgpu.copy_gmem_to_smem(refs.values_gmem.at[box], refs.values_smem.at[slot], barrier, collective_axes=axes)
        return next_slot(slot, stages)

    slot = lax.rem(iteration, jnp.int32(stages))
    lax.fori_loop(0, tile.k.num_tiles, load_k_tile, slot)
    return iteration + tile.k.num_tiles


def drain(empty_barrier: Any, stages: int, iteration: jax.Array) -> None:
    """Waits until every stage loaded so far has been read, so that no arrival is left behind when the block ends."""

    @pl.loop(0, lax.min(iteration, jnp.int32(stages)))
    def wait(age):
        plgpu.barrier_wait(empty_barrier.at[lax.rem(iteration - 1 - age, jnp.int32(stages))])


def compute_tile(
    rows: tuple[Operand, OperandRefs],
    columns: tuple[Operand, OperandRefs],
    tile: Tile,
    shifts: list[Any],
    warpgroup: jax.Array,
    num_waves: int,
    stages: int,
    full_barrier: Any,
    empty_barrier: Any,
    slot: jax.Array,
    multiply_wave: Callable[..., tuple[jax.Array, jax.Array | None]],
    scales_are_read: ScalesAreRead,
    rows_counted: jax.Array | None = None,
) -> tuple[list[list[jax.Array]], jax.Array]:
    """A compute warpgroup's part of a tile: multiplies each k tile, scales the partial and adds it in float32.

    Hopper's FP8 tensor core keeps fewer than 24 bits of a sum, hence the promotion every 128 of k (DeepSeek-V3
    report, section 3.3.2).

    Args:
        rows: description and references of the rows operand.
        columns: of the columns operand.
        tile: where the tile starts, and its k tiles.
        shifts: where k tile 0 lies in the kept 128x128 scales of rows and columns; None for 1x128 scales.
        warpgroup: number of this warpgroup; it computes its share of the tile's rows.
        num_waves: waves of 64 rows it computes.
        stages: stages of the pipeline.
        full_barrier: waited on.
        empty_barrier: arrived at once a stage has been read.
        slot: the next stage.
        multiply_wave: see `jaxgemm.kernels.wave`.
        scales_are_read: when, beside a wave's product.
        rows_counted: rows of the tile that count; None if all do. A warpgroup with none of them only passes over the
            stages, and leaves the tensor core to the others; its sums are zeros.

    Returns:
        The float32 sums, one list of column chunks `[64, chunk]` a wave, and the next stage.
    """
    chunk = chunk_columns(columns[0])
    chunks = range(0, columns[0].tile, chunk)
    first_row = warpgroup * (num_waves * WAVE_ROWS)
    wave_rows = [first_row + wave * WAVE_ROWS for wave in range(num_waves)]

    def accumulate_k_tile(step, carry):
        slot, sums, recycled = carry
        place = ScalePlace(slot, warpgroup, tile.k.first + step, tile.group)
        plgpu.barrier_wait(full_barrier.at[slot])

        def load_row_scales(row):
            return _load_scales(rows, place, shifts[0], tile.row_start, row, WAVE_ROWS, axis=0)

        def load_column_scales():
            load_chunk = functools.partial(_load_scales, columns, place, shifts[1], tile.column_start)
            return [load_chunk(column, chunk, axis=1) for column in chunks]

        if scales_are_read == "before":
            row_scales, column_scales = [load_row_scales(row) for row in wave_rows], load_column_scales()
        new_sums = []
        for wave, row in enumerate(wave_rows):
            operands = rows[1].values_smem, columns[1].values_smem, slot, row, recycled
            if scales_are_read == "during":
                recycled, factors = multiply_wave(
                    *operands, meanwhile=lambda row=row: _factors(load_row_scales(row), *load_column_scales())
                )
                new_sums.append([sums[wave][0] + recycled * factors])
                continue
            recycled, _ = multiply_wave(*operands)
            if scales_are_read == "after":
                scales = load_row_scales(row), load_column_scales()
            else:
                scales = row_scales[wave], column_scales
                if wave == num_waves - 1:
                    plgpu.barrier_arrive(empty_barrier.at[slot])
            new_sums.append(_promote(recycled, sums[wave], *scales))
        if scales_are_read != "before":
            plgpu.barrier_arrive(empty_barrier.at[slot])
        return next_slot(slot, stages), new_sums, recycled

    def zero(width):
        return plgpu.layout_cast(jnp.zeros((WAVE_ROWS, width), jnp.float32), ACCUMULATOR_LAYOUT)

    sums = [[zero(chunk) for _ in chunks] for _ in range(num_waves)]
    k_tiles = tile.k.num_tiles
    if rows_counted is not None:  # a group may end before this warpgroup's rows
        k_tiles = lax.select(first_row < rows_counted, k_tiles, jnp.int32(0))
    slot, sums, _ = lax.fori_loop(0, k_tiles, accumulate_k_tile, (slot, sums, zero(columns[0].tile)))
    if rows_counted is not None:
        slot = pass_over(tile.k.num_tiles - k_tiles, stages, full_barrier, empty_barrier, slot)
    return sums, slot


def pass_over(k_tiles: jax.Array, stages: int, full_barrier: Any, empty_barrier: Any, slot: jax.Array) -> jax.Array:
    """Releases the stages of so many k tiles without reading them, as they come, and returns the next stage."""

    def release(step, slot):
        del step
        plgpu.barrier_wait(full_barrier.at[slot])
        plgpu.barrier_arrive(empty_barrier.at[slot])
        return next_slot(slot, stages)

    return lax.fori_loop(0, k_tiles, release, slot)


def chunk_columns(columns: Operand) -> int:
    """Columns that are promoted together: they share a block scale, wherever the tile starts."""
    return columns.tile if columns.scale_per_row else math.gcd(columns.tile, SCALE_BLOCK_ROWS)


class ScalePlace(NamedTuple):
    """Where the scales of a k tile lie: its stage (1x128), or its warpgroup's copy, number and group (128x128)."""

    slot: jax.Array
    warpgroup: jax.Array
    k_index: jax.Array
    group: jax.Array | None


def _load_scales(side: tuple[Operand, OperandRefs], place: ScalePlace, shifts, tile_start, offset, length, axis: int):
    """The scales of `length` rows of an operand from `offset` of its tile on: a vector, or one number."""
    operand, refs = side
    if operand.scale_per_row:
        layout = ACCUMULATOR_LAYOUT.reduce(1 - axis)
        return load(refs.scales_smem.at[place.slot, pl.ds(offset, length)], layout=layout)
    first_block, block = (lax.div(row, SCALE_BLOCK_ROWS) for row in (tile_start, tile_start + offset))
    if not operand.keeps_block_scales:
        return refs.scales_gmem[operand.scale_block(place.group, block) * operand.k_tiles + place.k_index]
    if operand.blocks_per_tile == 1:
        return refs.scales_smem[place.warpgroup, 0, shifts[0] + place.k_index]
    shift = shifts[0]
    for i in range(1, len(shifts)):
        shift = lax.select(block - first_block == i, shifts[i], shift)
    return refs.scales_smem[place.warpgroup, block - first_block, shift + place.k_index]


def _promote(
    partial: jax.Array, sums: list[jax.Array], row_scale: jax.Array, column_scales: list[jax.Array]
) -> list[jax.Array]:
    """Adds a wave's scaled product to its sums, chunk of columns by chunk."""
    chunk = sums[0].shape[1]
    parts = [partial[:, i * chunk : (i + 1) * chunk] for i in range(len(sums))] if len(sums) > 1 else [partial]
    return [
        accumulated + _scale(part, row_scale, column_scale)
        for part, accumulated, column_scale in zip(parts, sums, column_scales, strict=True)
    ]


def _factors(row_scale: jax.Array, column_scale: jax.Array) -> jax.Array:
    """What each element of a wave's product is multiplied by, if both operands have 1x128 scales."""
    shape = row_scale.shape + column_scale.shape
    return lax.broadcast_in_dim(row_scale, shape, [0]) * lax.broadcast_in_dim(column_scale, shape, [1])


def _scale(partial: jax.Array, row_scale: jax.Array, column_scale: jax.Array) -> jax.Array:
    """`partial * row_scale * column_scale`, with as few multiplications of the whole tile as possible."""
    if row_scale.ndim and column_scale.ndim:
        by_column = lax.broadcast_in_dim(column_scale, partial.shape, [1])
        return partial * by_column * lax.broadcast_in_dim(row_scale, partial.shape, [0])
    if not row_scale.ndim and not column_scale.ndim:
        return partial * (row_scale * column_scale)
    axis = 0 if row_scale.ndim else 1
    return partial * lax.broadcast_in_dim(row_scale * column_scale, partial.shape, [axis])
