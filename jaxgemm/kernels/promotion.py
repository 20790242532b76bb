"""Promotion: a k tile's product is scaled and added to float32 sums.

Either operand may be scaled by 1x128 blocks (one scale a row and k tile) or by 128x128 blocks (one for 128 rows).
"""

import dataclasses
import functools
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
        """Those of a wave that starts at this row of the tile."""
        return _load_scales(self.rows, place, self.shifts[0], self.tile.row_start, row, WAVE_ROWS, axis=0)

    def of_columns(self, place: "ScalePlace") -> list[jax.Array]:
        """Those of the tile's columns, chunk by chunk."""
        operand = self.columns[0]
        chunk = chunk_columns(operand)
        load_chunk = functools.partial(
            _load_scales, self.columns, place, self.shifts[1], self.tile.column_start, length=chunk, axis=1
        )
        return [load_chunk(offset=column) for column in range(0, operand.tile, chunk)]


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
