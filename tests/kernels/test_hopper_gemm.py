"""The Hopper kernel: run by Pallas' GPU interpreter on small shapes, and lowered for CUDA on real ones."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_support import (
    ACTIVATIONS,
    BF16,
    BOUNDS,
    E4M3,
    E5M2,
    F16,
    F32,
    ROW,
    SQUARE,
    assert_close,
    interpreted,
    lowered,
    operand,
    stored_shapes,
)

from jaxgemm.gemm_config import SHARED_MEMORY_BYTES, GemmConfig, shared_memory_bytes, split_columns, why_invalid
from jaxgemm.kernels import split_k
from jaxgemm.kernels.hopper_gemm import hopper_gemm
from jaxgemm.kernels.plan import edge_of, make_plan, scratch_types
from jaxgemm.layout import align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tuning import choose_config


def problem(m, n, k, *, lhs=ROW, rhs=SQUARE, lhs_dtype=E4M3, rhs_dtype=E4M3, out=BF16, bias=False, activation=None):
    return GemmProblem("dense", m, n, k, lhs_dtype, rhs_dtype, lhs, rhs, out, has_bias=bias, activation=activation)


def run(problem, config, *, seed=0, num_sms=2, poison=False, lhs_override=None):
    """The kernel's result, and the float64 oracle."""
    rng = np.random.default_rng(seed)
    lhs = operand(rng, problem.m, problem.k, problem.lhs_block_shape, problem.lhs_dtype, poison)
    rhs = operand(rng, problem.n, problem.k, problem.rhs_block_shape, problem.rhs_dtype, poison)
    bias = rng.standard_normal(problem.n).astype(np.float32) * 20 if problem.has_bias else None
    if lhs_override is not None:
        lhs = lhs_override(lhs)
    kernel = functools.partial(
        hopper_gemm, problem=problem, config=config, num_sms=num_sms, interpret=plgpu.InterpretGPUParams()
    )
    args = [jnp.asarray(a) for a in (*lhs[:2], *rhs[:2])]
    out = jax.jit(kernel)(*args, None if bias is None else jnp.asarray(bias))
    expected = lhs[2] @ rhs[2].T + (0 if bias is None else bias)
    return np.asarray(out), np.asarray(ACTIVATIONS[problem.activation](expected), np.float64)


SMALL = GemmConfig(128, 128, 2)

CASES = {
    "one tile": (problem(7, 7, 7), SMALL),
    "one element": (problem(1, 1, 1), GemmConfig(64, 64, 2, 1)),
    "two waves": (problem(130, 70, 200), GemmConfig(256, 128, 2)),
    "three warpgroups": (problem(70, 200, 300, lhs_dtype=E5M2, out=F32), GemmConfig(192, 128, 2, 3)),
    "two blocks a tile": (problem(130, 200, 200, bias=True, activation="gelu"), GemmConfig(128, 192, 2)),
    "narrow": (problem(130, 72, 200, out=F32), GemmConfig(128, 96, 2)),
    "swapped": (problem(7, 130, 300, bias=True, activation="silu"), GemmConfig(16, 64, 3, 1, swap_operands=True)),
    "swapped float32": (problem(7, 130, 300, out=F32), GemmConfig(16, 128, 3, swap_operands=True)),
    "wgrad": (problem(70, 130, 300, rhs=ROW, out=F32), SMALL),
    "wgrad mixed": (
        problem(70, 130, 300, rhs=ROW, out=F16, rhs_dtype=E5M2, bias=True, activation="relu"),
        GemmConfig(256, 96, 2),
    ),
    "weights on the left": (problem(130, 70, 200, lhs=SQUARE, rhs=ROW), SMALL),
    "square blocks": (problem(130, 130, 300, lhs=SQUARE, out=F32), SMALL),
    "factors": (problem(200, 136, 300, rhs=ROW, out=F32, bias=True), GemmConfig(128, 128, 2)),
    "scales multiplied": (problem(200, 136, 300, rhs=ROW, out=F32), GemmConfig(128, 128, 2, multiply_scales=True)),
    "loads shared, tiles in turn": (problem(140, 700, 200, bias=True), GemmConfig(128, 128, 2, share=2)),
    "loads shared, a block without a partner": (problem(150, 384, 200), GemmConfig(128, 128, 2, share=2)),
    "loads shared, scales multiplied": (
        problem(200, 136, 300, rhs=ROW, out=F32),
        GemmConfig(128, 64, 2, share=2, multiply_scales=True),
    ),
    "scales multiplied, high tiles in turn": (
        problem(300, 230, 200, rhs=ROW, rhs_dtype=E5M2, bias=True, activation="relu"),
        GemmConfig(256, 80, 2, multiply_scales=True),
    ),
    "late scales": (problem(70, 200, 300, rhs=ROW, out=F32), GemmConfig(128, 192, 2)),
    "kept block scales": (problem(8, 300, 5504, out=F32), GemmConfig(64, 192, 2, 1)),
    "kept block scales, one a tile": (problem(8, 300, 5504, out=F32), GemmConfig(64, 128, 2, 1)),
    "more stages than k tiles": (problem(70, 70, 200), GemmConfig(64, 64, 6, 1)),
    "nine chunks of columns": (problem(130, 300, 200), GemmConfig(128, 144, 2)),
    "three warpgroups, three chunks, loads shared": (problem(200, 280, 300), GemmConfig(192, 96, 2, 3, share=2)),
    "high tiles in turn": (problem(520, 200, 300, bias=True), GemmConfig(256, 128, 2)),
    "three warpgroups in turn": (problem(400, 260, 300, out=F32), GemmConfig(192, 128, 2, 3)),
    "one k tile, tiles in turn": (problem(140, 260, 100), GemmConfig(128, 128, 2)),
    "staged in two goes, tiles in turn": (problem(300, 230, 200, rhs=ROW, out=F32), GemmConfig(256, 112, 2)),
    "rows copied": (problem(66, 37, 200, out=F32, bias=True), GemmConfig(128, 64, 2, masked_store=True)),
    "rows copied, two waves in two goes": (
        problem(70, 19, 100, rhs=ROW, out=F32),
        GemmConfig(256, 112, 2, masked_store=True),
    ),
    "rows copied, nine chunks, loads shared": (
        problem(5, 150, 130),
        GemmConfig(128, 144, 2, share=2, masked_store=True),
    ),
    "tiles in turn": (problem(140, 260, 200, bias=True), GemmConfig(64, 64, 2, 1, band=2, band_along_n=True)),
}


def test_cases_keep_block_scales_as_their_names_say():
    kept = [make_plan(*case, 2).rhs for name, case in CASES.items() if name.startswith("kept")]
    assert all(operand.keeps_block_scales for operand in kept)
    assert {operand.blocks_per_tile for operand in kept} == {1, 2}


def test_cases_run_as_their_names_say():
    plans = {name: make_plan(*case, 2) for name, case in CASES.items()}
    in_turn = [plan for name, plan in plans.items() if name.endswith("in turn")]
    assert len(in_turn) == 7 and all(plan.schedule().num_tiles > 2 for plan in in_turn)  # for two blocks
    staged = plans["staged in two goes, tiles in turn"]
    _, chunks, _, columns = scratch_types(staged, None)["out_smem"].shape
    assert chunks * columns < staged.num_waves * staged.columns.tile <= 2 * chunks * columns


@pytest.mark.parametrize("partners", [1, 2])
@pytest.mark.parametrize("tile, alignment", [(64, 8), (104, 8), (128, 16), (192, 8), (192, 16)])
def test_tiles_load_all_rows_that_there_are_and_none_past_the_last_few(tile, alignment, partners):
    for rows in range(1, 900):
        edge, stored = edge_of(rows, tile, alignment, partners), align_up(rows, 8)
        if edge is None:
            assert stored <= tile or (stored % tile == 0 and cdiv(rows, tile) % partners == 0)
            continue
        assert edge.rows % alignment == 0 and edge.rows <= tile
        assert edge.start % tile == 0 and edge.start < stored + tile
        assert stored <= edge.start + edge.rows < stored + alignment + 8
        inside = [start for start in range(0, rows, tile) if start < edge.start]
        assert all(start + tile <= stored for start in inside)
        assert edge.start == len(inside) * tile


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_matches_the_dequantized_product(case):
    described, config = CASES[case]
    assert why_invalid(described, config) is None
    out, expected = run(described, config, poison=True)
    assert out.dtype == described.out_dtype
    assert_close(out, expected, BOUNDS[described.out_dtype])


@pytest.mark.parametrize("split", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", range(8, 129, 8))
def test_blocks_that_share_out_k_store_every_column(columns, split):
    """The interpreter cannot read another block's shared memory: this is what it would have shown."""
    width, starts = split_columns(columns, split), split_k.slice_starts(columns, split)
    stored = np.zeros(columns, bool)
    for rank in range(split):
        if rank * width < columns:
            start = int(split_k.slice_start(columns, split, jnp.int32(rank)))
            assert 0 <= start <= columns - width
            assert start == starts[rank] and start % 8 == 0
            stored[start : start + width] = True
        else:
            assert rank >= len(starts)
    assert stored.all()


@interpreted
def test_small_integers_are_exact():
    described = problem(20, 24, 130, out=F32)

    def integers(lhs):
        values = np.zeros_like(lhs[0])
        values[:20, :130] = np.random.default_rng(1).integers(-8, 9, (20, 130))
        scales = np.exp2(np.random.default_rng(2).integers(-3, 4, lhs[1].shape)).astype(np.float32)
        return values, scales, values[:20].astype(np.float64) * np.repeat(scales.T[:20], 128, axis=1)

    rng = np.random.default_rng(3)
    rhs_values = np.zeros((24, 256), E4M3)
    rhs_values[:, :130] = rng.integers(-8, 9, (24, 130))
    rhs_scales = np.exp2(rng.integers(-3, 4, (1, 2))).astype(np.float32)
    lhs = integers((np.zeros((24, 256), E4M3), np.zeros((2, 20), np.float32)))
    kernel = functools.partial(
        hopper_gemm, problem=described, config=SMALL, num_sms=1, interpret=plgpu.InterpretGPUParams()
    )
    out = jax.jit(kernel)(*map(jnp.asarray, (*lhs[:2], rhs_values, rhs_scales)), None)
    expected = lhs[2] @ (rhs_values.astype(np.float64) * np.repeat(rhs_scales, 128, axis=1)).T
    np.testing.assert_array_equal(np.asarray(out), expected)


@interpreted
@pytest.mark.parametrize("swap", [False, True])
def test_a_row_does_not_depend_on_the_others(swap):
    described = problem(9, 70, 200, out=F32)
    config = GemmConfig(16, 64, 2, 1, swap_operands=True) if swap else GemmConfig(64, 64, 2, 1)

    def change_others(lhs):
        values, scales = lhs[0].copy(), lhs[1].copy()
        values[:4], values[5:9] = 3, np.nan
        scales[:, :4] *= 7
        return values, scales, lhs[2]

    first, _ = run(described, config)
    second, _ = run(described, config, lhs_override=change_others)
    np.testing.assert_array_equal(first[4], second[4])
    assert (first[0] != second[0]).any()


SHAPES = [
    (4096, 4096, 7168), (4096, 2112, 7168), (4096, 24576, 1536), (4096, 576, 7168), (1, 4096, 7168), (16, 7168, 16384),
    (64, 24576, 1536), (128, 4096, 7168), (4097, 4100, 7100), (7, 7, 7), (1, 1, 1), (576, 2112, 130), (300, 4099, 129),
]  # fmt: skip


def lower(described, config):
    kernel = functools.partial(hopper_gemm, problem=described, config=config, num_sms=132)
    return jax.jit(kernel).trace(*stored_shapes(described)).lower(lowering_platforms=("cuda",)).as_text()


@lowered
@pytest.mark.parametrize("dims", SHAPES, ids=str)
def test_lowers_for_cuda(dims):
    described = problem(*dims, bias=dims[0] % 2 == 1, activation="silu")
    assert "mosaic_gpu" in lower(described, choose_config(described, 132))


@lowered
@pytest.mark.parametrize("out", [BF16, F32], ids=str)
def test_wgrad_lowers_for_cuda(out):
    described = problem(7168, 2112, 4096, rhs=ROW, out=out, rhs_dtype=E5M2)
    assert "mosaic_gpu" in lower(described, choose_config(described, 132))


@lowered
def test_split_k_and_sharing_lower_for_cuda():
    for described, config in (
        (problem(16, 4096, 7168, bias=True), GemmConfig(16, 128, 8, swap_operands=True, split_k=4)),
        (problem(16, 4096, 7168, bias=True), GemmConfig(256, 128, 3, share=2)),
        (problem(300, 4100, 7168, rhs=ROW, out=F32), GemmConfig(256, 104, 4, share=2, multiply_scales=True)),
    ):
        assert why_invalid(described, config) is None
        assert "mosaic_gpu" in lower(described, config)


@lowered
@pytest.mark.parametrize(
    "config, warps",
    [
        (GemmConfig(256, 128, 3), 8),
        (GemmConfig(256, 128, 3, share=2), 16),
        (GemmConfig(192, 128, 4, 3), 12),
        (GemmConfig(192, 128, 4, 3, share=2), 24),
        (GemmConfig(64, 32, 8, 1), 4),
        (GemmConfig(64, 32, 8, 1, share=2), 8),
        (GemmConfig(16, 64, 8, 1, swap_operands=True, split_k=2), 4),
    ],
    ids=str,
)
def test_every_warp_that_reads_a_stage_frees_it(config, warps):
    """One that is not counted may still read when the stage is written again; one too many never comes."""
    from jax.experimental.mosaic.gpu import core

    core.KNOWN_KERNELS.clear()
    lower(problem(64, 4096, 7168), config)
    [module] = core.KNOWN_KERNELS.values()
    counts = re.findall(rb"mbarrier\.init\.shared::cta\.b64 \[\$1\], (\d+);", module)
    assert set(counts) - {b"1"} == {b"%d" % warps}  # one arrives where blocks exchange their parts
    for space, is_told in (("cta", config.share == 1), ("cluster", config.share > 1)):
        assert (f"mbarrier.arrive.shared::{space}.b64 _, [$1]".encode() in module) == is_told


@lowered
@pytest.mark.parametrize(
    "config",
    [GemmConfig(256, 128, 3), GemmConfig(256, 128, 3, share=2), GemmConfig(16, 64, 8, 1, swap_operands=True)],
    ids=str,
)
@pytest.mark.parametrize("n, padded_n, out", [(4100, 4104, BF16), (4101, 4104, BF16), (4101, 4104, F32)])
def test_odd_rows_need_no_copy_of_the_output(config, n, padded_n, out):
    described = problem(16, n, 7168, out=out, bias=True)
    padded = lower(described, config)
    direct = lower(described, dataclasses.replace(config, masked_store=True))
    output = f"tensor<16x{padded_n}x{'f32' if out == F32 else 'bf16'}>"
    assert output in padded and output not in direct


@lowered
def test_shared_memory_is_counted_as_mosaic_counts_it():
    described = problem(4096, 4096, 7168)
    config = GemmConfig(256, 128, 4)
    used = shared_memory_bytes(described, config)
    assert used > SHARED_MEMORY_BYTES
    with pytest.raises(ValueError, match=f"smem_bytes={used}"):
        lower(described, config)
