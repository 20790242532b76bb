"""Schedules of groups whose sizes only the device knows, and the tables that they are read from.

A tile belongs to one group and starts where the group does, wherever that is; the last one of a group is ragged. How
many tiles there are is found out on the device: a table, made of the sizes by a few small operations of XLA before the
kernel starts, says of each where it lies. Its shape depends on static facts alone, so new sizes compile nothing.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxgemm import layout
from jaxgemm.kernels.schedule import SHARE_AXIS, DenseSchedule, KRange, Tile
from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem

FIELDS = 5
"""Of a tile of rows in its table: group, first row, rows left in the group, k tiles, where its scales start."""

SCALE_ALIGNMENT = layout.TMA_ALIGNMENT_BYTES // 4
"""The TMA can start to read a row of float32 scales at multiples of this."""


@dataclasses.dataclass(frozen=True)
class RowGroupSchedule:
    """Tiles of groups of rows: of contiguous groups ("grouped") or of masked ones.

    Tiles of rows come in the order of the table, in bands of `band`, each walked back and forth along n.

    Attributes:
        table: int32 reference to what `row_table` returns.
        row_tiles: tiles of rows that there are, read from it.
        most_row_tiles: tiles of rows that the table has room for.
        tile_m: rows of lhs in a tile.
        tile_n: rows of rhs in a tile.
        column_tiles: tiles along n.
        band: width of a band, in tiles of rows.
        swap_operands: whether rhs is the M side of wgmma.
        share: blocks of a cluster that take neighbouring tiles along n.
    """

    table: Any
    row_tiles: Any
    most_row_tiles: int
    tile_m: int
    tile_n: int
    column_tiles: int
    band: int
    swap_operands: bool
    share: int = 1

    @property
    def column_clusters(self) -> int:
        """Clusters of tiles along n."""
        return cdiv(self.column_tiles, self.share)

    @property
    def most_tiles(self) -> int:
        """As many as there is room for; those of one cluster count once."""
        return self.most_row_tiles * self.column_clusters

    @property
    def num_tiles(self) -> jax.Array:
        """Tiles in all, read from the device; those of one cluster count once."""
        return self.row_tiles * self.column_clusters

    def tile(self, index: jax.Array) -> Tile:
        """The tile of this number; the last one for a number past it."""
        row_tiles = lax.max(self.row_tiles, jnp.int32(1))
        index = lax.min(index, row_tiles * self.column_clusters - 1)
        row, column = self._place(index, row_tiles)
        if self.share > 1:
            column = column * self.share + lax.axis_index(SHARE_AXIS)
        group, start, left, k_tiles, scales = (self.table[1 + i * self.most_row_tiles + row] for i in range(FIELDS))
        starts, scale_starts = (start, column * self.tile_n), (scales, column * self.tile_n)
        if self.swap_operands:
            starts, scale_starts = starts[::-1], scale_starts[::-1]
        return Tile(*starts, KRange(0, k_tiles), group, left, scale_starts)

    def _place(self, index: jax.Array, row_tiles: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tile of rows, and the cluster of tiles of columns, of a number."""
        band = lax.div(index, jnp.int32(self.band * self.column_clusters))
        within = index - band * (self.band * self.column_clusters)
        height = lax.min(jnp.int32(self.band), row_tiles - band * self.band)
        column = lax.div(within, height)
        row = band * self.band + within - column * height
        return row, lax.select(lax.rem(band, jnp.int32(2)) == 1, self.column_clusters - 1 - column, column)


@dataclasses.dataclass(frozen=True)
class KGroupSchedule:
    """The tiles of one output after the other, each a product over its group's part of the contracted axis.

    For "k_grouped", the part is a segment of operands that all groups share; for "k_masked", the valid beginning of
    operands of the group's own.

    Attributes:
        table: int32 reference to what `k_table` returns.
        num_groups: outputs.
        dense: the tiles of one output.
    """

    table: Any
    num_groups: int
    dense: DenseSchedule

    @property
    def num_tiles(self) -> int:
        """Tiles in all."""
        return self.num_groups * self.dense.num_tiles

    @property
    def most_tiles(self) -> int:
        """`num_tiles`."""
        return self.num_tiles

    def tile(self, index: jax.Array) -> Tile:
        """The tile of this number; the last one for a number past it."""
        index = lax.min(index, jnp.int32(self.num_tiles - 1))
        group = lax.div(index, jnp.int32(self.dense.num_tiles))
        tile = self.dense.tile(index - group * self.dense.num_tiles)
        return tile._replace(k=KRange(self.table[group], self.table[self.num_groups + group]), group=group)


class Segments(NamedTuple):
    """Runs of tiles of rows: for each, int32 `[s]`, how many, and of its first tile what the table holds."""

    tiles: jax.Array
    group: jax.Array
    start: jax.Array
    left: jax.Array
    k_tiles: jax.Array
    scales: jax.Array


def most_row_tiles(problem: GemmProblem, tile_m: int) -> int:
    """A static bound on the tiles of rows of a problem with groups of rows."""
    if problem.kind == "masked":
        return problem.num_groups * cdiv(problem.m, tile_m)
    return layout.aligned_capacity(problem.m, problem.num_groups + 1, tile_m) // tile_m


def row_table(problem: GemmProblem, tile_m: int, sizes: jax.Array) -> jax.Array:
    """Lays out the tiles of rows of groups.

    Args:
        problem: "grouped" or "masked".
        tile_m: rows of a tile.
        sizes: int32 `[g]`: `group_sizes` or `masked_m`.

    Returns:
        int32 `[1 + 5 * most_row_tiles]`: how many there are, then of each its group, its first row, the rows left from
        there to the end of the group (0 if past it), its k tiles (0 if it is to be zero), and where its scales start.
    """
    segments = (_masked_segments if problem.kind == "masked" else _contiguous_segments)(problem, tile_m, sizes)
    ends = layout.running_sum(segments.tiles)
    tile = jnp.arange(most_row_tiles(problem, tile_m), dtype=jnp.int32)
    segment = jnp.minimum(jnp.sum(ends <= tile[:, None], 1), segments.tiles.shape[0] - 1)
    before = (tile - (ends - segments.tiles)[segment]) * tile_m
    fields = (
        segments.group[segment],
        segments.start[segment] + before,
        jnp.maximum(segments.left[segment] - before, 0),
        segments.k_tiles[segment],
        segments.scales[segment] + before,
    )
    return jnp.concatenate([ends[-1:], *fields]).astype(jnp.int32)


def _contiguous_segments(problem: GemmProblem, tile_m: int, sizes: jax.Array) -> Segments:
    """One run a group, and one for the rows of no group, which are to be zero."""
    offsets = layout.group_offsets(sizes, problem.m)
    ends = jnp.append(offsets[1:], problem.m)
    group = jnp.arange(problem.num_groups + 1)
    scales = layout.aligned_group_offsets(jnp.diff(offsets), SCALE_ALIGNMENT)
    return Segments(
        tiles=(ends - offsets + (tile_m - 1)) // tile_m,
        group=jnp.minimum(group, problem.num_groups - 1),
        start=offsets,
        left=ends - offsets,
        k_tiles=jnp.where(group < problem.num_groups, cdiv(problem.k, SCALE_BLOCK), 0),
        scales=scales,
    )


def scales_by_group(problem: GemmProblem, scales: jax.Array, sizes: jax.Array) -> jax.Array:
    """Moves the 1x128 scales of contiguous groups to where the TMA can read them.

    The TMA reads a row of numbers from any multiple of 16 bytes on, and groups start anywhere.

    Args:
        problem: "grouped".
        scales: float32 `[k tiles, align_up(m, 4)]`.
        sizes: int32 `[g]`.

    Returns:
        float32 `[k tiles, *]`, in which each group starts at a multiple of four; what belongs to none is undefined.
    """
    offsets = layout.group_offsets(sizes, problem.m)
    capacity = align_up(layout.aligned_capacity(problem.m, problem.num_groups, SCALE_ALIGNMENT), SCALE_ALIGNMENT)
    source, _, _ = layout.aligned_source_rows(offsets, capacity, SCALE_ALIGNMENT)
    return jnp.take(scales, source, axis=1, mode="clip")


def _masked_segments(problem: GemmProblem, tile_m: int, masked_m: jax.Array) -> Segments:
    """One run a group for its valid rows; then, if they are to be zero, one a group for the rows past them.

    Tiles that only write zeros come last: among the others they would leave some blocks with less to do.
    """
    valid = jnp.clip(masked_m, 0, problem.m)
    group = jnp.arange(problem.num_groups)
    tiles = (valid + (tile_m - 1)) // tile_m
    k_tiles = jnp.full_like(tiles, cdiv(problem.k, SCALE_BLOCK))
    none = jnp.zeros_like(tiles)
    segments = Segments(tiles, group, none, valid, k_tiles, scales=none)
    if problem.fill == "unspecified":
        return segments
    past = Segments(cdiv(problem.m, tile_m) - tiles, group, tiles * tile_m, none, none, scales=none)
    return Segments(*(jnp.concatenate(pair) for pair in zip(segments, past, strict=True)))


def k_table(problem: GemmProblem, sizes: jax.Array) -> jax.Array:
    """Lays out the groups of a contracted axis: int32 `[2 * g]`, the first k tile of each, then how many each has.

    Args:
        problem: "k_grouped", its segments aligned to 128; or "k_masked".
        sizes: int32 `[g]`: `group_sizes` or `masked_k`.
    """
    if problem.kind == "k_masked":
        k_tiles = (jnp.clip(sizes, 0, problem.k) + (SCALE_BLOCK - 1)) // SCALE_BLOCK
        return jnp.concatenate([jnp.zeros_like(k_tiles), k_tiles])
    sizes = layout.clip_aligned_sizes(sizes, problem.k, SCALE_BLOCK)
    starts = layout.aligned_group_offsets(sizes, SCALE_BLOCK)
    return jnp.concatenate([starts[:-1], sizes + (SCALE_BLOCK - 1)]) // SCALE_BLOCK
