"""What a problem and a configuration make of the Hopper kernel: static facts, and buffers in shared memory."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm import gemm_config
from jaxgemm.gemm_config import GemmConfig, ScalesAreRead, takes_turns, when_scales_are_read
from jaxgemm.kernels import epilogue, split_k
from jaxgemm.kernels.empty_barriers import barrier_types
from jaxgemm.kernels.group_schedule import KGroupSchedule, RowGroupSchedule, k_table, most_row_tiles, row_table
from jaxgemm.kernels.operand import Edge, Operand, operand_buffers
from jaxgemm.kernels.schedule import DenseSchedule, TileSchedule
from jaxgemm.kernels.wave import TILE_K, WAVE_ROWS
from jaxgemm.layout import SCALE_BLOCK, TMA_ALIGNMENT_BYTES, VALUE_ROW_ALIGNMENT, align_up, cdiv
from jaxgemm.problem import GemmProblem


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a problem and a configuration make of the kernel: the static facts its roles share.

    Attributes:
        problem: what is computed.
        config: tiles.
        lhs, rhs: the operands; `rows` and `columns` are these, in the order that wgmma takes them.
        num_waves: waves of 64 rows a compute warpgroup sums.
        k_tiles: k tiles in all.
        num_sms: blocks that run at once.
    """

    problem: GemmProblem
    config: GemmConfig
    lhs: Operand
    rhs: Operand
    num_sms: int

    @property
    def rows(self) -> Operand:
        return self.rhs if self.config.swap_operands else self.lhs

    @property
    def columns(self) -> Operand:
        return self.lhs if self.config.swap_operands else self.rhs

    @property
    def num_waves(self) -> int:
        return self.rows.tile // (WAVE_ROWS * self.config.warpgroups)

    @property
    def num_turns(self) -> int:
        """Compute warpgroups that take turns at the tensor core: all of them, or 1 if they do not."""
        return self.config.warpgroups if takes_turns(self.problem, self.config) else 1

    @property
    def scales_are_read(self) -> ScalesAreRead:
        return when_scales_are_read(self.problem, self.config)

    @property
    def waits_ahead(self) -> bool:
        return gemm_config.waits_ahead(self.problem, self.config)

    @property
    def frees_early(self) -> bool:
        return gemm_config.frees_early(self.problem, self.config)

    @property
    def pairs_k_tiles(self) -> bool:
        return gemm_config.pairs_k_tiles(self.problem, self.config)

    @property
    def k_tiles(self) -> int:
        return cdiv(self.problem.k, TILE_K)

    @property
    def stores_masked(self) -> bool:
        """Whether the output is stored without TMA, which cannot address its rows."""
        return gemm_config.stores_masked(self.problem, self.config)

    @property
    def padded_n(self) -> int:
        """Columns of the output as stored: each row a multiple of 16 bytes, as TMA demands, if TMA stores it."""
        aligned = align_up(self.problem.n, TMA_ALIGNMENT_BYTES // self.problem.out_dtype.itemsize)
        return self.problem.n if self.stores_masked else aligned

    @property
    def bias_pitch(self) -> int:
        """Biases from one group's to the next one's: each starts at a multiple of 16 bytes, whatever its dtype."""
        return align_up(self.problem.n, TMA_ALIGNMENT_BYTES // 2)

    @property
    def bias_slab(self) -> int:
        """Biases loaded for a tile: a multiple of 128 bytes, whatever their dtype."""
        return align_up(self.config.tile_n, 64)

    @property
    def stores_ragged(self) -> bool:
        """Whether rows past the end of a tile's group belong to another tile, and so must not be stored."""
        return self.problem.kind == "grouped"

    @property
    def stores_by_warp(self) -> bool:
        """Whether a warp stores what a compute warpgroup has staged, while that goes on with its next tile."""
        return gemm_config.stores_by_warp(self.config)

    @property
    def adds(self) -> bool:
        """Whether the kernel itself adds to the given array: TMA must be able to."""
        return self.problem.accumulate and self.problem.out_dtype == np.float32 and self.problem.n % 4 == 0

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The output as the kernel writes it."""
        return *self.problem.out_shape[:-1], self.padded_n

    def schedule(self, table: Any = None) -> TileSchedule:
        """The order of the tiles; `table` is the reference to `group_table`'s result, None if there is none."""
        problem, config = self.problem, self.config
        if problem.kind in ("grouped", "masked"):
            row_tiles, column_tiles = most_row_tiles(problem, config.tile_m), cdiv(problem.n, config.tile_n)
            tiles = config.tile_m, config.tile_n, column_tiles
            found = None if table is None else table[0]
            return RowGroupSchedule(table, found, row_tiles, *tiles, config.band, config.swap_operands, config.share)
        extents = (problem.n, problem.m) if config.swap_operands else (problem.m, problem.n)
        along_columns = config.band_along_n != config.swap_operands
        dense = DenseSchedule(
            *extents, self.rows.tile, self.columns.tile, self.k_tiles,
            config.split_k, config.share, config.band, along_columns,
        )  # fmt: skip
        return dense if problem.kind == "dense" else KGroupSchedule(table, problem.num_groups, dense)

    @property
    def num_clusters(self) -> int:
        """Clusters to launch: each walks its tiles."""
        tiles = self.schedule().most_tiles
        return gemm_config.clusters_launched(self.problem, self.config, tiles, self.num_sms)

    def group_table(self, sizes: jax.Array) -> jax.Array:
        """What the schedule reads on the device, from `group_sizes`, `masked_m` or `masked_k`."""
        if self.problem.kind in ("k_grouped", "k_masked"):
            return k_table(self.problem, sizes)
        return row_table(self.problem, self.config.tile_m, sizes)

    @property
    def output_columns(self) -> int:
        """Columns of the tile that a block stores."""
        if self.config.split_k == 1:
            return self.columns.tile
        return gemm_config.split_columns(self.columns.tile, self.config.split_k)


def make_plan(problem: GemmProblem, config: GemmConfig, num_sms: int) -> Plan:
    """Describes the kernel for a problem and a configuration that is valid for it."""
    swap, (lhs_groups, rhs_groups) = config.swap_operands, problem.operands_have_groups

    def operand(rows, tile, block_shape, dtype, is_rows, has_groups):
        k_tiles, groups = cdiv(problem.k, TILE_K), problem.num_groups if has_groups else 0
        multicast = is_rows and config.share > 1
        splits = config.multiply_scales and not is_rows
        alignment = VALUE_ROW_ALIGNMENT * (config.share if multicast else 1)
        loaded = min(tile, align_up(rows, alignment))
        starts_anywhere = problem.kind == "grouped" and is_rows != swap
        gains = not config.multiply_scales  # whose products took 0 to 1 % more time with it
        edge = edge_of(rows, tile, alignment, 1 if is_rows else config.share) if gains and not starts_anywhere else None
        scale_blocks = cdiv(rows, SCALE_BLOCK)
        return Operand(tile, loaded, block_shape[0] == 1, scale_blocks, k_tiles, dtype, multicast, groups, splits, edge)

    lhs = operand(problem.m, config.tile_m, problem.lhs_block_shape, problem.lhs_dtype, not swap, lhs_groups)
    rhs = operand(problem.n, config.tile_n, problem.rhs_block_shape, problem.rhs_dtype, swap, rhs_groups)
    return Plan(problem, config, lhs, rhs, num_sms)


def edge_of(rows: int, tile: int, alignment: int, partners: int) -> Edge | None:
    """Which tiles of an operand reach past its end, and what they load; None if none does, or there is only one.

    Args:
        rows: of the operand.
        tile: rows of a tile; tiles start at its multiples.
        alignment: rows that are loaded are a multiple of this.
        partners: neighbouring tiles that are computed together, past the end too.

    Example:
        >>> edge_of(4104, 192, 16, 1)
        Edge(start=4032, rows=80)
    """
    stored = align_up(rows, VALUE_ROW_ALIGNMENT)
    rest = stored % tile
    if stored <= tile or (rest == 0 and cdiv(rows, tile) % partners == 0):
        return None
    return Edge(stored - rest, align_up(max(rest, 1), alignment))


def scratch_types(plan: Plan, bias_dtype: Any, interpret: Any = False) -> dict[str, Any]:
    """Shared memory and barriers, by name."""
    problem, config = plan.problem, plan.config
    lhs_buffers, rhs_buffers = (operand_buffers(o, config.stages, config.warpgroups) for o in (plan.lhs, plan.rhs))
    num_copies = plan.lhs.num_copies + plan.rhs.num_copies
    types = dict(
        lhs_values_smem=lhs_buffers[0],
        lhs_scales_smem=lhs_buffers[1],
        rhs_values_smem=rhs_buffers[0],
        rhs_scales_smem=rhs_buffers[1],
        full_barrier=plgpu.Barrier(num_arrivals=num_copies, num_barriers=config.stages),
        empty_barrier=barrier_types(config.warpgroups, config.stages, interpret),
        out_smem=epilogue.output_buffer(problem, config, plan.output_columns),
    )
    if plan.stores_by_warp:
        types["staged_full"] = plgpu.Barrier(num_barriers=config.warpgroups)
        types["staged_empty"] = plgpu.Barrier(num_barriers=config.warpgroups)
    if problem.has_bias:
        types["bias_smem"] = plgpu.SMEM((plan.bias_slab,), bias_dtype)
        types["bias_full"] = plgpu.Barrier()
        types["bias_empty"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    if config.split_k > 1:
        types["exchange"] = split_k.exchange_types(config.warpgroups, plan.columns.tile, config.split_k)
    return types
