"""The Hopper kernel: run by Pallas' GPU interpreter on small shapes, and lowered for CUDA on real ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.kernels.hopper_gemm import hopper_gemm
from jaxgemm.layout import align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tuning import SHARED_MEMORY_BYTES, GemmConfig, choose_config, shared_memory_bytes, why_invalid

interpreted = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs Pallas' GPU interpreter")
lowered = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="needs Mosaic GPU of jax 0.11")

ROW, SQUARE = (1, 128), (128, 128)
E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
BF16, F16, F32 = (np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))


def problem(m, n, k, *, lhs=ROW, rhs=SQUARE, lhs_dtype=E4M3, rhs_dtype=E4M3, out=BF16, bias=False, activation=None):
    return GemmProblem("dense", m, n, k, lhs_dtype, rhs_dtype, lhs, rhs, out, has_bias=bias, activation=activation)


def scales_shape(rows, k, block_shape):
    k_tiles = cdiv(k, 128)
    return (k_tiles, align_up(rows, 4)) if block_shape == ROW else (cdiv(rows, 128), k_tiles)


def operand(rng, rows, k, block_shape, dtype, poison):
    """Stored values and scales, and the float64 array they stand for; unread padding may be poisoned with NaN."""
    values = np.zeros((align_up(rows, 8), align_up(k, 128)), np.float32)
    values[:rows, :k] = rng.standard_normal((rows, k)) * 8
    values = values.astype(dtype)
    scales = rng.uniform(0.5, 2, scales_shape(rows, k, block_shape)).astype(np.float32)
    by_row = scales.T[:rows] if block_shape == ROW else np.repeat(scales, 128, axis=0)[:rows]
    dequantized = values[:rows].astype(np.float64) * np.repeat(by_row, 128, axis=1)
    if poison:
        values[rows:] = np.nan
        if block_shape == ROW:
            scales[:, rows:] = np.nan
    return values, scales, dequantized


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


ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-np.clip(x, -500, None))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def assert_close(out, expected, bound):
    assert out.shape == expected.shape
    out = out.astype(np.float64)
    assert np.isfinite(out).all()
    assert ((out - expected) ** 2).sum() <= bound * (out * out + expected * expected).sum()


SMALL = GemmConfig(128, 128, 2)
BOUNDS = {BF16: 1e-5, F16: 1e-6, F32: 1e-10}

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
    "late scales": (problem(70, 200, 300, rhs=ROW, out=F32), GemmConfig(128, 192, 2)),
    "kept block scales": (problem(8, 300, 5504, out=F32), GemmConfig(64, 192, 2, 1)),
    "more stages than k tiles": (problem(70, 70, 200), GemmConfig(64, 64, 6, 1)),
    "tiles in turn": (problem(140, 260, 200, bias=True), GemmConfig(64, 64, 2, 1, band=2, band_along_n=True)),
}


@interpreted
@pytest.mark.parametrize("case", CASES)
def test_matches_the_dequantized_product(case):
    described, config = CASES[case]
    assert why_invalid(described, config) is None
    out, expected = run(described, config, poison=True)
    assert out.dtype == described.out_dtype
    assert_close(out, expected, BOUNDS[described.out_dtype])


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
    shape = jax.ShapeDtypeStruct
    args = [
        shape((align_up(described.m, 8), align_up(described.k, 128)), described.lhs_dtype),
        shape(scales_shape(described.m, described.k, described.lhs_block_shape), jnp.float32),
        shape((align_up(described.n, 8), align_up(described.k, 128)), described.rhs_dtype),
        shape(scales_shape(described.n, described.k, described.rhs_block_shape), jnp.float32),
        shape((described.n,), jnp.float32) if described.has_bias else None,
    ]
    kernel = functools.partial(hopper_gemm, problem=described, config=config, num_sms=132)
    return jax.jit(kernel).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


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
    for config in (GemmConfig(16, 128, 8, swap_operands=True, split_k=4), GemmConfig(256, 128, 3, share=2)):
        described = problem(16, 4096, 7168, bias=True)
        assert why_invalid(described, config) is None
        assert "mosaic_gpu" in lower(described, config)


@lowered
def test_shared_memory_is_counted_as_mosaic_counts_it():
    described = problem(4096, 4096, 7168)
    config = GemmConfig(256, 128, 4)
    used = shared_memory_bytes(described, config)
    assert used > SHARED_MEMORY_BYTES
    with pytest.raises(ValueError, match=f"smem_bytes={used}"):
        lower(described, config)
