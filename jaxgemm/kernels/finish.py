"""What becomes of a wave's float32 sums: bias, activation, rows that do not count, and the way out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgemm.kernels import epilogue
from jaxgemm.kernels.masked_store import Limits, store_transposed
from jaxgemm.kernels.plan import Plan
from jaxgemm.kernels.schedule import Tile
from jaxgemm.kernels.wave import WAVE_ROWS


def output_of(plan: Plan, out_gmem: Any, tile: Tile) -> Any:
    """The output `[m, n]`, of the tile's group if there is one for each."""
    return out_gmem.at[tile.group] if len(plan.out_shape) == 3 else out_gmem


def limits_of(plan: Plan, tile: Tile, row: Any, column: Any) -> Limits:
    """Where in the output what starts at `row` and `column` of a tile goes, and how much of it, if TMA cannot clip."""
    problem = plan.problem
    start_m, start_n, offset_m, offset_n = tile.row_start, tile.column_start, row, column
    if plan.config.swap_operands:
        start_m, start_n, offset_m, offset_n = start_n, start_m, offset_n, offset_m
    rows_left = problem.m - start_m - offset_m
    if plan.stores_ragged:
        rows_left = lax.min(rows_left, tile.rows_left - offset_m)
    first_row_of_group = tile.group * problem.m if len(plan.out_shape) == 3 else 0
    column = start_n + offset_n
    return Limits(first_row_of_group + start_m + offset_m, column, rows_left, problem.n - column)


def _zero_without_k_tiles(parts: list[jax.Array], tile: Tile) -> list[jax.Array]:
    """Zeros for a tile of no k tiles; others stay what they are."""
    return [part * (tile.k.num_tiles > 0).astype(jnp.float32) for part in parts]


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a tile, for one compute warpgroup.

    Attributes:
        plan: the kernel.
        bias_smem: the tile's slice of the bias; None if there is none.
        out_smem: the warpgroup's part of the staging buffer.
        out_gmem: the output.
        staging: the warpgroup's barriers, if a warp stores for it; else None.
    """

    plan: Plan
    bias_smem: Any
    out_smem: Any
    out_gmem: Any
    staging: epilogue.Staging | None

    def waves(self, sums: list[list[jax.Array]], tile: Tile, first_row: Any) -> None:
        """Stores all waves of a tile, `[64, chunk]` each part; `first_row` is where they start in the tile."""
        rows = [first_row + wave * WAVE_ROWS for wave in range(len(sums))]
        if self.staging is None:
            for parts, row in zip(sums, rows, strict=True):
                self.wave(parts, tile, row, 0)
            return
        biases = self._load_bias(sums[0], 0)  # along the columns: the same for every wave
        finished = [self._finish(parts, tile, row, 0, biases) for parts, row in zip(sums, rows, strict=True)]
        epilogue.stage_waves(finished, self.out_smem, self.staging)

    def wave(self, parts: list[jax.Array], tile: Tile, row: Any, column: Any) -> None:
        """Stores one wave of a tile that is computed transposed; it starts at `row` and `column`."""
        plan = self.plan
        parts = self._finish(parts, tile, row, column, self._load_bias(parts, row))
        if plan.stores_masked:
            return self._store_masked(parts, tile, row, column)
        starts, rows_left = (tile.row_start + row, tile.column_start + column), None
        if plan.stores_ragged:
            rows_left = tile.rows_left - column
        return epilogue.store_wave_transposed(
            parts, self.out_smem, output_of(self.plan, self.out_gmem, tile), *starts, rows_left
        )

    def _load_bias(self, parts: list[jax.Array], row: Any) -> list[jax.Array] | None:
        if not self.plan.problem.has_bias:
            return None
        return epilogue.load_bias(self.bias_smem, row, parts, self.plan.config.swap_operands)

    def _finish(self, parts: list[jax.Array], tile: Tile, row: Any, column: Any, biases: Any) -> list[jax.Array]:
        """Bias and activation of one wave, and zeros where rows do not count."""
        plan, problem, swap = self.plan, self.plan.problem, self.plan.config.swap_operands
        if biases is not None:
            parts = epilogue.add_bias(parts, biases, swap)
        parts = [epilogue.activate(part, problem.activation) for part in parts]
        if problem.kind == "masked" and problem.fill == "zero":
            return epilogue.zero_masked(parts, row, column, tile.rows_left, swap)
        if plan.stores_ragged and problem.has_bias:
            return _zero_without_k_tiles(parts, tile)  # rows of no group
        if problem.kind == "k_grouped" and plan.config.multiply_scales:
            # NOTE: changes nothing but the registers. What is staged lies in pairs of them from an even number on, as
            # products and their scales do. If the sums of the main loop did, all operands of an FFMA would come from
            # one bank of the register file (`tools/spills.py` counts these). So what is staged is made anew.
            return _zero_without_k_tiles(parts, tile)
        return parts

    def _store_masked(self, parts: list[jax.Array], tile: Tile, row: Any, column: Any) -> None:
        """Stores one wave of a tile that is computed transposed, element by element."""
        for part in parts:
            limits = limits_of(self.plan, tile, row, column)
            store_transposed(part.astype(self.plan.problem.out_dtype), self.out_gmem, limits)
            column = column + part.shape[1]
