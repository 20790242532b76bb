"""The main loop shared by every FP8 kernel on Hopper: one warp loads, two or three warpgroups multiply and promote.

A tile is computed from a *rows* operand (the M side of wgmma) and a *columns* operand (its N side), both K-major.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.gemm_config import ScalesAreRead
from jaxgemm.kernels.empty_barriers import EmptyBarriers
from jaxgemm.kernels.operand import Operand, OperandRefs
from jaxgemm.kernels.promotion import TileScales, chunk_columns, factors, promote
from jaxgemm.kernels.schedule import SHARE_AXIS, Tile
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, TILE_K, WAVE_ROWS


class Multiply(NamedTuple):
    """How waves are multiplied: by the functions of `multiply_` and these names, or what the interpreter can run."""

    wave: Callable[..., tuple[jax.Array, jax.Array | None]]
    two_waves: Callable[..., tuple[jax.Array, Callable[[], jax.Array]]]
    wave_and_scales: Callable[..., tuple[jax.Array, jax.Array]]


class Pace(NamedTuple):
    """How k tiles follow each other, as `jaxgemm.gemm_config` has it under these names.

    Attributes:
        scales_are_read: when, beside a wave's product.
        waits_ahead: whether a warpgroup asks for the next k tile while it promotes this one; else when it needs it.
        frees_early: whether a stage is freed when its last product is complete; else when it has been promoted.
        pairs_k_tiles: whether two k tiles are multiplied before the first of them is promoted.
    """

    scales_are_read: ScalesAreRead
    waits_ahead: bool
    frees_early: bool
    pairs_k_tiles: bool


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    """The stage after this one."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def load_tile(
    operands: tuple[tuple[Operand, OperandRefs], ...],
    tile: Tile,
    stages: int,
    full_barrier: Any,
    empty: EmptyBarriers,
    iteration: jax.Array,
) -> jax.Array:
    """The loading warp's part of a tile: brings every k tile of both operands into the next free stage.

    Waits on `empty` (arrived at by every compute warp), arrives at `full_barrier`. 128x128 scales are left to the
    compute warpgroups: their rows are too short for TMA.

    Args:
        operands: (description, references) of the rows and of the columns operand.
        tile: where the tile starts along each, and its k tiles.
        stages: stages of the pipeline.
        full_barrier: one barrier a stage.
        empty: one barrier a stage.
        iteration: k tiles loaded before, in all tiles.

    Returns:
        `iteration + tile.k.num_tiles`.
    """
    starts = tile.row_start, tile.column_start
    sides = list(zip(operands, starts, tile.scale_starts or starts, strict=True))

    def load_k_tile(is_whole, step, slot):
        k_index = tile.k.first + step

        @pl.when(iteration + step >= stages)
        def wait_until_consumed():
            empty.wait(slot, lax.div(iteration + step, jnp.int32(stages)) - 1)

        barrier = full_barrier.at[slot]
        for (operand, refs), start, scale_start in sides:
            group = (tile.group,) if operand.num_groups else ()
            if operand.scale_per_row:
                slab = *group, k_index, pl.ds(scale_start, operand.slab)
                plgpu.copy_gmem_to_smem(refs.scales_gmem.at[slab], refs.scales_smem.at[slot], barrier)
            load_rows = functools.partial(_load_values, (operand, refs), group, k_index, slot, barrier)
            if is_whole or operand.edge is None:
                load_rows(start, operand.loaded)
            else:
                last_start, last_rows = operand.edge
                is_inside = start < last_start
                pl.when(is_inside)(functools.partial(load_rows, start, operand.loaded))
                at_edge = functools.partial(load_rows, lax.min(start, last_start), last_rows)
                pl.when(jnp.logical_not(is_inside))(at_edge)
        return next_slot(slot, stages)

    def load_k_tiles(is_whole):
        slot = lax.rem(iteration, jnp.int32(stages))
        lax.fori_loop(0, tile.k.num_tiles, functools.partial(load_k_tile, is_whole), slot)

    # NOTE: whole tiles have a loop of their own: to choose between two copies for each k tile costs up to 2 % of all.
    are_inside = [start < operand.edge.start for (operand, _), start, _ in sides if operand.edge is not None]
    if not are_inside:
        load_k_tiles(is_whole=True)
    else:
        is_whole = functools.reduce(jnp.logical_and, are_inside)
        pl.when(is_whole)(functools.partial(load_k_tiles, True))
        pl.when(jnp.logical_not(is_whole))(functools.partial(load_k_tiles, False))
    return iteration + tile.k.num_tiles


def _load_values(
    side: tuple[Operand, OperandRefs],
    group: tuple[jax.Array, ...],
    k_index: jax.Array,
    slot: jax.Array,
    barrier: Any,
    start: jax.Array,
    rows: int,
) -> None:
    """Begins to load so many rows of one k tile of an operand, from `start` on, to the beginning of a stage."""
    operand, refs = side
    box = *group, pl.ds(start, rows), pl.ds(k_index * TILE_K, TILE_K)
    axes = SHARE_AXIS if operand.multicast else None
    place = refs.values_smem.at[slot, pl.ds(0, rows)]
    plgpu.copy_gmem_to_smem(refs.values_gmem.at[box], place, barrier, collective_axes=axes)


def drain(empty: EmptyBarriers, stages: int, iteration: jax.Array) -> None:
    """Waits until every stage loaded so far has been read, so that no arrival is left behind when the block ends."""

    @pl.loop(0, lax.min(iteration, jnp.int32(stages)))
    def wait(age):
        loaded = iteration - 1 - age
        empty.wait(lax.rem(loaded, jnp.int32(stages)), lax.div(loaded, jnp.int32(stages)))


def compute_tile(
    scales: TileScales,
    num_waves: int,
    stages: int,
    full_barrier: Any,
    empty: EmptyBarriers,
    slot: jax.Array,
    multiply: Multiply,
    pace: Pace,
    rows_counted: jax.Array | None = None,
) -> tuple[list[list[jax.Array]], jax.Array]:
    """A compute warpgroup's part of a tile: multiplies each k tile, scales the partial and adds it in float32.

    Hopper's FP8 tensor core keeps fewer than 24 bits of a sum, hence the promotion every 128 of k (DeepSeek-V3
    report, section 3.3.2).

    Args:
        scales: reads the scales of the tile; knows its operands, and this warpgroup, which computes its share of rows.
        num_waves: waves of 64 rows it computes.
        stages: stages of the pipeline.
        full_barrier: waited on.
        empty: arrived at once a stage has been read.
        slot: the next stage.
        multiply: how waves are multiplied.
        pace: how k tiles follow each other.
        rows_counted: rows of the tile that count; None if all do. A warpgroup with none of them only passes over the
            stages, and leaves the tensor core to the others; its sums are zeros.

    Returns:
        The float32 sums, one list of column chunks `[64, chunk]` a wave, and the next stage.
    """
    columns, tile = scales.columns[0], scales.tile
    chunk = chunk_columns(columns)
    first_row = scales.warpgroup * (num_waves * WAVE_ROWS)
    wave_rows = tuple(first_row + wave * WAVE_ROWS for wave in range(num_waves))
    accumulate = _Accumulate(scales, wave_rows, stages, full_barrier, empty, multiply, pace)

    def zero(width):
        return plgpu.layout_cast(jnp.zeros((WAVE_ROWS, width), jnp.float32), ACCUMULATOR_LAYOUT)

    sums = [[zero(chunk)] * (columns.tile // chunk) for _ in range(num_waves)]
    recycled = (zero(columns.tile),) * (2 if pace.scales_are_read == "multiplied" else 1)
    k_tiles = tile.k.num_tiles
    if rows_counted is not None:  # a group may end before this warpgroup's rows
        k_tiles = lax.select(first_row < rows_counted, k_tiles, jnp.int32(0))
    first = 0
    if pace.pairs_k_tiles:
        pairs = lax.div(jnp.int32(k_tiles), 2)
        slot, sums, _ = lax.fori_loop(0, pairs, accumulate.two_k_tiles, (slot, sums, recycled * 2))
        first = 2 * pairs
    carry = slot, sums, recycled
    slot, sums, _ = for_each_k_tile(accumulate.k_tile, first, k_tiles, full_barrier, carry, pace.waits_ahead)
    if rows_counted is not None:
        slot = pass_over(tile.k.num_tiles - k_tiles, stages, full_barrier, empty, slot)
    return sums, slot


@dataclasses.dataclass(frozen=True)
class _Accumulate:
    """What `compute_tile` does with k tiles: bodies of loops that carry the next stage, sums, and products to recycle.

    Attributes: as the arguments of `compute_tile`, and
        wave_rows: first row of each wave in the tile.
    """

    scales: TileScales
    wave_rows: tuple[jax.Array, ...]
    stages: int
    full_barrier: Any
    empty: EmptyBarriers
    multiply: Multiply
    pace: Pace

    def k_tile(self, step: jax.Array, carry: Any) -> Any:
        """Adds one k tile, for whose stage has been waited."""
        slot, sums, recycled = carry
        scales, pace = self.scales, self.pace
        place = scales.of_k_tile(step, slot)
        if pace.scales_are_read == "before":
            row_scales, column_scales = [scales.of_rows(place, row) for row in self.wave_rows], scales.of_columns(place)
        new_sums = []
        for wave, row in enumerate(self.wave_rows):
            recycled, products_of_scales = self._multiply(place, row, recycled)
            if pace.frees_early and wave == len(self.wave_rows) - 1:
                self.empty.arrive(slot)
            if products_of_scales is not None:
                new_sums.append([sums[wave][0] + recycled[0] * products_of_scales])
                continue
            if pace.scales_are_read == "after":
                of_wave = scales.of_rows(place, row), scales.of_columns(place)
            else:
                of_wave = row_scales[wave], column_scales
            new_sums.append(promote(recycled[0], sums[wave], *of_wave))
        if not pace.frees_early:
            self.empty.arrive(slot)
        return next_slot(slot, self.stages), new_sums, recycled

    def two_k_tiles(self, pair: jax.Array, carry: Any) -> Any:
        """Waits for two k tiles and adds both; the second is multiplied while the first is promoted."""
        slot, [sums], recycled = carry
        slots = slot, next_slot(slot, self.stages)
        for of_one in slots:
            plgpu.barrier_wait(self.full_barrier.at[of_one])
        scales, [row] = self.scales, self.wave_rows
        places = [scales.of_k_tile(2 * pair + i, of_one) for i, of_one in enumerate(slots)]
        scales_of_both = [(scales.of_rows(place, row), scales.of_columns(place)) for place in places]
        first, second_product = self.multiply.two_waves(*self._values, slots, row, recycled)
        self.empty.arrive(slots[0])
        sums = promote(first, sums, *scales_of_both[0])
        second = second_product()
        self.empty.arrive(slots[1])
        return next_slot(slots[1], self.stages), [promote(second, sums, *scales_of_both[1])], (first, second)

    @property
    def _values(self) -> tuple[Any, Any]:
        return self.scales.rows[1].values_smem, self.scales.columns[1].values_smem

    def _multiply(self, place: Any, row: jax.Array, recycled: Any) -> tuple[Any, jax.Array | None]:
        """Multiplies one wave of a k tile, whose scales and stage are at `place`, over registers to be recycled.

        Returns:
            The registers to recycle next, the product first; and what to multiply it by, if that was made beside it.
        """
        scales, operands = self.scales, (*self._values, place.slot, row)
        if self.pace.scales_are_read == "multiplied":
            parts = scales.columns[1].scales_smem
            recycled = self.multiply.wave_and_scales(*operands, parts, scales.of_rows(place, row), recycled)
            return recycled, recycled[1]

        def products_of_scales():
            return factors(scales.of_rows(place, row), *scales.of_columns(place))

        meanwhile = products_of_scales if self.pace.scales_are_read == "during" else None
        product, beside = self.multiply.wave(*operands, *recycled, meanwhile=meanwhile)
        return (product,), beside


def for_each_k_tile(
    accumulate: Callable[[Any, Any], Any], first: Any, k_tiles: Any, full_barrier: Any, carry: Any, waits_ahead: bool
) -> Any:
    """Runs `carry = accumulate(step, carry)` for k tiles from `first` on; each stage, `carry[0]`, is awaited before.

    NOTE: a wait stands either before a k tile or, so that the assembler can begin it during the promotion, after the
    one before. Then the last k tile is apart: after it there may be none, and a wait for the next tile's first would
    hold up the end of this one.
    """

    def wait(carry):
        plgpu.barrier_wait(full_barrier.at[carry[0]])

    def wait_and_accumulate(step, carry):
        wait(carry)
        return accumulate(step, carry)

    def accumulate_and_wait(step, carry):
        carry = accumulate(step, carry)
        wait(carry)
        return carry

    if not waits_ahead:
        return lax.fori_loop(first, k_tiles, wait_and_accumulate, carry)
    pl.when(k_tiles > first)(lambda: wait(carry))
    last = lax.max(jnp.int32(k_tiles) - 1, first)
    return lax.fori_loop(last, k_tiles, accumulate, lax.fori_loop(first, last, accumulate_and_wait, carry))


def pass_over(k_tiles: jax.Array, stages: int, full_barrier: Any, empty: EmptyBarriers, slot: jax.Array) -> jax.Array:
    """Releases the stages of so many k tiles without reading them, as they come, and returns the next stage."""

    def release(step, slot):
        del step
        plgpu.barrier_wait(full_barrier.at[slot])
        empty.arrive(slot)
        return next_slot(slot, stages)

    return lax.fori_loop(0, k_tiles, release, slot)
