"""Promotion: a k tile's product is scaled and added to float32 sums.

Either operand may be scaled by 1x128 blocks (one scale a row and k tile) or by 128x128 blocks (one for 128 rows).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl

from jaxgemm.kernels.operand import SCALE_BLOCK_ROWS, Operand, OperandRefs
from jaxgemm.kernels.schedule import Tile
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, load


def chunk_columns(columns: Operand) -> int:
    """Columns that are promoted together: they share a block scale, wherever the tile starts."""
    return columns.tile if columns.scale_per_row else math.gcd(columns.tile, SCALE_BLOCK_ROWS)


@dataclasses.dataclass(frozen=True)
class TileScales:
    """Reads the scales of a tile, for one warpgroup.

    Attributes:
        rows: description and references of the rows operand.
        columns: of the columns operand.
        tile: where the tile starts, and its k tiles.
        shifts: where k tile 0 lies in the kept 128x128 scales of rows and columns; None for 1x128 scales.
        warpgroup: number of this warpgroup.
    """

    rows: tuple[Operand, OperandRefs]
    columns: tuple[Operand, OperandRefs]
    tile: Tile
    shifts: list[Any]
    warpgroup: jax.Array

    def of_k_tile(self, step: jax.Array, slot: jax.Array) -> "ScalePlace":
        """Where the scales of a k tile lie."""
        return ScalePlace(slot, self.warpgroup, self.tile.k.first + step, self.tile.group)

    def of_rows(self, place: "ScalePlace", row: jax.Array) -> jax.Array:
        """Those of a wave that starts at this row of the tile: a vector, or one number."""
        if self.rows[0].scale_per_row:
            return _row_scales(self.rows, place, row, WAVE_ROWS, axis=0)
        start = self.tile.row_start
        return _of_block(_block_scales(self.rows, place, self.shifts[0], start), self.rows[0].tile, start, row)

    def of_columns(self, place: "ScalePlace") -> list[jax.Array]:
        """Those of the tile's columns, chunk by chunk: vectors, or numbers."""
        operand, start = self.columns[0], self.tile.column_start
        if operand.scale_per_row:
            return [_row_scales(self.columns, place, 0, operand.tile, axis=1)]
        scales = _block_scales(self.columns, place, self.shifts[1], start)
        columns = range(0, operand.tile, chunk_columns(operand))
        return [_of_block(scales, operand.tile, start, column) for column in columns]


class ScalePlace(NamedTuple):
    """Where the scales of a k tile lie: its stage (1x128), or its warpgroup's copy, number and group (128x128)."""

    slot: jax.Array
    warpgroup: jax.Array
    k_index: jax.Array
    group: jax.Array | None


def _row_scales(side: tuple[Operand, OperandRefs], place: ScalePlace, offset: Any, length: int, axis: int) -> jax.Array:
    """The 1x128 scales of `length` rows of an operand from `offset` of its tile on."""
    layout = ACCUMULATOR_LAYOUT.reduce(1 - axis)
    return load(side[1].scales_smem.at[place.slot, pl.ds(offset, length)], layout=layout)


def _block_scales(side: tuple[Operand, OperandRefs], place: ScalePlace, shifts: Any, start: Any) -> list[jax.Array]:
    """The 128x128 scales of an operand whose tile starts there: of each block that the tile touches."""
    operand, refs = side
    blocks = range(operand.blocks_per_tile)
    if operand.keeps_block_scales:
        return [refs.scales_smem[place.warpgroup, i, shifts[i] + place.k_index] for i in blocks]
    first = lax.div(start, SCALE_BLOCK_ROWS)
    rows = [operand.scale_block(place.group, first + i) for i in blocks]
    return [refs.scales_gmem[row * operand.k_tiles + place.k_index] for row in rows]


def _of_block(scales: list[jax.Array], tile: int, start: Any, offset: Any) -> jax.Array:
    """Which of these scales is that of the row at this offset of a tile.

    NOTE: one is chosen of those at hand, and not the right one loaded: a tile of 144 columns has nine chunks of columns
    but touches two blocks, and what distinguishes the chunks is the same for every k tile.
    """
    if tile % SCALE_BLOCK_ROWS == 0 and isinstance(offset, int):
        return scales[offset // SCALE_BLOCK_ROWS]
    block = lax.div(start + offset, SCALE_BLOCK_ROWS) - lax.div(start, SCALE_BLOCK_ROWS)
    scale = scales[0]
    for i in range(1, len(scales)):
        scale = lax.select(block == i, scales[i], scale)
    return scale


def promote(
    partial: jax.Array, sums: list[jax.Array], row_scale: jax.Array, column_scales: list[jax.Array]
) -> list[jax.Array]:
    """Adds a wave's scaled product to its sums, chunk of columns by chunk."""
    chunk = sums[0].shape[1]
    parts = [partial[:, i * chunk : (i + 1) * chunk] for i in range(len(sums))] if len(sums) > 1 else [partial]
    return [
        accumulated + _scale(part, row_scale, column_scale)
        for part, accumulated, column_scale in zip(parts, sums, column_scales, strict=True)
    ]


def factors(row_scale: jax.Array, column_scale: jax.Array) -> jax.Array:
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
