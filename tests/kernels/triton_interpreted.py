"""The Triton kernel itself, run by Triton's interpreter on a CPU.

Triton reads TRITON_INTERPRET when it is imported, so `test_triton_gemm.py` runs this file in a process of its own.
"""

import os

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in a process with TRITON_INTERPRET=1", allow_module_level=True)

import dataclasses

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
    operand,
)

from jaxgemm.kernels.triton_gemm import constants, fp8_gemm_triton, grid
from jaxgemm.problem import GemmProblem
from jaxgemm.triton_tuning import TritonConfig, choose_config, why_invalid

# numpy warns where IEEE arithmetic, the GPU's too, goes on with Inf and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

GUARD = 4096
"""Elements behind the output that a store of too many rows would hit."""


class Buffer:
    """A numpy array with as much of a torch tensor's face as Triton's interpreter asks for."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype.name

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size, device):
        return self

    def set_(self, *args):
        return self

    def copy_(self, other):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides


def run_kernel(problem, config, lhs, rhs, bias=None):
    """Runs the kernel on stored values and scales, and checks that it writes nothing behind the output."""
    size = problem.m * problem.n
    memory = np.full(size + GUARD, -77, problem.out_dtype)
    out = memory[:size].reshape(problem.out_shape)
    arrays = [lhs[0], lhs[1], rhs[0], rhs[1], lhs[1] if bias is None else bias, out]
    if config.widen:
        arrays[0], arrays[2] = arrays[0].view(np.uint8), arrays[2].view(np.uint8)
    buffers = [Buffer(np.ascontiguousarray(array)) for array in arrays]
    fp8_gemm_triton[grid(problem, config)](*buffers, **constants(problem, config))
    assert (memory[size:] == -77).all()
    return out


def problem(m, n, k, *, lhs=ROW, rhs=SQUARE, lhs_dtype=E4M3, rhs_dtype=E4M3, out=BF16, bias=False, activation=None):
    return GemmProblem("dense", m, n, k, lhs_dtype, rhs_dtype, lhs, rhs, out, has_bias=bias, activation=activation)


def run(problem, config, *, seed=0, poison=False, change_lhs=None):
    """The kernel's result, and the float64 oracle."""
    rng = np.random.default_rng(seed)
    lhs = operand(rng, problem.m, problem.k, problem.lhs_block_shape, problem.lhs_dtype, poison)
    rhs = operand(rng, problem.n, problem.k, problem.rhs_block_shape, problem.rhs_dtype, poison)
    bias = rng.standard_normal(problem.n).astype(np.float32) * 20 if problem.has_bias else None
    expected = lhs[2] @ rhs[2].T + (0 if bias is None else bias)
    out = run_kernel(problem, config, lhs if change_lhs is None else change_lhs(lhs), rhs, bias)
    return out, np.asarray(ACTIVATIONS[problem.activation](expected), np.float64)


SMALL = TritonConfig(16, 16, num_warps=4, num_stages=2, band=2)

CASES = {
    "one element": problem(1, 1, 1),
    "one tile": problem(7, 7, 7),
    "odd": problem(37, 53, 300, bias=True),
    "bands of tiles": problem(70, 40, 130, out=F32),
    "two blocks of scales": problem(130, 150, 270, bias=True, activation="gelu"),
    "aligned": problem(64, 32, 256, activation="relu"),
    "wgrad": problem(33, 47, 300, rhs=ROW, out=F32),
    "wgrad mixed": problem(33, 47, 129, rhs=ROW, out=F16, rhs_dtype=E5M2, bias=True, activation="relu"),
    "weights on the left": problem(140, 35, 200, lhs=SQUARE, rhs=ROW, bias=True),
    "square blocks": problem(140, 135, 300, lhs=SQUARE, out=F32, activation="silu"),
    "e5m2": problem(20, 30, 200, lhs_dtype=E5M2, rhs_dtype=E5M2, out=F32, activation="silu"),
    "e5m2 rows": problem(20, 30, 200, lhs_dtype=E5M2, out=F16, bias=True, activation="gelu"),
}


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_dequantized_product(case, widen):
    """Also where every unread element of the padding is NaN, and with float16 in place of FP8 in the product."""
    config = dataclasses.replace(SMALL, widen=widen)
    assert why_invalid(CASES[case], config, 80 if widen else 89) is None
    out, expected = run(CASES[case], config, poison=True)
    assert_close(out, expected, BOUNDS[CASES[case].out_dtype])


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_chosen_configurations_are_right(capability):
    described = problem(131, 133, 200, bias=True, out=F32)
    for num_sms in (1, 1000):
        out, expected = run(described, choose_config(described, capability, num_sms), poison=True)
        assert_close(out, expected, BOUNDS[F32])


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_widening_keeps_every_number(dtype):
    """Each FP8 number, times one: zero, subnormal, largest, infinite and NaN."""
    codes = np.zeros((256, 128), np.uint8)
    codes[:, 0] = np.arange(256)
    rhs = np.zeros((8, 128), dtype)
    rhs[0, 0] = 1
    lhs_scales, rhs_scales = np.ones((1, 256), np.float32), np.ones((1, 1), np.float32)
    described = problem(256, 1, 1, lhs_dtype=dtype, rhs_dtype=dtype, out=F32)
    config = dataclasses.replace(SMALL, widen=True)
    out = run_kernel(described, config, (codes.view(dtype), lhs_scales), (rhs, rhs_scales))
    np.testing.assert_array_equal(out[:, 0], codes[:, 0].view(dtype).astype(np.float32))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("scale", [np.nan, 1e30])
def test_activations_of_what_is_not_finite_or_huge(activation, scale):
    """A scale of NaN marks a bad block, and must reach the output; huge sums must not turn into NaN."""
    values = np.full((8, 128), 3, E4M3)
    values[1] = -3
    described = problem(2, 1, 128, out=F32, activation=activation)
    lhs_scales, rhs_scales = np.full((1, 4), scale, np.float32), np.ones((1, 1), np.float32)
    out = run_kernel(described, SMALL, (values, lhs_scales), (np.ones((8, 128), E4M3), rhs_scales))
    expected = [[np.float32(scale) * 384], [np.nan if np.isnan(scale) else 0]]
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_row_does_not_depend_on_the_others():
    described = problem(37, 40, 300, out=F32, bias=True, activation="gelu")

    def change_others(lhs):
        values, scales = lhs[0].copy(), lhs[1].copy()
        values[:4], values[5:] = 3, 1
        scales[:, :4] *= 7
        scales[:, 5:] = np.nan
        return values, scales, lhs[2]

    first, _ = run(described, SMALL)
    second, _ = run(described, SMALL, change_lhs=change_others)
    np.testing.assert_array_equal(first[4], second[4])
    assert (first[0] != second[0]).any() and np.isnan(second[5]).all()


def test_small_integers_are_exact():
    rng = np.random.default_rng(3)
    values = [rng.integers(-8, 9, (24, 256)).astype(E4M3) for _ in range(2)]
    scales = [np.exp2(rng.integers(-3, 4, shape)).astype(np.float32) for shape in ((2, 24), (1, 2))]
    out = run_kernel(problem(24, 24, 256, out=F32), SMALL, *zip(values, scales, strict=True))
    lhs = values[0].astype(np.float64) * np.repeat(scales[0].T, 128, axis=1)
    rhs = values[1].astype(np.float64) * np.repeat(scales[1], 128, axis=1)
    np.testing.assert_array_equal(out, lhs @ rhs.T)
