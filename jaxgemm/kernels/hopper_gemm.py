"""FP8 matrix products for Hopper (sm_90a): `out = act(sum_k lhs_scale * rhs_scale * (lhs @ rhs.T) + bias)`.

Warps of a block, over time (two compute warpgroups; of the last warpgroup, one warp loads and two store):

    load      | k0 | k1 | k2 | k3 | ...            | next tile's k0 | ...
    compute 0 |    | mma k0 | promote | mma k1 ...  | bias, act, stage | mma k0 ...
    compute 1 |    |  ...   | mma k0  | promote ... | bias, act, stage | ...
    store 0   |                                                        | to the output | ...
    store 1   |                                                        | to the output | ...

Products of all kinds differ in their schedule alone: `schedule.py`, `group_schedule.py`.

Shared memory: `stages` x (rows tile, columns tile, 1x128 scales of both, those of columns in parts if the tensor core
multiplies them), kept 128x128 scales, the bias of a tile, and what each compute warpgroup stages of the output.

Barriers: `full[stage]`: TMA copies arrive, compute warpgroups wait. `empty[stage]`: compute warps arrive, the loading
warp waits (`empty_barriers.py`). `bias_full`, `bias_empty`: the same for the bias of a tile, of warpgroups.
`staged_full[warpgroup]`: a compute warpgroup arrives when it has staged, its storing warp waits.
`staged_empty[warpgroup]`: the reverse, when the staged part may be written again. Tiles that are computed transposed
have no storing warps. `exchange`: what blocks that share out k send each other, and its barriers (`split_k.py`).
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

from jaxgemm.gemm_config import GemmConfig
from jaxgemm.kernels import epilogue, split_k
from jaxgemm.kernels.empty_barriers import EmptyBarriers, empty_barriers
from jaxgemm.kernels.finish import Finish, limits_of, output_of
from jaxgemm.kernels.group_schedule import scales_by_group
from jaxgemm.kernels.mainloop import Multiply, Pace, compute_tile, drain, load_tile
from jaxgemm.kernels.masked_store import store_staged_rows, store_staged_rows_portable
from jaxgemm.kernels.operand import Operand, OperandRefs, keep_block_scales, load_block_scales
from jaxgemm.kernels.plan import Plan, make_plan, scratch_types
from jaxgemm.kernels.promotion import TileScales
from jaxgemm.kernels.scale_products import multiply_wave_and_scales, multiply_wave_and_scales_portable, split_scales
from jaxgemm.kernels.schedule import (
    SHARE_AXIS,
    SM_AXIS,
    SPLIT_AXIS,
    TileSchedule,
    first_tile,
    for_each_tile,
    tiles_of_cluster,
)
from jaxgemm.kernels.wave import (
    WAVE_ROWS,
    close_turns,
    multiply_two_waves,
    multiply_two_waves_portable,
    multiply_wave,
    multiply_wave_portable,
    open_turns,
    sync_warpgroup,
)
from jaxgemm.layout import pad_trailing
from jaxgemm.problem import GemmProblem

REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160)}
"""Registers a thread of the loading and of the compute warpgroups, by the number of these: 65536 in all.

NOTE: a sum beyond 512 hangs the block, since `setmaxnreg` waits for registers that never come free.
"""


class Sides(NamedTuple):
    """Descriptions and references of the rows and of the columns operand."""

    rows: tuple[Operand, OperandRefs]
    columns: tuple[Operand, OperandRefs]


def load_role(
    plan: Plan, schedule: TileSchedule, sides: Sides, bias_gmem: Any, smem: dict[str, Any], empty: EmptyBarriers
) -> None:
    """The loading warp: walks the tiles and keeps the stages full."""
    has_bias, stages = plan.problem.has_bias, plan.config.stages
    empty.make()

    def load_one_tile(tile, upcoming, carry):
        del upcoming
        iteration, tiles_before = carry
        barriers = smem["full_barrier"], empty
        iteration = load_tile(sides, tile, stages, *barriers, iteration)
        if has_bias:
            load_bias(tile, tiles_before)
        return iteration, tiles_before + 1

    def load_bias(tile, tiles_before):
        @pl.when(tiles_before > 0)
        def wait_until_used():
            plgpu.barrier_wait(smem["bias_empty"])

        start = tile.row_start if plan.config.swap_operands else tile.column_start
        if tile.group is not None:
            start = tile.group * plan.bias_pitch + start
        slab = bias_gmem.at[pl.ds(start, plan.bias_slab)]
        plgpu.copy_gmem_to_smem(slab, smem["bias_smem"], smem["bias_full"])

    iterations, tiles = for_each_tile(schedule, load_one_tile, (jnp.int32(0), jnp.int32(0)))
    drain(empty, stages, iterations)
    if has_bias:

        @pl.when(tiles > 0)
        def wait_until_used():
            plgpu.barrier_wait(smem["bias_empty"])


def store_role(
    plan: Plan, schedule: TileSchedule, warpgroup: Any, out_gmem: Any, smem: dict[str, Any], adds: bool, interpret: Any
) -> None:
    """A storing warp: brings to the output what its compute warpgroup has staged of each tile."""
    staging, out_smem = staging_of(plan, warpgroup, smem), smem["out_smem"].at[warpgroup]
    first_row = warpgroup * (plan.num_waves * WAVE_ROWS)
    rows_in_tile = [first_row + wave * WAVE_ROWS for wave in range(plan.num_waves)]

    def store_one_tile(tile, upcoming, carry):
        del upcoming
        rows_left = [tile.rows_left - row if plan.stores_ragged else None for row in rows_in_tile]
        rows, out = [tile.row_start + row for row in rows_in_tile], output_of(plan, out_gmem, tile)

        def store(chunks):
            if plan.stores_masked:
                copy_rows(tile, chunks)
            else:
                epilogue.store_chunks(chunks, out_smem, out, rows, tile.column_start, rows_left, adds)

        epilogue.for_each_staged(out_smem, plan.num_waves, plan.columns.tile, staging, store)
        return carry

    def copy_rows(tile, chunks):
        copy = store_staged_rows_portable if interpret else store_staged_rows
        chunks_before = warpgroup * out_smem.shape[0]
        chunks_of_wave = plan.columns.tile // out_smem.shape[-1]
        first = chunks[0].wave * chunks_of_wave + chunks[0].start // out_smem.shape[-1]

        def copy_one(index, carry):  # a loop, since the warp has few registers for what is known of each chunk
            wave = lax.div(first + index, jnp.int32(chunks_of_wave))
            column = (first + index - wave * chunks_of_wave) * out_smem.shape[-1]
            limits = limits_of(plan, tile, first_row + wave * WAVE_ROWS, column)
            copy(smem["out_smem"], chunks_before + index, out_gmem, limits)
            return carry

        lax.fori_loop(0, len(chunks), copy_one, None)

    plgpu.barrier_arrive(staging.empty)
    for_each_tile(schedule, store_one_tile, None)
    plgpu.wait_smem_to_gmem(0)


def staging_of(plan: Plan, warpgroup: Any, smem: dict[str, Any]) -> epilogue.Staging | None:
    """The barriers between a compute warpgroup and the warp that stores for it; None if it stores by itself."""
    if not plan.stores_by_warp:
        return None
    return epilogue.Staging(smem["staged_full"].at[warpgroup], smem["staged_empty"].at[warpgroup])


def compute_role(
    plan: Plan,
    schedule: TileSchedule,
    sides: Sides,
    out_gmem: Any,
    smem: dict[str, Any],
    empty: EmptyBarriers,
    interpret: Any,
) -> None:
    """A compute warpgroup: sums its rows of each tile, then stages them, or stores them by itself."""
    multiply = Multiply(
        functools.partial(multiply_wave_portable if interpret else multiply_wave, num_warpgroups=plan.num_turns),
        multiply_two_waves_portable if interpret else multiply_two_waves,
        multiply_wave_and_scales_portable if interpret else multiply_wave_and_scales,
    )
    pace = Pace(plan.scales_are_read, plan.waits_ahead, plan.frees_early, plan.pairs_k_tiles)
    sync = plgpu.commit_smem if interpret else sync_warpgroup
    problem, config = plan.problem, plan.config
    warpgroup = lax.axis_index("warpgroup")
    first_row = warpgroup * (plan.num_waves * WAVE_ROWS)
    staging = staging_of(plan, warpgroup, smem)
    finish = Finish(plan, smem.get("bias_smem"), smem["out_smem"].at[warpgroup], out_gmem, staging)

    def compute_one_tile(tile, upcoming, carry):
        slot, block_scales, tiles_before = carry
        for side, scales in zip(sides, block_scales, strict=True):
            keep_block_scales(side, scales, warpgroup)
        if any(scales is not None for scales in block_scales):
            sync()
        shifts = [scales and scales.shifts for scales in block_scales]
        upcoming_scales = load_scales(upcoming)
        barriers = smem["full_barrier"], empty
        rows_counted = None if config.swap_operands or config.warpgroups == 1 else tile.rows_left
        sums, slot = compute_tile(
            TileScales(*sides, tile, shifts, warpgroup), plan.num_waves, config.stages, *barriers, slot, multiply,
            pace, rows_counted,
        )  # fmt: skip
        if problem.has_bias:
            plgpu.barrier_wait(smem["bias_full"])
        if config.split_k == 1:
            finish.waves(sums, tile, first_row)
        else:
            finish_split_wave(sums[0][0], tile, tiles_before)
        if problem.has_bias:
            plgpu.barrier_arrive(smem["bias_empty"])
        return slot, upcoming_scales, tiles_before + 1

    def load_scales(tile):
        starts = tile.row_start, tile.column_start
        return [load_block_scales(side, tile.group, start) for side, start in zip(sides, starts, strict=True)]

    def finish_split_wave(sums, tile, tiles_before):
        rank, columns = lax.axis_index(SPLIT_AXIS), plan.columns.tile
        exchange = smem["exchange"].of_warpgroup(warpgroup)
        total = split_k.sum_slice(sums, exchange, config.split_k, rank, tiles_before)

        @pl.when(tiles_before + 1 < num_tiles)
        def may_send_again():
            sync_warpgroup()  # one thread speaks for all: each must have read its parts
            plgpu.barrier_arrive(exchange.empty)

        @pl.when(rank * plan.output_columns < columns)
        def finish_slice():
            finish.wave([total], tile, first_row, split_k.slice_start(columns, config.split_k, rank))

    first = first_tile(schedule)
    num_tiles = tiles_of_cluster(schedule)
    if config.split_k > 1:
        split_k.open_exchange(smem["exchange"].of_warpgroup(warpgroup))
    for_each_tile(schedule, compute_one_tile, (jnp.int32(0), load_scales(first), jnp.int32(0)))
    if staging is None:
        plgpu.wait_smem_to_gmem(0)
    else:
        plgpu.barrier_wait(staging.empty)


@contextlib.contextmanager
def turns(warpgroup: jax.Array, num_warpgroups: int, interpret: Any) -> Iterator[None]:
    """Lets the compute warpgroups take turns at the tensor core inside this context; see `multiply_wave`."""
    if not interpret:
        pl.when(warpgroup == num_warpgroups - 1)(lambda: open_turns(num_warpgroups))
    yield
    if not interpret:
        pl.when(warpgroup == 0)(lambda: close_turns(num_warpgroups))


def _kernel(plan: Plan, adds: bool, interpret: Any, *refs: Any, **smem: Any) -> None:
    """One block: gives each warpgroup its registers and its role."""
    problem, config = plan.problem, plan.config
    lhs_refs = OperandRefs(refs[0], refs[1], smem["lhs_values_smem"], smem["lhs_scales_smem"])
    rhs_refs = OperandRefs(refs[2], refs[3], smem["rhs_values_smem"], smem["rhs_scales_smem"])
    lhs, rhs = (plan.lhs, lhs_refs), (plan.rhs, rhs_refs)
    sides = Sides(rhs, lhs) if config.swap_operands else Sides(lhs, rhs)
    schedule = plan.schedule(None if problem.kind == "dense" else refs[-2])
    empty = empty_barriers(smem["empty_barrier"], config.warpgroups, config.share, interpret)
    load_registers, compute_registers = REGISTERS[config.warpgroups]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == config.warpgroups)
    def load():
        plgpu.set_max_registers(load_registers, action="decrease")
        bias_gmem = refs[4] if problem.has_bias else None

        @plgpu.warp_map
        def per_warp(warp):
            pl.when(warp == 0)(lambda: load_role(plan, schedule, sides, bias_gmem, smem, empty))
            if plan.stores_by_warp:
                is_storing = (warp > 0) & (warp <= config.warpgroups)
                pl.when(is_storing)(lambda: store_role(plan, schedule, warp - 1, refs[-1], smem, adds, interpret))

    @pl.when(warpgroup < config.warpgroups)
    def compute():
        plgpu.set_max_registers(compute_registers, action="increase")
        with turns(warpgroup, plan.num_turns, interpret):
            compute_role(plan, schedule, sides, refs[-1], smem, empty, interpret)


def kernel_name(problem: GemmProblem) -> str:
    """What a profile calls the kernel: "fp8_gemm_sm90_wgrad", "fp8_gemm_sm90_masked_fprop", ..."""
    kind = "" if problem.kind == "dense" else problem.kind
    return "_".join(part for part in ("fp8_gemm_sm90", kind, problem.label) if part)


def hopper_gemm(
    lhs_values: jax.Array,
    lhs_scales: jax.Array,
    rhs_values: jax.Array,
    rhs_scales: jax.Array,
    bias: jax.Array | None,
    sizes: jax.Array | None = None,
    accumulate: jax.Array | None = None,
    *,
    problem: GemmProblem,
    config: GemmConfig,
    num_sms: int,
    interpret: Any = False,
) -> jax.Array:
    """The product of stored operands, dense or of groups.

    Args:
        lhs_values: FP8 `[align_up(m, 8), align_up(k, 128)]`, zero-padded; masked or k-masked, `g` of them.
        lhs_scales: float32, 1x128 blocks: `[ceil(k/128), align_up(m, 4)]`; 128x128: `[ceil(m/128), ceil(k/128)]`;
            masked or k-masked, `g` of them.
        rhs_values: FP8 `[align_up(n, 8), align_up(k, 128)]`, zero-padded; in groups, but for k-grouped, `g` of them.
        rhs_scales: float32, as for lhs, of n; in groups, but for k-grouped, `g` of them.
        bias: float `[n]` or None; grouped or masked `[g, n]`.
        sizes: int32 `[g]`, `group_sizes`, `masked_m` or `masked_k`; None if dense.
        accumulate: float32 of the output's shape to add to, or None; k-grouped only.
        problem: what is computed.
        config: tiles; valid for the problem.
        num_sms: streaming multiprocessors of the device: blocks to launch.
        interpret: parameters of Pallas' GPU interpreter, to run on a CPU.

    Returns:
        `problem.out_shape` of `problem.out_dtype`.
    """
    if interpret and config.swap_operands:  # which cannot run what stores from registers
        config = dataclasses.replace(config, masked_store=False)
    plan = make_plan(problem, config, num_sms)
    adds = plan.adds and not interpret  # the interpreter cannot add on the way out
    call = plgpu.kernel(
        functools.partial(_kernel, plan, adds, interpret),
        out_type=() if adds else jax.ShapeDtypeStruct(plan.out_shape, problem.out_dtype),
        scratch_types=scratch_types(plan, None if bias is None else bias.dtype, interpret),
        grid=(plan.num_clusters,),
        grid_names=(SM_AXIS,),
        cluster=(config.share, config.split_k),
        cluster_names=(SHARE_AXIS, SPLIT_AXIS),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name=kernel_name(problem),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    lhs_scales, rhs_scales = (
        scales if operand.scale_per_row else scales.reshape(-1)
        for operand, scales in ((plan.lhs, lhs_scales), (plan.rhs, rhs_scales))
    )
    if problem.kind == "grouped" and sizes is not None and plan.lhs.scale_per_row:
        lhs_scales = scales_by_group(problem, lhs_scales, sizes)
    if plan.rhs.splits_scales:
        rhs_scales = split_scales(rhs_scales)
    operands = [lhs_values, lhs_scales, rhs_values, rhs_scales]
    if bias is not None:
        operands.append(bias if problem.kind == "dense" else pad_trailing(bias, (plan.bias_pitch,)).reshape(-1))
    if sizes is not None:
        operands.append(plan.group_table(sizes))
    if adds:
        total = jax.new_ref(accumulate)
        call(*operands, total)
        return total[...]
    out = call(*operands)
    out = out if plan.padded_n == problem.n else out[..., : problem.n]
    return out if accumulate is None else accumulate + out
