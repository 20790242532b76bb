"""FP8 matrix product for Hopper (sm_90a): `out = act(sum_k lhs_scale * rhs_scale * (lhs @ rhs.T) + bias)`.

Warpgroups of a block, over time (two compute warpgroups):

    load      | k0 | k1 | k2 | k3 | ...            | next tile's k0 | ...
    compute 0 |    | mma k0 | promote | mma k1 ...  | bias, act, store | mma k0 ...
    compute 1 |    |  ...   | mma k0  | promote ... | bias, act, store | ...

Shared memory: `stages` x (rows tile, columns tile, scales of both), the bias of a tile, one output wave a warpgroup.

Barriers: `full[stage]`: TMA copies arrive, compute warpgroups wait. `empty[stage]`: compute warpgroups arrive, the
loading warp waits. `bias_full`, `bias_empty`: the same for the bias of a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.kernels import epilogue
from jaxgemm.kernels.mainloop import Operand, OperandRefs, compute_tile, drain, load_tile, stage_buffers
from jaxgemm.kernels.schedule import SM_AXIS, DenseSchedule, for_each_tile
from jaxgemm.kernels.wave import TILE_K, WAVE_ROWS, multiply_wave, multiply_wave_portable
from jaxgemm.layout import align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tuning import GemmConfig

LOAD_REGISTERS = 40
COMPUTE_REGISTERS = {1: 240, 2: 232, 3: 160}
"""Registers a thread, by the number of compute warpgroups: 65536 in all (CUDA programming guide, 9.0)."""


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
    k_tiles = cdiv(problem.k, TILE_K)
    lhs = _operand(problem.m, config.tile_m, problem.lhs_block_shape, problem.lhs_dtype)
    rhs = _operand(problem.n, config.tile_n, problem.rhs_block_shape, problem.rhs_dtype)
    swap = config.swap_operands
    rows, columns = (rhs, lhs) if swap else (lhs, rhs)
    extents = (problem.n, problem.m) if swap else (problem.m, problem.n)
    schedule = DenseSchedule(*extents, rows.tile, columns.tile, config.band, config.band_along_n != swap)
    blocks = min(num_sms, schedule.num_tiles)
    num_waves = rows.tile // (WAVE_ROWS * config.warpgroups)
    multiply = multiply_wave_portable if interpret else multiply_wave
    padded_n = align_up(problem.n, 16 // problem.out_dtype.itemsize)
    bias_slab = max(config.tile_n, 64)

    def kernel(*refs, full_barrier, empty_barrier, out_smem, bias_smem=None, bias_full=None, bias_empty=None, **stage):
        lhs_refs = OperandRefs(*refs[:2], stage["lhs_values_smem"], stage["lhs_scales_smem"])
        rhs_refs = OperandRefs(*refs[2:4], stage["rhs_values_smem"], stage["rhs_scales_smem"])
        bias_gmem, out_gmem = (refs[4] if problem.has_bias else None), refs[-1]
        row_side, column_side = ((rows, rhs_refs), (columns, lhs_refs)) if swap else ((rows, lhs_refs), (columns, rhs_refs))
        warpgroup = lax.axis_index("warpgroup")
        pipeline = dict(k_tiles=k_tiles, stages=config.stages, full_barrier=full_barrier, empty_barrier=empty_barrier)

        @pl.when(warpgroup == config.warpgroups)
        def load():
            plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

            def load_one_tile(tile, step, iteration):
                iteration = load_tile((row_side, column_side), tile, iteration=iteration, **pipeline)
                if problem.has_bias:
                    load_bias(tile, step)
                return iteration

            def load_bias(tile, step):
                @pl.when(step > 0)
                def wait_until_used():
                    plgpu.barrier_wait(bias_empty)

                start = tile.row_start if swap else tile.column_start
                plgpu.copy_gmem_to_smem(bias_gmem.at[pl.ds(start, bias_slab)], bias_smem, bias_full)

            @plgpu.warp_map
            def per_warp(warp):
                @pl.when(warp == 0)
                def load_tiles():
                    iterations = for_each_tile(schedule, load_one_tile, jnp.int32(0))
                    drain(empty_barrier, config.stages, iterations)
                    if problem.has_bias:
                        plgpu.barrier_wait(bias_empty)

        @pl.when(warpgroup < config.warpgroups)
        def compute():
            plgpu.set_max_registers(COMPUTE_REGISTERS[config.warpgroups], action="increase")
            first_row = warpgroup * (num_waves * WAVE_ROWS)
            store = epilogue.store_wave_transposed if swap else epilogue.store_wave

            def compute_one_tile(tile, step, slot):
                del step
                sums, slot = compute_tile(
                    row_side, column_side, tile, first_row, num_waves, slot=slot, multiply_wave=multiply, **pipeline
                )
                if problem.has_bias:
                    plgpu.barrier_wait(bias_full)
                for wave, parts in enumerate(sums):
                    row = first_row + wave * WAVE_ROWS
                    if problem.has_bias:
                        parts = epilogue.add_bias(parts, bias_smem, row, swap)
                    parts = [epilogue.activate(part, problem.activation) for part in parts]
                    store(parts, out_smem.at[warpgroup], out_gmem, tile.row_start + row, tile.column_start)
                if problem.has_bias:
                    plgpu.barrier_arrive(bias_empty)
                return slot

            for_each_tile(schedule, compute_one_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    lhs_buffers, rhs_buffers = stage_buffers(lhs, config.stages), stage_buffers(rhs, config.stages)
    scratch = dict(
        lhs_values_smem=lhs_buffers[0], lhs_scales_smem=lhs_buffers[1],
        rhs_values_smem=rhs_buffers[0], rhs_scales_smem=rhs_buffers[1],
        full_barrier=plgpu.Barrier(num_arrivals=lhs.num_copies + rhs.num_copies, num_barriers=config.stages),
        empty_barrier=plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        out_smem=epilogue.output_buffer(config.warpgroups, columns.tile, problem.out_dtype, swap),
    )  # fmt: skip
    if problem.has_bias:
        scratch |= dict(
            bias_smem=plgpu.SMEM((bias_slab,), bias.dtype),
            bias_full=plgpu.Barrier(),
            bias_empty=plgpu.Barrier(num_arrivals=config.warpgroups),
        )
    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((problem.m, padded_n), problem.out_dtype),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=(SM_AXIS,),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name="fp8_gemm_sm90",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )
    operands = (lhs_values, lhs_scales, rhs_values, rhs_scales) + ((bias,) if problem.has_bias else ())
    out = call(*operands)
    return out if padded_n == problem.n else out[:, : problem.n]


def _operand(rows: int, tile: int, block_shape: tuple[int, int], dtype: Any) -> Operand:
    return Operand(tile, block_shape[0] == 1, cdiv(rows, 128), dtype)
