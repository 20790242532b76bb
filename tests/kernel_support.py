"""What the tests of the Hopper product share: stored operands by hand, the oracle's bound, and what can run where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.dispatch import OLDEST_JAX_OF_KERNELS
from jaxgemm.layout import align_up, cdiv
from jaxgemm.problem import stored_operands

interpreted = pytest.mark.skipif(not hasattr(plgpu, "InterpretGPUParams"), reason="needs Pallas' GPU interpreter")
lowered = pytest.mark.skipif(jax.__version_info__ < OLDEST_JAX_OF_KERNELS, reason="needs Mosaic GPU of jax 0.11.1")

ROW, SQUARE = (1, 128), (128, 128)
E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
BF16, F16, F32 = (np.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32))
BOUNDS = {BF16: 1e-5, F16: 1e-6, F32: 1e-10}

ACTIVATIONS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-np.clip(x, -500, None))),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def scales_shape(rows, k, block_shape):
    """The shape of stored scales."""
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


def stored_shapes(problem):
    """Abstract operands of the kernel for a problem, in its order; None for a bias or sizes that it has not."""
    bias = (problem.n,) if problem.kind == "dense" else (problem.num_groups, problem.n)
    return [
        *stored_operands(problem),
        jax.ShapeDtypeStruct(bias, jnp.float32) if problem.has_bias else None,
        None if problem.kind == "dense" else jax.ShapeDtypeStruct((problem.num_groups,), jnp.int32),
    ]


def assert_close(out, expected, bound):
    """The relative squared difference is at most the bound."""
    assert out.shape == expected.shape
    out = out.astype(np.float64)
    assert np.isfinite(out).all()
    assert ((out - expected) ** 2).sum() <= bound * (out * out + expected * expected).sum()
