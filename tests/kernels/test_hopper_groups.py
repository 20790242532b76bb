"""The Hopper kernel on groups: run by Pallas' GPU interpreter on small sizes, and lowered for CUDA on real ones."""

import dataclasses
import functools
import itertools

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
    F32,
    ROW,
    SQUARE,
    assert_close,
    interpreted,
    lowered,
    operand,
    stored_shapes,
)

from jaxgemm.gemm_config import GemmConfig, why_invalid
from jaxgemm.kernels.group_schedule import FIELDS, k_table, most_row_tiles, row_table, scales_by_group
from jaxgemm.kernels.hopper_gemm import hopper_gemm
from jaxgemm.kernels.plan import make_plan
from jaxgemm.problem import GemmProblem
from jaxgemm.tuning import choose_config

WIDE, SMALL = GemmConfig(256, 128, 2), GemmConfig(64, 64, 2, 1)
SHARING = GemmConfig(256, 128, 2, share=2)
COPYING = dataclasses.replace(SMALL, masked_store=True)
SWAPPED = GemmConfig(16, 64, 2, 1, swap_operands=True)


def problem(kind, m, n, k, groups, *, lhs=ROW, rhs=SQUARE, lhs_dtype=E4M3, out=BF16, **options):
    return GemmProblem(kind, m, n, k, lhs_dtype, E4M3, lhs, rhs, out, num_groups=groups, **options)


def kernel(described, config, num_sms=3):
    assert why_invalid(described, config) is None
    interpret = plgpu.InterpretGPUParams()
    return jax.jit(
        functools.partial(hopper_gemm, problem=described, config=config, num_sms=num_sms, interpret=interpret)
    )


def stack(parts):
    """Stored values, scales and the float64 arrays of several groups, stacked."""
    return [np.stack(array) for array in zip(*parts, strict=True)]


def run(described, config, lhs, rhs, sizes, bias=None):
    arrays = [jnp.asarray(a) for a in (*lhs[:2], *rhs[:2])]
    return np.asarray(
        kernel(described, config)(*arrays, None if bias is None else jnp.asarray(bias), jnp.asarray(sizes))
    )


def weights(rng, described):
    block, dtype = described.rhs_block_shape, described.rhs_dtype
    return stack([operand(rng, described.n, described.k, block, dtype, True) for _ in range(described.num_groups)])


# Contiguous groups

CONTIGUOUS = {
    "ragged": (problem("grouped", 140, 70, 200, 3, out=F32), SMALL, [1, 66, 73]),
    "empty groups": (problem("grouped", 20, 24, 130, 4), SMALL, [0, 7, 0, 13]),
    "one group with all": (problem("grouped", 300, 24, 130, 3), WIDE, [0, 300, 0]),
    "exactly 128": (problem("grouped", 256, 24, 130, 2, out=F32), GemmConfig(128, 64, 2), [128, 128]),
    "rows of no group": (problem("grouped", 90, 70, 130, 2, has_bias=True), SMALL, [5, 70]),
    "no rows at all": (problem("grouped", 20, 24, 130, 2, has_bias=True), SMALL, [0, 0]),
    "negative, and too many": (problem("grouped", 20, 24, 130, 3), SMALL, [-5, 15, 99]),
    "bias": (problem("grouped", 40, 27, 130, 2, has_bias=True, activation="gelu"), SMALL, [9, 31]),
    "rows copied": (problem("grouped", 14, 9, 130, 4, has_bias=True), COPYING, [1, 0, 9, 2]),
    "two waves": (problem("grouped", 150, 136, 200, 2, out=F32), WIDE, [131, 19]),
    "loads shared": (problem("grouped", 330, 280, 300, 3, has_bias=True), SHARING, [19, 0, 300]),
    "loads shared, three warpgroups": (
        problem("grouped", 250, 500, 200, 3),
        GemmConfig(192, 128, 2, 3, share=2),
        [7, 193, 30],
    ),
    "swapped": (problem("grouped", 40, 140, 300, 3, has_bias=True, activation="silu"), SWAPPED, [19, 0, 21]),
    "swapped float32": (problem("grouped", 37, 70, 130, 3, out=F32), SWAPPED, [1, 16, 18]),
    "both by rows": (problem("grouped", 70, 70, 130, 2, rhs=ROW, lhs_dtype=E5M2, out=F32), SMALL, [33, 37]),
    "kept block scales": (problem("grouped", 20, 900, 1400, 2, out=F32), GemmConfig(64, 192, 2, 1), [3, 17]),
    "kept block scales, one a tile": (
        problem("grouped", 20, 900, 1400, 2, out=F32),
        GemmConfig(64, 128, 2, 1),
        [3, 17],
    ),
}


def contiguous_oracle(described, lhs, rhs, sizes, bias):
    expected, start = np.zeros(described.out_shape), 0
    for group, size in enumerate(sizes):
        end = min(start + max(size, 0), described.m)
        total = lhs[2][start:end] @ rhs[2][group].T + (0 if bias is None else bias[group])
        expected[start:end] = ACTIVATIONS[described.activation](total)
        start = end
    return expected


def check_contiguous(described, config, sizes, seed=0):
    rng = np.random.default_rng(seed)
    lhs = operand(rng, described.m, described.k, ROW, described.lhs_dtype, True)
    rhs = weights(rng, described)
    shape = (described.num_groups, described.n)
    bias = rng.standard_normal(shape).astype(np.float32) * 20 if described.has_bias else None
    out = run(described, config, lhs, rhs, np.array(sizes, np.int32), bias)
    expected = contiguous_oracle(described, lhs, rhs, sizes, bias)
    assert out.dtype == described.out_dtype
    np.testing.assert_array_equal(out[max(0, sum(max(s, 0) for s in sizes)) :], 0)
    assert_close(out, expected, BOUNDS[described.out_dtype])


def test_cases_keep_block_scales_as_their_names_say():
    """Only operands with many of them do; fewer are read one by one, from the device's memory."""
    cases = [case for cases in (CONTIGUOUS, MASKED) for name, case in cases.items() if name.startswith("kept")]
    kept = [make_plan(described, config, 2).rhs for described, config, _ in cases]
    assert all(operand.keeps_block_scales for operand in kept)
    assert {operand.blocks_per_tile for operand in kept} == {1, 2}


@interpreted
@pytest.mark.parametrize("case", CONTIGUOUS)
def test_contiguous_groups(case):
    check_contiguous(*CONTIGUOUS[case])


@interpreted
def test_every_pattern_of_empty_groups_with_one_program():
    described = problem("grouped", 25, 24, 130, 5, out=F32)
    rng = np.random.default_rng(1)
    lhs, rhs = operand(rng, 25, 130, ROW, E4M3, False), weights(rng, described)
    compiled = kernel(described, SMALL)
    arrays = [jnp.asarray(a) for a in (*lhs[:2], *rhs[:2])]
    for pattern in itertools.product((0, 5), repeat=5):
        sizes = np.array(pattern, np.int32)
        out = np.asarray(compiled(*arrays, None, jnp.asarray(sizes)))
        assert_close(out, contiguous_oracle(described, lhs, rhs, sizes, None), 1e-10)
    assert compiled._cache_size() == 1


@interpreted
def test_a_row_does_not_depend_on_how_the_groups_lie():
    described = problem("grouped", 40, 24, 200, 2, out=F32)
    rng = np.random.default_rng(2)
    lhs, rhs = operand(rng, 40, 200, ROW, E4M3, False), weights(rng, described)
    first = run(described, SMALL, lhs, rhs, np.array([30, 10], np.int32))
    second = run(described, SMALL, lhs, rhs, np.array([11, 29], np.int32))
    np.testing.assert_array_equal(first[:11], second[:11])
    assert (first[11:30] != second[11:30]).any()


# Masked groups

MASKED = {
    "rows copied": (problem("masked", 6, 9, 130, 3, out=F32), COPYING, [2, 0, 6]),
    "zeros past the mask": (problem("masked", 70, 72, 200, 3, out=F32, has_bias=True), SMALL, [70, 0, 3]),
    "unspecified": (problem("masked", 70, 72, 200, 3, fill="unspecified"), SMALL, [65, 0, 70]),
    "beyond the rows": (problem("masked", 9, 72, 200, 2), SMALL, [-4, 99]),
    "swapped": (problem("masked", 40, 70, 300, 3, has_bias=True, activation="silu"), SWAPPED, [17, 1, 40]),
    "swapped, unspecified": (problem("masked", 12, 70, 130, 3, fill="unspecified", out=F32), SWAPPED, [12, 3, 0]),
    "two waves": (problem("masked", 300, 136, 200, 2), WIDE, [131, 257]),
    "loads shared": (problem("masked", 300, 260, 200, 2, has_bias=True), SHARING, [131, 300]),
    "loads shared, unspecified": (problem("masked", 300, 256, 200, 3, fill="unspecified"), SHARING, [0, 257, 5]),
    "both by rows": (problem("masked", 70, 100, 130, 2, rhs=ROW, out=F32, fill="unspecified"), SMALL, [70, 70]),
    "kept block scales": (problem("masked", 9, 900, 1400, 2, out=F32), GemmConfig(64, 192, 2, 1), [3, 9]),
}


@interpreted
@pytest.mark.parametrize("case", MASKED)
def test_masked_groups(case):
    described, config, sizes = MASKED[case]
    rng = np.random.default_rng(3)
    lhs = stack([operand(rng, described.m, described.k, ROW, E4M3, True) for _ in range(described.num_groups)])
    for group, size in enumerate(sizes):  # what lies past the mask must not matter
        lhs[0][group, max(size, 0) :] = np.nan
        lhs[1][group, :, max(size, 0) :] = np.nan
    rhs = weights(rng, described)
    bias = rng.standard_normal((described.num_groups, described.n)).astype(np.float32) if described.has_bias else None
    out = run(described, config, lhs, rhs, np.array(sizes, np.int32), bias)
    for group, size in enumerate(np.clip(sizes, 0, described.m)):
        total = lhs[2][group, :size] @ rhs[2][group].T + (0 if bias is None else bias[group])
        assert_close(out[group, :size], ACTIVATIONS[described.activation](total), BOUNDS[described.out_dtype])
        if described.fill == "zero":
            np.testing.assert_array_equal(out[group, size:].astype(np.float32), 0)


# Groups of the contracted axis

K_GROUPED = {
    "ragged, empty": (problem("k_grouped", 70, 72, 768, 4, rhs=ROW, out=F32), SMALL, [130, 0, 1, 257]),
    "all empty": (problem("k_grouped", 9, 24, 256, 2, rhs=ROW, out=F32), SMALL, [0, 0]),
    "exactly 128": (problem("k_grouped", 9, 24, 384, 3, rhs=ROW), SMALL, [128, 128, 128]),
    "too many": (problem("k_grouped", 9, 24, 256, 2, rhs=ROW, out=F32), SMALL, [100, 500]),
    "rows copied": (problem("k_grouped", 9, 11, 512, 3, rhs=ROW, out=F32), COPYING, [130, 0, 28]),
    "factors": (problem("k_grouped", 150, 136, 512, 2, rhs=ROW, out=F32), GemmConfig(128, 128, 2), [3, 300]),
    "wide": (problem("k_grouped", 300, 96, 512, 2, rhs=ROW, out=F32), GemmConfig(256, 96, 2), [3, 300]),
    "scales multiplied": (
        problem("k_grouped", 300, 96, 512, 2, rhs=ROW, out=F32),
        GemmConfig(256, 96, 2, multiply_scales=True),
        [3, 300],
    ),
}


@interpreted
@pytest.mark.parametrize("case", K_GROUPED)
def test_groups_of_the_contracted_axis(case):
    described, config, sizes = K_GROUPED[case]
    rng = np.random.default_rng(4)
    lhs, rhs = (operand(rng, rows, described.k, ROW, E4M3, True) for rows in (described.m, described.n))
    start, segments = 0, []
    for size in sizes:  # each segment ends in zeros, as the quantiser writes it
        end = min(start + size, described.k)
        segments.append(slice(start, end))
        start = min(-(-end // 128) * 128, described.k)
        for side in (lhs, rhs):
            side[0][:, end:start] = 0
    for side in (lhs, rhs):
        side[0][:, start:] = np.nan  # past the last segment, where nobody may look
    out = run(described, config, lhs, rhs, np.array(sizes, np.int32))
    expected = np.stack([lhs[2][:, s] @ rhs[2][:, s].T for s in segments])
    assert_close(out, expected, BOUNDS[described.out_dtype])
    for group, segment in enumerate(segments):
        assert segment.stop > segment.start or not out[group].any()


# Masks of the contracted axis

K_MASKED = {
    "every kind of end": (problem("k_masked", 70, 72, 300, 6, rhs=ROW, out=F32), SMALL, [0, 1, 127, 128, 129, 300]),
    "all empty": (problem("k_masked", 9, 24, 200, 3, rhs=ROW, out=F32), SMALL, [0, 0, 0]),
    "negative, and beyond the columns": (problem("k_masked", 9, 24, 200, 2, rhs=ROW), SMALL, [-4, 999]),
    "factors": (problem("k_masked", 150, 136, 256, 2, rhs=ROW, out=F32), GemmConfig(128, 128, 2), [3, 256]),
    "wide": (problem("k_masked", 300, 96, 256, 2, rhs=ROW, out=F32), GemmConfig(256, 96, 2), [3, 256]),
    "scales multiplied": (
        problem("k_masked", 300, 96, 256, 2, rhs=ROW, out=F32),
        GemmConfig(256, 96, 2, multiply_scales=True),
        [3, 256],
    ),
    "bfloat16, odd": (problem("k_masked", 70, 27, 257, 2, rhs=ROW, lhs_dtype=E5M2), SMALL, [257, 130]),
    "swapped": (problem("k_masked", 40, 70, 300, 3, rhs=ROW, out=F32), SWAPPED, [17, 0, 299]),
    "weights by blocks": (problem("k_masked", 20, 150, 300, 2, out=F32), SMALL, [129, 200]),
}


def k_masked_operands(described, sizes, seed):
    """Both operands, zero in the k tile in which a mask ends, as the quantiser writes it; poisoned in those past it."""
    rng = np.random.default_rng(seed)
    sides = []
    for rows, block, dtype in (
        (described.m, described.lhs_block_shape, described.lhs_dtype),
        (described.n, described.rhs_block_shape, described.rhs_dtype),
    ):
        side = stack([operand(rng, rows, described.k, block, dtype, True) for _ in range(described.num_groups)])
        for group, size in enumerate(np.clip(sizes, 0, described.k)):
            k_tiles = -(-size // 128)
            side[0][group, :, size : 128 * k_tiles] = 0
            side[0][group, :, 128 * k_tiles :] = np.nan
            of_group = side[1][group] if block == ROW else side[1][group].T
            of_group[k_tiles:] = np.nan
        sides.append(side)
    return sides


def check_k_masked(out, described, lhs, rhs, sizes):
    assert out.dtype == described.out_dtype
    for group, size in enumerate(np.clip(sizes, 0, described.k)):
        assert_close(out[group], lhs[2][group, :, :size] @ rhs[2][group, :, :size].T, BOUNDS[described.out_dtype])
        assert size or not out[group].any()


@interpreted
@pytest.mark.parametrize("case", K_MASKED)
def test_masks_of_the_contracted_axis(case):
    described, config, sizes = K_MASKED[case]
    lhs, rhs = k_masked_operands(described, sizes, 5)
    check_k_masked(run(described, config, lhs, rhs, np.array(sizes, np.int32)), described, lhs, rhs, sizes)


@interpreted
def test_every_pattern_of_empty_masks_with_one_program():
    described = problem("k_masked", 9, 24, 256, 4, rhs=ROW, out=F32)
    compiled = kernel(described, SMALL)
    for pattern in itertools.product((0, 130), repeat=4):
        lhs, rhs = k_masked_operands(described, pattern, 6)
        arrays = [jnp.asarray(a) for a in (*lhs[:2], *rhs[:2])]
        out = np.asarray(compiled(*arrays, None, jnp.array(pattern, jnp.int32)))
        check_k_masked(out, described, lhs, rhs, pattern)
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("sizes", [[0, 1, 127, 128, 129, 300], [-1, 301, 2**31 - 1, -(2**31), 256, 257]])
def test_only_k_tiles_with_valid_columns_are_summed(sizes):
    table = k_table(problem("k_masked", 8, 8, 300, 6), jnp.array(sizes, jnp.int32))
    assert table.dtype == jnp.int32
    assert table.tolist() == [0] * 6 + [-(-min(max(size, 0), 300) // 128) for size in sizes]


# Real sizes


@lowered
@pytest.mark.parametrize("kind, m, n, k, groups", [
    ("grouped", 8192, 7168, 3072, 8), ("grouped", 100, 4100, 2048, 64), ("grouped", 1, 7, 7, 2),
    ("masked", 256, 6144, 7168, 32), ("masked", 26, 4096, 4096, 6), ("k_grouped", 7168, 2048, 8192 + 4 * 128, 4),
    ("k_masked", 7168, 2048, 1024, 8), ("k_masked", 100, 7, 26, 3),
])  # fmt: skip
def test_lowers_for_cuda(kind, m, n, k, groups):
    wgrad = kind in ("k_grouped", "k_masked")
    described = problem(
        kind, m, n, k, groups, rhs=ROW if wgrad else SQUARE, out=F32 if wgrad else BF16, has_bias=not wgrad
    )
    described = dataclasses.replace(described, segment_alignment=128 if kind == "k_grouped" else 1)
    config = choose_config(described, 132)
    assert why_invalid(described, config) is None
    lower = functools.partial(hopper_gemm, problem=described, config=config, num_sms=132)
    text = jax.jit(lower).trace(*stored_shapes(described)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 1


@lowered
@pytest.mark.parametrize("kind, swap", [("grouped", False), ("grouped", True), ("masked", True)])
def test_odd_rows_of_groups_lower_without_a_copy(kind, swap):
    described = problem(kind, 100, 4100, 2048, 8)
    config = GemmConfig(16, 64, 8, 1, swap_operands=True) if swap else GemmConfig(128, 128, 4)
    config = dataclasses.replace(config, masked_store=True)
    lower = functools.partial(hopper_gemm, problem=described, config=config, num_sms=132)
    text = jax.jit(lower).trace(*stored_shapes(described)).lower(lowering_platforms=("cuda",)).as_text()
    assert "4104xbf16" not in text


@pytest.mark.parametrize("sizes", [[30, 1, 0, 47, 20], [0, 0, 0, 0, 0], [-3, 7, 200, 1, 1], [128, 1, 1, 1, 5]], ids=str)
def test_the_tma_can_read_each_tiles_scales(sizes):
    """It starts at multiples of 16 bytes, which the interpreter does not ask for; and there lie the tile's own."""
    described, sizes = problem("grouped", 150, 40, 300, 5), jnp.array(sizes, jnp.int32)
    scales = jnp.arange(3 * 152, dtype=jnp.float32).reshape(3, 152)
    moved = np.asarray(scales_by_group(described, scales, sizes))
    table = np.asarray(row_table(described, 64, sizes))
    fields = table[1:].reshape(FIELDS, most_row_tiles(described, 64))[:, : table[0]]
    for _, start, left, k_tiles, first in fields.T:
        if k_tiles:
            assert first % 4 == 0
            rows = min(left, 64)
            np.testing.assert_array_equal(moved[:, first : first + rows], scales[:, start : start + rows])


@pytest.mark.parametrize("n", [1, 37, 40, 257])
def test_the_tma_can_read_each_groups_bias(n):
    """A group's biases start at a multiple of 16 bytes, for floats of 2 and 4 bytes."""
    plan = make_plan(problem("grouped", 150, n, 300, 5), GemmConfig(64, 64, 2, 1), 2)
    assert plan.bias_pitch >= n and plan.bias_pitch * 2 % 16 == 0
