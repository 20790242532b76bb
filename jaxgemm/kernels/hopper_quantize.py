"""Quantising kernels for Hopper in Pallas Mosaic GPU: one pass over the input, into the stored layouts.

One kernel serves activations and gradients (blocks of 1x128, as the array lies, transposed, or both), weights
(blocks of 128x128, both orientations from one set of scales), and activations with an elementwise function in
front. Quantising is bitwise equal to `jaxgemm.reference.quantize`.

A persistent block walks tiles of the input. The TMA brings each tile to shared memory once; there every
*slab* of 64 output rows by 128 output columns has a warpgroup of its own, natural slabs first:

    warpgroup    0           1           2             3
                 rows 0-63   rows 64-127 columns 0-63  columns 64-127   of a 128x128 tile, both orientations
    wait full    ldmatrix    ldmatrix    ldmatrix.T    ldmatrix.T       16-bit inputs, in wgmma's registers
                 amax, scale, 1/scale, FP8, each by itself
                 -> slab in shared memory -> TMA store

Transposing happens on the way to registers, before the cast. A slab's 128 columns are one scaling block, and
four neighbouring lanes hold a row, so a maximum costs two shuffles.

Barriers, one a stage:

- `full`, arrivals: the TMA transfers of a tile.
- `empty`, one arrival a warpgroup, once its slab is in registers. Warpgroup 0 waits on it one tile later and
  refills the stage.
- `amax_ready`, for square blocks: one arrival for each of the two warpgroups of the first orientation, which
  publish their rows' maxima; all wait.
- `applied`, with an elementwise function: one arrival a warpgroup, once its share of the tile is replaced by
  the results; all wait.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm import layout
from jaxgemm.kernels.hopper_quantize_plan import (
    BLOCK,
    SLAB_ROWS,
    SWIZZLE_BYTES,
    Plan,
    QuantizeConfig,
    default_config,
    row_table,
    segment_of_tile,
    why_not,
)
from jaxgemm.kernels.hopper_quantize_slab import apply_function, quantize_slab
from jaxgemm.problem import QuantizeProblem
from jaxgemm.scaled_array import stored_scales_shape, stored_values_shape

__all__ = ["QuantizeConfig", "default_config", "hopper_quantize", "why_not"]


def kernel_name(problem: QuantizeProblem) -> str:
    """What a profile calls the kernel: "fp8_quantize_fprop", "fp8_quantize_silu_backward_dout", ..."""
    return "_".join(
        part for part in ("fp8_quantize", problem.function, problem.label.removeprefix("quantize_")) if part
    )


def hopper_quantize(
    *inputs: jax.Array, problem: QuantizeProblem, config: QuantizeConfig, num_sms: int, interpret: bool = False
) -> list[jax.Array]:
    """Quantises: `values = fp8(x / scale)` with `scale = amax(block) / max(fp8)`, in the stored layouts.

    With a function in front, x are its results. It is taken in float32 and rounded to the inputs' dtype, as if
    stored in between, but nothing of it is written anywhere.

    Args:
        *inputs: bfloat16, float16 or float32 `[..., m, k]`, m and k at least 1, of one dtype: x, or what the
            function takes, in its order. Rows that are no multiple of 16 bytes cost a padded copy first, since the
            TMA cannot read them. Last the sizes, if the problem's rows are not all.
        problem: which outputs, in blocks of `(1, 128)` or `(128, 128)`; with a function `(1, 128)`.
        config: the kernel's layout.
        num_sms: multiprocessors to lay the persistent grid out for.
        interpret: whether to run in Pallas' interpreter on the CPU.

    Returns:
        For each quantised array `[values, scales]` if natural, then those of the transpose if transposed, then the
        float32 column sum `[..., k]` if asked for; stored as `jaxgemm.scaled_array` says.
    """
    arrays, sizes = problem.split_inputs(inputs)
    in_dtype, shapes = np.dtype(arrays[0].dtype), [x.shape for x in arrays]
    reason = why_not(problem, in_dtype, shapes)
    assert reason is None, reason
    [_, (*lead, m, _)], *_ = problem.results(shapes)
    plan = Plan(problem, config, math.prod(lead), m, problem.columns(shapes), in_dtype, num_sms)
    operands = [_as_tma_reads(x) for x in arrays]
    if sizes is not None:
        operands.append(row_table(problem, config.tile_m, shapes[0][-2], sizes))
    outputs = _output_types(plan)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=tuple(type for result in outputs for type in result.values()),
        scratch_types=_scratch_types(plan),
        grid=(plan.num_blocks,),
        grid_names=("block",),
        num_threads=plan.num_warpgroups,
        thread_name="warpgroup",
        kernel_name=kernel_name(problem),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,  # no reduction crosses warps
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    flat = iter(kernel(*operands))
    results = [{name: next(flat) for name in result} for result in outputs]
    for result, (_, (_, cols)) in zip(results, plan.results, strict=True):
        if "column_sum" in result:
            # Sum the tiles' partial sums in a fixed order: unlike atomics, this is the same in every run.
            result["column_sum"] = _sum_tiles(problem, result["column_sum"], sizes, shapes[0][-2])[:, :cols]
    if problem.rows == "segments" and problem.column_sum:  # whose leading axis is that of the groups
        total = results[0].pop("column_sum")
        return [*(x.reshape(x.shape[1:]) for x in results[0].values()), total]
    return [x.reshape(*lead, *x.shape[1:]) for result in results for x in result.values()]


def _sum_tiles(problem: QuantizeProblem, partial: jax.Array, sizes: jax.Array | None, rows: int) -> jax.Array:
    """Adds up the column sums of the tiles of each array, or of each group: `[matrices or g, columns]`."""
    if problem.rows != "segments":
        return partial.sum(-2)
    group, _ = segment_of_tile(layout.group_offsets(sizes, rows), partial.shape[1] * BLOCK, BLOCK)
    of_group = group == jnp.arange(problem.num_groups)[:, None]
    return jnp.where(of_group[..., None], partial[0], 0).sum(1)


def _as_tma_reads(x: jax.Array) -> jax.Array:
    """Returns `[groups, m, k]` with rows of a multiple of 16 bytes."""
    aligned_k = layout.align_up(x.shape[-1], layout.TMA_ALIGNMENT_BYTES // x.dtype.itemsize)
    return layout.pad_trailing(x.reshape(-1, *x.shape[-2:]), (aligned_k,))


def _output_types(plan: Plan) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Returns the outputs of the kernel by name, for each array that it quantises."""
    return [_result_types(plan, result, cols) for result, (_, cols) in plan.results]


def _result_types(plan: Plan, result: QuantizeProblem, cols: int) -> dict[str, jax.ShapeDtypeStruct]:
    outputs, orientations = {}, {}
    if result.natural:
        orientations[""] = (plan.m, cols)
    if result.transposed:
        orientations["_t"] = (cols, plan.m)
    for suffix, shape in orientations.items():
        values, scales = stored_values_shape(*shape), stored_scales_shape(*shape, result.block_shape)
        outputs["values" + suffix] = jax.ShapeDtypeStruct((plan.groups, *values), result.dtype)
        outputs["scales" + suffix] = jax.ShapeDtypeStruct((plan.groups, *scales), jnp.float32)
    if result.column_sum:
        assert result.transposed, "the columns are summed where they are scaled"
        partial = (plan.groups, plan.tiles_m, layout.tma_aligned_size(cols, 4))
        outputs["column_sum"] = jax.ShapeDtypeStruct(partial, jnp.float32)
    return outputs


def _scratch_types(plan: Plan) -> dict[str, object]:
    stages, chunks = plan.config.stages, BLOCK // plan.chunk_columns
    slabs = (plan.num_warpgroups, plan.config.out_buffers)
    swizzle = (plgpu.SwizzleTransform(SWIZZLE_BYTES),)
    scratch = {
        "x_smem": plgpu.SMEM(
            (stages, plan.num_inputs, chunks, plan.config.tile_m, plan.chunk_columns),
            plan.in_dtype,
            transforms=swizzle if plan.is_swizzled else (),
        ),
        "values_smem": plgpu.SMEM((*slabs, SLAB_ROWS, BLOCK), plan.problem.dtype, transforms=swizzle),
        "full": plgpu.Barrier(num_arrivals=plan.num_inputs * chunks, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=plan.num_warpgroups, num_barriers=stages),
    }
    if plan.problem.function:
        scratch["applied"] = plgpu.Barrier(num_arrivals=plan.num_warpgroups, num_barriers=stages)
    if plan.is_square:
        scratch["amax_smem"] = plgpu.SMEM((stages, BLOCK), jnp.float32)
        scratch["amax_ready"] = plgpu.Barrier(num_arrivals=BLOCK // SLAB_ROWS, num_barriers=stages)
    else:
        scratch["scales_smem"] = plgpu.SMEM((*slabs, SLAB_ROWS), jnp.float32)
    if plan.problem.column_sum:
        scratch["sums_smem"] = plgpu.SMEM((*slabs, SLAB_ROWS), jnp.float32)
    return scratch


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """The tiles of one persistent block, by the number of its step.

    Attributes:
        plan: the launch.
        inputs: global memory to fetch from.
        table: reference to what `row_table` returns; None if every row counts.
        x_smem: stages of the pipeline.
        full: barriers of the stages.
    """

    plan: Plan
    inputs: Any
    table: Any
    x_smem: Any
    full: Any

    @property
    def num_steps(self) -> jax.Array:
        """How many tiles this block has."""
        return lax.div(self.plan.num_tiles - lax.axis_index("block") + self.plan.num_blocks - 1, self.plan.num_blocks)

    def origin(self, step) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the group, first row and first column of a tile: columns vary fastest."""
        plan, tile = self.plan, lax.axis_index("block") + step * self.plan.num_blocks
        row_tile, column_tile = lax.div(tile, plan.tiles_k), lax.rem(tile, plan.tiles_k)
        group, row = lax.div(row_tile, plan.tiles_m), lax.rem(row_tile, plan.tiles_m) * plan.config.tile_m
        return group, row, column_tile * BLOCK

    def row_source(self, step, row) -> tuple[jax.Array, jax.Array | None]:
        """Returns from which row of the input a tile comes, and how many of its rows count (or None)."""
        if self.table is None:
            return row, None
        plan = self.plan
        row_tile = lax.div(lax.axis_index("block") + step * plan.num_blocks, plan.tiles_k)
        return self.table[row_tile], self.table[plan.groups * plan.tiles_m + row_tile]

    def fetch(self, step) -> None:
        """Begins to load a tile into its stage."""
        plan = self.plan
        group, row, column = self.origin(step)
        row, _ = self.row_source(step, row)
        stage = lax.rem(step, plan.config.stages)
        for index, (array, first_column) in enumerate(plan.sources):
            for chunk in range(BLOCK // plan.chunk_columns):
                columns = pl.ds(first_column + column + chunk * plan.chunk_columns, plan.chunk_columns)
                source = self.inputs[array].at[group, pl.ds(row, plan.config.tile_m), columns]
                plgpu.copy_gmem_to_smem(source, self.x_smem.at[stage, index, chunk], self.full.at[stage])


def _kernel(plan: Plan, *gmem, x_smem, full, empty, applied=None, **slab_smem) -> None:
    """Walks the tiles of one persistent block; every warpgroup runs this, for a slab of its own."""
    inputs, outputs = gmem[: plan.num_arrays], _name_outputs(plan, gmem[plan.num_arrays + plan.has_table :])
    tiles = _Tiles(plan, inputs, gmem[plan.num_arrays] if plan.has_table else None, x_smem, full)
    warpgroup, stages, num_steps = lax.axis_index("warpgroup"), plan.config.stages, tiles.num_steps

    # Fill the pipeline.
    @pl.when(warpgroup == 0)
    def _():
        for step in range(stages):
            pl.when(step < num_steps)(functools.partial(tiles.fetch, jnp.int32(step)))

    def walk_tile(step, _):
        stage = lax.rem(step, stages)
        plgpu.barrier_wait(full.at[stage])
        if plan.problem.function:
            apply_function(plan, x_smem.at[stage], warpgroup)
            plgpu.barrier_arrive(applied.at[stage])
            plgpu.barrier_wait(applied.at[stage])

        for index in range(plan.num_outputs):
            quantize_tile(index, step, stage)

    def quantize_tile(index, step, stage):
        group, row, column = tiles.origin(step)
        _, valid_rows = tiles.row_source(step, row)
        array, first_column = plan.targets[index]
        natural, transposed = outputs[array]
        column += first_column
        quantize = functools.partial(
            quantize_slab,
            plan,
            x_smem=x_smem.at[stage, index],
            stage=stage,
            group=group,
            valid_rows=valid_rows,
            release=functools.partial(release, index, step, stage),
            **slab_smem,
        )
        if natural:
            use = step * plan.num_natural + index
            work = functools.partial(
                quantize, natural, transposed=False, slab=warpgroup, row=row, column=column, use=use
            )
            pl.when(warpgroup < plan.natural_slabs)(work)
        if transposed:
            slab, use = warpgroup - plan.natural_slabs, step * plan.num_outputs + index
            work = functools.partial(quantize, transposed, transposed=True, slab=slab, row=column, column=row, use=use)
            pl.when(warpgroup >= plan.natural_slabs)(work)

    def release(index, step, stage, transposed):
        """Gives the tile back, once this warpgroup has its last slab of it in registers."""
        if index < (plan.num_outputs if transposed else plan.num_natural) - 1:
            return
        plgpu.barrier_arrive(empty.at[stage])

        # Refill the stage of the tile before, which the other warpgroups have most likely left by now.
        if transposed != plan.problem.natural:
            is_due = (warpgroup == 0) & (step >= 1) & (step - 1 + stages < num_steps)

            @pl.when(is_due)
            def _():
                plgpu.barrier_wait(empty.at[lax.rem(step - 1, stages)])
                tiles.fetch(step - 1 + stages)

    lax.fori_loop(0, num_steps, walk_tile, None)

    # Drain: observe every arrival once, and leave no store behind.
    @pl.when(warpgroup == 0)
    def _():
        for last in range(1, stages + 1):
            step = num_steps - last
            pl.when(step >= 0)(functools.partial(plgpu.barrier_wait, empty.at[lax.rem(step, stages)]))

    plgpu.wait_smem_to_gmem(0)


def _name_outputs(plan: Plan, refs) -> list[tuple[dict, dict]]:
    """Sorts the outputs: for each quantised array, those of its natural slabs and of its transposed ones."""
    flat, named = iter(refs), []
    for names in _output_types(plan):
        result = {name: next(flat) for name in names}
        natural = {name: result[name] for name in ("values", "scales") if name in result}
        transposed = {name.removesuffix("_t"): result[name] for name in result if name not in natural}
        named.append((natural, transposed))
    return named
