"""What becomes of a wave's float32 sums: bias, activation, rows that do not count, and the way out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxgemm.kernels import epilogue
from jaxgemm.kernels.masked_store import store_masked
from jaxgemm.kernels.plan import Plan
from jaxgemm.kernels.schedule import Tile


@dataclasses.dataclass(frozen=True)
class Finish:
    """The end of a tile, for one compute warpgroup.

    Attributes:
        plan: the kernel.
        bias_smem: the tile's slice of the bias; None if there is none.
        out_smem: the warpgroup's part of the staging buffer.
        out_gmem: the output.
        adds: whether to add to what the output holds.
    """

    plan: Plan
    bias_smem: Any
    out_smem: Any
    out_gmem: Any
    adds: bool

    def wave(self, parts: list[jax.Array], tile: Tile, row: Any, column: Any) -> None:
        """Stores one wave, `[64, chunk]` each part; `row` and `column` are where it starts in the tile."""
        plan, problem, swap = self.plan, self.plan.problem, self.plan.config.swap_operands
        if problem.has_bias:
            parts = epilogue.add_bias(parts, self.bias_smem, row, swap)
        parts = [epilogue.activate(part, problem.activation) for part in parts]
        if problem.kind == "masked" and problem.fill == "zero":
            parts = epilogue.zero_masked(parts, row, column, tile.rows_left, swap)
        elif plan.stores_ragged and problem.has_bias:
            parts = [part * (tile.k.num_tiles > 0).astype(jnp.float32) for part in parts]  # rows of no group
        if plan.stores_masked:
            return self._store_masked(parts, tile, row, column)
        out = self.out_gmem.at[tile.group] if len(plan.out_shape) == 3 else self.out_gmem
        rows_left = tile.rows_left - (column if swap else row) if plan.stores_ragged else None
        starts = tile.row_start + row, tile.column_start + column
        if swap:
            return epilogue.store_wave_transposed(parts, self.out_smem, out, *starts, rows_left)
        return epilogue.store_wave(parts, self.out_smem, out, *starts, rows_left, self.adds)

    def _store_masked(self, parts: list[jax.Array], tile: Tile, row: Any, column: Any) -> None:
        """Stores one wave element by element."""
        plan, problem, swap = self.plan, self.plan.problem, self.plan.config.swap_operands
        first_group_row = tile.group * problem.m if len(plan.out_shape) == 3 else 0
        start_m, start_n = (tile.column_start, tile.row_start) if swap else (tile.row_start, tile.column_start)
        for part in parts:
            offset_m, offset_n = (column, row) if swap else (row, column)
            rows_left = problem.m - start_m - offset_m
            if plan.stores_ragged:
                rows_left = lax.min(rows_left, tile.rows_left - offset_m)
            place = first_group_row + start_m + offset_m, start_n + offset_n
            columns_left = problem.n - place[1]
            store_masked(part.astype(problem.out_dtype), self.out_gmem, *place, rows_left, columns_left, swap)
            column = column + part.shape[1]
