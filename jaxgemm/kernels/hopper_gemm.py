"""FP8 matrix product for Hopper (sm_90a): `out = act(sum_k lhs_scale * rhs_scale * (lhs @ rhs.T) + bias)`.

Warpgroups of a block, over time (two compute warpgroups):

    load      | k0 | k1 | k2 | k3 | ...            | next tile's k0 | ...
    compute 0 |    | mma k0 | promote | mma k1 ...  | bias, act, store | mma k0 ...
    compute 1 |    |  ...   | mma k0  | promote ... | bias, act, store | ...

Shared memory: `stages` x (rows tile, columns tile, scales of both), the bias of a tile, one output wave a warpgroup.

Barriers: `full[stage]`: TMA copies arrive, compute warpgroups wait. `empty[stage]`: compute warpgroups arrive, the
loading warp waits. `bias_full`, `bias_empty`: the same for the bias of a tile.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.kernels import epilogue, split_k
from jaxgemm.kernels.mainloop import (
    KRange,
    Operand,
    OperandRefs,
    compute_tile,
    drain,
    flat_block_scales,
    keep_block_scales,
    load_block_scales,
    load_tile,
    loads_scales_late,
    operand_buffers,
)
from jaxgemm.kernels.schedule import LOCAL_AXIS, SHARE_AXIS, SM_AXIS, SPLIT_AXIS, DenseSchedule, first_tile, for_each_tile
from jaxgemm.kernels.wave import (
    TILE_K,
    WAVE_ROWS,
    close_turns,
    multiply_wave,
    multiply_wave_portable,
    open_turns,
)
from jaxgemm.layout import align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tuning import GemmConfig

REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160)}
"""Registers a thread of the loading and of the compute warpgroups, by the number of these: 65536 in all.

NOTE: a sum beyond 512 hangs the block, since `setmaxnreg` waits for registers that never come free.
"""


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
    def k_tiles(self) -> int:
        return cdiv(self.problem.k, TILE_K)

    @property
    def padded_n(self) -> int:
        """Columns of the output with each row a multiple of 16 bytes, as TMA demands."""
        return align_up(self.problem.n, 16 // self.problem.out_dtype.itemsize)

    @property
    def bias_slab(self) -> int:
        """Biases loaded for a tile: a multiple of 128 bytes, whatever their dtype."""
        return align_up(self.config.tile_n, 64)

    @property
    def schedule(self) -> DenseSchedule:
        problem, config = self.problem, self.config
        extents = (problem.n, problem.m) if config.swap_operands else (problem.m, problem.n)
        along_columns = config.band_along_n != config.swap_operands
        return DenseSchedule(*extents, self.rows.tile, self.columns.tile, config.share, config.band, along_columns)

    @property
    def output_columns(self) -> int:
        """Columns of the tile that a block stores."""
        if self.config.split_k == 1:
            return self.columns.tile
        return split_k.slice_columns(self.columns.tile, self.config.split_k)


def make_plan(problem: GemmProblem, config: GemmConfig, num_sms: int) -> Plan:
    """Describes the kernel for a problem and a configuration that is valid for it."""

    def operand(rows, tile, block_shape, dtype, is_rows):
        k_tiles = cdiv(problem.k, TILE_K)
        return Operand(tile, block_shape[0] == 1, cdiv(rows, 128), k_tiles, dtype, is_rows and config.share > 1)

    lhs = operand(problem.m, config.tile_m, problem.lhs_block_shape, problem.lhs_dtype, not config.swap_operands)
    rhs = operand(problem.n, config.tile_n, problem.rhs_block_shape, problem.rhs_dtype, config.swap_operands)
    return Plan(problem, config, lhs, rhs, num_sms)


class Sides(NamedTuple):
    """Descriptions and references of the rows and of the columns operand."""

    rows: tuple[Operand, OperandRefs]
    columns: tuple[Operand, OperandRefs]


def load_role(plan: Plan, sides: Sides, bias_gmem: Any, smem: dict[str, Any]) -> None:
    """The loading warpgroup: one warp walks the tiles and keeps the stages full."""
    has_bias, stages = plan.problem.has_bias, plan.config.stages

    def load_one_tile(tile, upcoming, iteration):
        del upcoming
        barriers = smem["full_barrier"], smem["empty_barrier"]
        iteration = load_tile(sides, tile, k_range(plan), stages, *barriers, iteration)
        if has_bias:
            load_bias(tile, iteration)
        return iteration

    def load_bias(tile, iteration):
        @pl.when(iteration > k_range(plan).count)
        def wait_until_used():
            plgpu.barrier_wait(smem["bias_empty"])

        start = tile.row_start if plan.config.swap_operands else tile.column_start
        slab = bias_gmem.at[pl.ds(start, plan.bias_slab)]
        plgpu.copy_gmem_to_smem(slab, smem["bias_smem"], smem["bias_full"])

    @plgpu.warp_map
    def per_warp(warp):
        @pl.when(warp == 0)
        def load_tiles():
            iterations = for_each_tile(plan.schedule, load_one_tile, jnp.int32(0))
            drain(smem["empty_barrier"], stages, iterations)
            if has_bias:
                plgpu.barrier_wait(smem["bias_empty"])


def compute_role(plan: Plan, sides: Sides, out_gmem: Any, smem: dict[str, Any], multiply: Any) -> None:
    """A compute warpgroup: sums its rows of each tile, then stores them."""
    problem, config = plan.problem, plan.config
    warpgroup = lax.axis_index("warpgroup")
    first_row = warpgroup * (plan.num_waves * WAVE_ROWS)

    def compute_one_tile(tile, upcoming, carry):
        slot, block_scales = carry
        for side, scales in zip(sides, block_scales, strict=True):
            keep_block_scales(side, scales, warpgroup)
        plgpu.commit_smem()
        shifts = [scales and scales.shifts for scales in block_scales]
        upcoming_scales = load_scales(upcoming)
        barriers = smem["full_barrier"], smem["empty_barrier"]
        sums, slot = compute_tile(
            *sides, tile, shifts, warpgroup, plan.num_waves, k_range(plan), config.stages, *barriers, slot, multiply
        )
        if problem.has_bias:
            plgpu.barrier_wait(smem["bias_full"])
        if config.split_k == 1:
            for wave, parts in enumerate(sums):
                finish_wave(parts, tile, first_row + wave * WAVE_ROWS, tile.column_start)
        else:
            finish_split_wave(sums[0][0], tile)
        if problem.has_bias:
            plgpu.barrier_arrive(smem["bias_empty"])
        return slot, upcoming_scales

    def load_scales(tile):
        return [load_block_scales(side, start) for side, start in zip(sides, tile, strict=True)]

    def finish_wave(parts, tile, row, column):
        if problem.has_bias:
            parts = epilogue.add_bias(parts, smem["bias_smem"], row, config.swap_operands)
        parts = [epilogue.activate(part, problem.activation) for part in parts]
        store = epilogue.store_wave_transposed if config.swap_operands else epilogue.store_wave
        store(parts, smem["out_smem"].at[warpgroup], out_gmem, tile.row_start + row, column)

    def finish_split_wave(sums, tile):
        rank, width = lax.axis_index(SPLIT_AXIS), plan.output_columns
        total = split_k.sum_slice(
            sums, smem["partial_smem"].at[warpgroup], smem["ready_barrier"], config.split_k, rank
        )

        @pl.when(rank * width < plan.columns.tile)
        def finish_slice():
            finish_wave([total], tile, first_row, tile.column_start + rank * width)

        # No block may go on while another still reads its partial sums.
        plgpu.barrier_arrive(smem["used_barrier"])
        plgpu.barrier_wait(smem["used_barrier"])

    first = first_tile(plan.schedule)
    for_each_tile(plan.schedule, compute_one_tile, (jnp.int32(0), load_scales(first)))
    plgpu.wait_smem_to_gmem(0)


@contextlib.contextmanager
def turns(warpgroup: jax.Array, num_warpgroups: int, interpret: Any) -> Iterator[None]:
    """Lets the compute warpgroups take turns at the tensor core inside this context; see `multiply_wave`."""
    if not interpret:
        pl.when(warpgroup == num_warpgroups - 1)(lambda: open_turns(num_warpgroups))
    yield
    if not interpret:
        pl.when(warpgroup == 0)(lambda: close_turns(num_warpgroups))


def k_range(plan: Plan) -> KRange:
    """The k tiles of this block: all, or its share of them."""
    if plan.config.split_k == 1:
        return KRange(0, plan.k_tiles)
    rank = lax.axis_index(SPLIT_AXIS)
    bound = lambda rank: lax.div(rank * plan.k_tiles, jnp.int32(plan.config.split_k))
    return KRange(bound(rank), bound(rank + 1) - bound(rank))


def scratch_types(plan: Plan, bias_dtype: Any) -> dict[str, Any]:
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
        empty_barrier=_empty_barrier(plan),
        out_smem=epilogue.output_buffer(
            config.warpgroups, plan.output_columns, problem.out_dtype, config.swap_operands
        ),
    )
    if problem.has_bias:
        types["bias_smem"] = plgpu.SMEM((plan.bias_slab,), bias_dtype)
        types["bias_full"] = plgpu.Barrier()
        types["bias_empty"] = plgpu.Barrier(num_arrivals=config.warpgroups)
    if config.split_k > 1:
        types["partial_smem"] = split_k.partial_buffer(config.warpgroups, plan.columns.tile)
        types["ready_barrier"] = split_k.exchange_barrier(config.warpgroups)
        types["used_barrier"] = split_k.exchange_barrier(config.warpgroups)
    return types


def _empty_barrier(plan: Plan) -> Any:
    """The barriers that free a stage; a cluster barrier takes one arrival a warpgroup, a plain one takes 128."""
    sizes = dict(num_arrivals=plan.config.warpgroups, num_barriers=plan.config.stages)
    if loads_scales_late(plan.rows, plan.columns):
        return plgpu.Barrier(**sizes)
    axis = SHARE_AXIS if plan.config.share > 1 else LOCAL_AXIS
    return plgpu.ClusterBarrier(collective_axes=(axis,), **sizes)


def hopper_gemm(
    lhs_values: jax.Array,
    lhs_scales: jax.Array,
    rhs_values: jax.Array,
    rhs_scales: jax.Array,
    bias: jax.Array | None,
    *,
    problem: GemmProblem,
    config: GemmConfig,
    num_sms: int,
    interpret: Any = False,
) -> jax.Array:
    """The dense product.

    Args:
        lhs_values: FP8 `[align_up(m, 8), align_up(k, 128)]`, zero-padded.
        lhs_scales: float32 `[ceil(k/128), align_up(m, 4)]`.
        rhs_values: FP8 `[align_up(n, 8), align_up(k, 128)]`, zero-padded.
        rhs_scales: float32, 128x128 blocks: `[ceil(n/128), ceil(k/128)]`; 1x128: `[ceil(k/128), align_up(n, 4)]`.
        bias: float `[n]` or None.
        problem: what is computed.
        config: tiles; valid for the problem.
        num_sms: streaming multiprocessors of the device: blocks to launch.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        `[m, n]` of `problem.out_dtype`.
    """
    plan = make_plan(problem, config, num_sms)
    multiply = functools.partial(
        multiply_wave_portable if interpret else multiply_wave, num_warpgroups=config.warpgroups
    )

    def kernel(*refs, **smem):
        lhs_refs = OperandRefs(*refs[:2], smem["lhs_values_smem"], smem["lhs_scales_smem"])
        rhs_refs = OperandRefs(*refs[2:4], smem["rhs_values_smem"], smem["rhs_scales_smem"])
        lhs, rhs = (plan.lhs, lhs_refs), (plan.rhs, rhs_refs)
        sides = Sides(rhs, lhs) if config.swap_operands else Sides(lhs, rhs)
        load_registers, compute_registers = REGISTERS[config.warpgroups]
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == config.warpgroups)
        def load():
            plgpu.set_max_registers(load_registers, action="decrease")
            load_role(plan, sides, refs[4] if problem.has_bias else None, smem)

        @pl.when(warpgroup < config.warpgroups)
        def compute():
            plgpu.set_max_registers(compute_registers, action="increase")
            with turns(warpgroup, config.warpgroups, interpret):
                compute_role(plan, sides, refs[-1], smem, multiply)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((problem.m, plan.padded_n), problem.out_dtype),
        scratch_types=scratch_types(plan, bias.dtype if problem.has_bias else None),
        grid=(min(num_sms // (config.share * config.split_k), plan.schedule.num_tiles),),
        grid_names=(SM_AXIS,),
        cluster=(config.share, config.split_k, 1),
        cluster_names=(SHARE_AXIS, SPLIT_AXIS, LOCAL_AXIS),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="fp8_gemm_sm90",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    lhs_scales, rhs_scales = (
        scales if operand.scale_per_row else flat_block_scales(operand, scales)
        for operand, scales in ((plan.lhs, lhs_scales), (plan.rhs, rhs_scales))
    )
    operands = (lhs_values, lhs_scales, rhs_values, rhs_scales) + ((bias,) if problem.has_bias else ())
    out = call(*operands)
    return out if plan.padded_n == problem.n else out[:, : problem.n]
