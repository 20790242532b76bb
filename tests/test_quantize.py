import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import E4M3, E5M2, ROW, SQUARE, dequantized, random

import jaxgemm
from jaxgemm import layout

MAX = {E4M3: 448.0, E5M2: 57344.0}
NUMPY = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}


def expected_parts(x, block, dtype, power_of_two=False):
    """Scales and values by the definition, in numpy: loops over blocks, no code of the library."""
    x = np.asarray(x).astype(np.float32)
    rows, cols = x.shape
    scales = np.empty((-(-rows // block[0]), -(-cols // block[1])), np.float32)
    values = np.empty(x.shape, NUMPY[dtype])
    for i, j in np.ndindex(*scales.shape):
        at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        amax = np.abs(x[at]).max()
        scale = np.float32(1) if amax == 0 else amax * np.float32(1 / MAX[dtype])
        if power_of_two:
            scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
        scales[i, j] = scale
        values[at] = np.clip(x[at] * (np.float32(1) / scale), -MAX[dtype], MAX[dtype]).astype(NUMPY[dtype])
    return values.astype(np.float32), scales


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("source, dtype", [(jnp.bfloat16, E4M3), (jnp.float16, E5M2), (jnp.float32, E4M3)])
@pytest.mark.parametrize("block", [ROW, SQUARE, (1, 300), (133, 300)])
def test_equals_the_definition(block, source, dtype, power_of_two):
    x = random(0, 133, 300, dtype=source)
    values, scales = expected_parts(x, block, dtype, power_of_two)
    for quantize in (
        jaxgemm.quantize,
        jax.jit(jaxgemm.quantize, static_argnums=(1, 2), static_argnames="power_of_two"),
    ):
        q = quantize(x, block, dtype, power_of_two=power_of_two)
        assert (q.dtype, q.scales.dtype) == (dtype, jnp.float32)
        np.testing.assert_array_equal(q.scales, scales)
        np.testing.assert_array_equal(np.asarray(q.values).astype(np.float32), values)


@settings(deadline=None, max_examples=6)
@given(
    m=st.integers(1, 140),
    k=st.integers(1, 270),
    block=st.sampled_from([ROW, SQUARE]),
    seed=st.integers(0, 99),
)
def test_round_trip_is_within_half_a_step(m, k, block, seed):
    x = random(seed, m, k)
    q = jaxgemm.quantize(x, block)
    amax = expected_parts(x, block, E4M3)[1].repeat(block[0], 0).repeat(block[1], 1)[:m, :k] * 448
    # e4m3 keeps 3 bits after the leading one (half a step: 2^-4 of the number), and 2^-10 at the least.
    bound = np.maximum(np.abs(x) * 2.0**-4, amax / 448 * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(dequantized(q) - np.asarray(x, np.float64)) <= bound).all()
    np.testing.assert_allclose(jaxgemm.dequantize(q), dequantized(q), rtol=1e-6)


@settings(deadline=None, max_examples=5)
@given(m=st.integers(1, 140), k=st.integers(1, 270), block=st.sampled_from([ROW, SQUARE]))
def test_stored_padding_is_zero(m, k, block):
    q = jaxgemm.quantize(random(0, m, k), block)
    assert q.stored_values.shape == (layout.align_up(m, 8), layout.align_up(k, 128))
    values = np.asarray(q.stored_values).astype(np.float32)
    assert not values[m:].any() and not values[:, k:].any()
    if block == ROW:
        assert q.stored_scales.shape == (-(-k // 128), layout.align_up(m, 4))
        assert not np.asarray(q.stored_scales)[:, m:].any()


@pytest.mark.parametrize("block", [ROW, SQUARE, (1, 140), (133, 140)])
@pytest.mark.parametrize("m, k", [(133, 140)])
def test_both_orientations_equal_two_quantisations(m, k, block):
    x = random(6, m, k)
    block_t = {ROW: ROW, SQUARE: SQUARE, (1, k): (1, m), (m, k): (k, m)}[block]
    natural, transposed, total = jaxgemm.quantize_both(x, block, column_sum=True)
    for got, want in [
        (natural, jaxgemm.quantize(x, block)),
        (transposed, jaxgemm.quantize(x.T, block_t)),
        (jaxgemm.quantize_transposed(x, block), jaxgemm.quantize(x.T, block_t)),
    ]:
        assert (got.shape, got.block_shape) == (want.shape, want.block_shape)
        np.testing.assert_array_equal(dequantized(got), dequantized(want))
    np.testing.assert_allclose(total, np.asarray(x, np.float64).sum(0), rtol=1e-4, atol=1e-4)
    assert jaxgemm.quantize_both(x, block)[2] is None


SPECIAL = """
import jax, jax.numpy as jnp, numpy as np
import jaxgemm
for block in ((1, 128), (128, 128)):
    def parts(entry, fill=0.0):
        x = jnp.full((2, 256), fill, jnp.float32).at[0, 5].set(entry)
        q = jax.jit(jaxgemm.quantize, static_argnums=1)(x, block)
        return np.asarray(q.scales), np.asarray(jaxgemm.dequantize(q))
    scales, back = parts(0.0)
    assert (scales == 1).all() and (back == 0).all(), "zero"
    for bad in (np.nan, np.inf, -np.inf):
        scales, back = parts(bad, 1.0)
        assert np.isnan(scales[0, 0]) and np.isnan(back[0, :128]).all(), "bad block"
        assert np.isfinite(scales[..., 1]).all() and np.isfinite(back[:, 128:]).all(), "its neighbour"
    for tiny in (1e-45, 1e-40, 1e-38, 1e-37, 1e-36, 1e-23):
        scales, back = parts(tiny)
        assert np.isfinite(scales).all() and np.isfinite(back).all(), ("tiny", tiny)
        assert abs(back[0, 5] - tiny) <= max(tiny / 16, 1.2e-38), ("tiny", tiny, back[0, 5])
    for huge in (1e30, 3.4028235e38):
        scales, back = parts(huge)
        assert np.isfinite(back).all() and abs(back[0, 5] / huge - 1) < 1e-6, ("huge", huge)
print("special blocks hold")
"""


@pytest.mark.parametrize("flags", ["", "--xla_cpu_enable_fast_math=true"])
def test_special_blocks_hold_also_under_fast_math(flags):
    """Zero, tiny, huge, NaN and Inf blocks, in a process of its own because XLA reads its flags once."""
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    run = subprocess.run([sys.executable, "-c", SPECIAL], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "special blocks hold" in run.stdout, run.stderr


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_products_that_read_a_bad_block_are_nan_and_no_others(bad):
    x = random(7, 5, 300).at[2, 200].set(bad)
    lhs, rhs = jaxgemm.quantize(x), jaxgemm.quantize(random(8, 6, 300), SQUARE)
    out = np.asarray(jaxgemm.gemm(lhs, rhs, preferred_element_type=jnp.float32))
    assert np.isnan(out[2]).all()
    assert np.isfinite(np.delete(out, 2, 0)).all()


def test_grouped_segments_hold_their_rows_and_nothing_else():
    x, sizes = random(9, 300, 40), [129, 0, 1, 128]
    q = jaxgemm.quantize_grouped(x.at[258:].set(jnp.nan), jnp.array(sizes))
    assert q.segment_alignment == 128
    back, start, row = np.asarray(jaxgemm.dequantize(q)), 0, 0
    for size in sizes:
        segment = x[row : row + size].T
        if size:
            expected = jaxgemm.dequantize(jaxgemm.quantize(segment))
            np.testing.assert_array_equal(back[:, start : start + size], expected)
        end = start + layout.align_up(size, 128)
        assert not back[:, start + size : end].any()
        start, row = end, row + size
    assert not back[:, start:].any()


@pytest.mark.parametrize(
    "error, call, message",
    [
        (
            TypeError,
            lambda q: q(jnp.ones((2, 2), jnp.int32)),
            r"x.dtype must be bfloat16, float16 or float32, got int32",
        ),
        (
            TypeError,
            lambda q: q(np.ones((2, 2))),
            r"x.dtype must be bfloat16, float16 or float32, got float64",
        ),
        (TypeError, lambda q: q([[1.0]]), r"x must be an array of bfloat16, float16 or float32, got list"),
        (
            TypeError,
            lambda q: q(jnp.ones((2, 2)), ROW, jnp.int8),
            "dtype must be float8_e4m3fn or float8_e5m2, got int8",
        ),
        (ValueError, lambda q: q(jnp.ones(2)), r"x must be \[..., m, k\], got shape \[2\]"),
        (
            ValueError,
            lambda q: q(jnp.ones((2, 9)), (1, 64)),
            r"block_shape must be .* \(m, k\) = \(2, 9\), got \(1, 64\)",
        ),
        (
            ValueError,
            lambda q: q(jnp.ones((2, 2)), implementation="cuda"),
            "implementation must be one of .* got 'cuda'",
        ),
        (
            NotImplementedError,
            lambda q: q(jnp.ones((2, 2)), (2, 2), implementation="mosaic"),
            "'mosaic' cannot serve this call",
        ),
    ],
)
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call(jaxgemm.quantize)


def test_dequantize_errors():
    with pytest.raises(TypeError, match="q must be a ScaledArray"):
        jaxgemm.dequantize(jnp.ones((2, 2)))
    with pytest.raises(TypeError, match="dtype must be bfloat16, float16 or float32, got int32"):
        jaxgemm.dequantize(jaxgemm.quantize(jnp.ones((2, 2))), jnp.int32)
