"""Quantising kernels of which only some rows count: masked ones, and segments of groups; bit by bit as `reference`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this jax has no interpreter of GPU kernels", allow_module_level=True)

from support import random

from jaxgemm import layout, reference
from jaxgemm.kernels import hopper_quantize as kernels
from jaxgemm.problem import QuantizeProblem
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

E4M3 = np.dtype(jnp.float8_e4m3fn)
BOTH, TRANSPOSED = {"transposed": True}, {"transposed": True, "natural": False}


def run_interpreted(*inputs, problem, num_sms=2):
    config = kernels.default_config(problem, inputs[0].dtype)
    return kernels.hopper_quantize(*inputs, problem=problem, config=config, num_sms=num_sms, interpret=True)


def assert_equals_the_reference(problem, x, sizes):
    actual, expected = run_interpreted(x, sizes, problem=problem), reference.quantize(problem, x, sizes)
    assert len(actual) == len(expected)
    if problem.column_sum:
        np.testing.assert_allclose(actual.pop(), expected.pop(), rtol=1e-5, atol=1e-4)
    for a, b in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
@pytest.mark.parametrize("orientations", [{}, TRANSPOSED, BOTH], ids=str)
def test_masked_rows(block_shape, orientations):
    problem = QuantizeProblem(block_shape, E4M3, rows="masked", **orientations)
    x, sizes = random(0, 3, 140, 130, dtype=jnp.bfloat16), jnp.array([0, 140, 129])
    past = jnp.arange(140) >= sizes[:, None]
    poisoned = jnp.where(past[..., None], jnp.asarray(jnp.nan, x.dtype), x)
    assert_equals_the_reference(problem, poisoned, sizes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_masked_rows_of_one_matrix_and_their_sum(dtype):
    problem = QuantizeProblem(ROW_BLOCK, E4M3, rows="masked", column_sum=True, **BOTH)
    x = random(1, 200, 200, dtype=dtype).at[150:].set(jnp.nan)
    assert_equals_the_reference(problem, x, jnp.array(150))


@pytest.mark.parametrize(
    "sizes, dtype",
    [
        ([129, 0, 1, 128], jnp.bfloat16),
        ([0, 0, 0, 0], jnp.bfloat16),
        ([300, 0, 0, 0], jnp.float32),
        ([-4, 290, 99, 5], jnp.float16),
    ],
    ids=str,
)
def test_segments(sizes, dtype):
    problem = QuantizeProblem(ROW_BLOCK, E4M3, rows="segments", num_groups=4, column_sum=True, **TRANSPOSED)
    x = random(2, 300, 130, dtype=dtype)
    used = int(layout.group_offsets(jnp.array(sizes), 300)[-1])
    assert_equals_the_reference(problem, x.at[used:].set(jnp.nan), jnp.array(sizes))


def test_masked_rows_behind_a_function():
    problem = QuantizeProblem(ROW_BLOCK, E4M3, rows="masked", function="relu_gate", **BOTH)
    inputs, sizes = [random(i, 2, 70, 40, dtype=jnp.bfloat16) for i in (3, 4)], jnp.array([65, 3])
    inputs[1] = jnp.where((jnp.arange(70) >= sizes[:, None])[..., None], jnp.asarray(jnp.nan, jnp.bfloat16), inputs[1])
    actual = run_interpreted(*inputs, sizes, problem=problem)
    for a, b in zip(actual, reference.quantize(problem, *inputs, sizes), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("rows, shape, sizes", [("masked", (32, 256, 7168), (32,)), ("segments", (16384, 4096), (8,))])
def test_lowers_for_cuda(rows, shape, sizes):
    problem = QuantizeProblem(ROW_BLOCK, E4M3, rows=rows, column_sum=True, **(BOTH if rows == "masked" else TRANSPOSED))
    problem = dataclasses.replace(problem, num_groups=sizes[0] if rows == "segments" else 0)
    config = kernels.default_config(problem, jnp.bfloat16)
    quantize = functools.partial(kernels.hopper_quantize, problem=problem, config=config, num_sms=132)
    inputs = jax.ShapeDtypeStruct(shape, jnp.bfloat16), jax.ShapeDtypeStruct(sizes, jnp.int32)
    text = jax.jit(quantize).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
