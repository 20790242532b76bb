"""Which tile of the output a persistent block computes, and when: the one thing in which the kernel families differ.

A schedule is a small object with `num_tiles` and `tile(index)`. `for_each_tile` walks it: cluster `c` of `C` takes the
tiles `c, c + C, c + 2 C, ...`, and every warpgroup of every block in it walks the same ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.layout import cdiv

SM_AXIS = "sm"
"""Grid axis: clusters launched."""

SHARE_AXIS = "share"
"""Cluster axis: blocks that take neighbouring tiles and share the loads of the rows operand."""

SPLIT_AXIS = "split"
"""Cluster axis: blocks that take the same tile and parts of k."""


class KRange(NamedTuple):
    """The k tiles that are summed for a tile of the output: the first one, and how many; none make it zero."""

    first: Any
    num_tiles: Any


class Tile(NamedTuple):
    """One tile of the output; int32 scalars.

    Attributes:
        row_start: its first row of the operand on the M side of wgmma.
        column_start: its first row of the operand on the N side.
        k: its k tiles.
        group: its group; None if there are none.
        rows_left: rows of lhs from its start to the end of its group, 0 if past it; None if every row counts.
        scale_starts: where its 1x128 scales start on either side; None if where its rows do.
    """

    row_start: jax.Array
    column_start: jax.Array
    k: KRange
    group: jax.Array | None = None
    rows_left: jax.Array | None = None
    scale_starts: tuple[jax.Array, jax.Array] | None = None


class TileSchedule(Protocol):
    """What the kernel needs to know of a schedule."""

    @property
    def most_tiles(self) -> int:
        """A static bound on `num_tiles`."""

    @property
    def num_tiles(self) -> int | jax.Array:
        """Tiles to compute in all; those of one cluster count once."""

    def tile(self, index: jax.Array) -> Tile:
        """The tile of this number (int32 scalar)."""


@dataclasses.dataclass(frozen=True)
class DenseSchedule:
    """Every tile of a `[rows, columns]` output, in an order that keeps the operands of running tiles in the L2 cache.

    The tiles are walked in bands of `band` tiles of rows (or of columns, if `band_along_columns`), back and forth.

    Attributes:
        rows: rows of the output.
        columns: columns of the output.
        tile_rows: rows of a tile.
        tile_columns: columns of a tile.
        k_tiles: k tiles in all.
        split_k: blocks of a cluster that share them out.
        share: blocks of a cluster that take neighbouring tiles along the columns.
        band: width of a band, in tiles.
        band_along_columns: whether a band is so many tiles of columns wide.
    """

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    k_tiles: int
    split_k: int = 1
    share: int = 1
    band: int = 8
    band_along_columns: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the rows, and clusters of tiles along the columns."""
        return cdiv(self.rows, self.tile_rows), cdiv(self.columns, self.tile_columns * self.share)

    @property
    def num_tiles(self) -> int:
        """Tiles in all; those of one cluster count once."""
        return self.grid[0] * self.grid[1]

    @property
    def most_tiles(self) -> int:
        """`num_tiles`."""
        return self.num_tiles

    def tile(self, index: jax.Array) -> Tile:
        """The tile of this number."""
        minor = int(self.band_along_columns)
        row, column = plgpu.planar_snake(index, self.grid, minor, min(self.band, self.grid[minor]))
        if self.share > 1:
            column = column * self.share + lax.axis_index(SHARE_AXIS)
        return Tile(row * self.tile_rows, column * self.tile_columns, self._k_range())

    def _k_range(self) -> KRange:
        """The k tiles of this block: all, or its share of them."""
        if self.split_k == 1:
            return KRange(0, self.k_tiles)
        rank = lax.axis_index(SPLIT_AXIS)
        first, end = (lax.div((rank + i) * self.k_tiles, jnp.int32(self.split_k)) for i in (0, 1))
        return KRange(first, end - first)


def first_tile(schedule: TileSchedule) -> Tile:
    """The first tile of this cluster."""
    return schedule.tile(lax.axis_index(SM_AXIS))


def tiles_of_cluster(schedule: TileSchedule) -> jax.Array:
    """How many tiles this cluster computes."""
    cluster, num_clusters = lax.axis_index(SM_AXIS), lax.axis_size(SM_AXIS)
    return lax.div(jnp.int32(schedule.num_tiles) - cluster + (num_clusters - 1), jnp.int32(num_clusters))


def for_each_tile(schedule: TileSchedule, body: Callable[[Tile, Tile, Any], Any], carry: Any) -> Any:
    """Runs `carry = body(tile, upcoming, carry)` for this cluster's tiles; `upcoming` is the next one (or the last).

    NOTE: a tile is looked up once, while the one before is still to be computed: a look-up in a table takes a while.
    """
    cluster, num_clusters = lax.axis_index(SM_AXIS), lax.axis_size(SM_AXIS)
    steps = tiles_of_cluster(schedule)

    def look_up(step):
        return schedule.tile(cluster + lax.max(lax.min(step, steps - 1), 0) * num_clusters)

    first = look_up(jnp.int32(0))

    def visit(step, state):
        found, carry = state
        upcoming = look_up(step + 1)
        return _traced(upcoming), body(_with_traced(first, found), upcoming, carry)

    return lax.fori_loop(0, steps, visit, (_traced(first), carry))[1]


def _traced(tile: Tile) -> list[jax.Array]:
    """What of a tile is only known on the device."""
    return [part for part in jax.tree.leaves(tile) if isinstance(part, jax.Array)]


def _with_traced(tile: Tile, parts: list[jax.Array]) -> Tile:
    """A tile like this one, but for what is only known on the device."""
    rest = iter(parts)
    return jax.tree.map(lambda part: next(rest) if isinstance(part, jax.Array) else part, tile)
