import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    E4M3,
    E5M2,
    LOOSE,
    ROW,
    SQUARE,
    assert_close,
    available_implementations,
    difference,
    operands,
    oracle,
    random,
)

import jaxgemm
from jaxgemm import ScaledArray, tiles
from jaxgemm.gemm_config import GemmConfig

SHAPES = [(7, 7, 7), (1, 1, 1), (1, 576, 300), (130, 70, 200), (64, 257, 129), (3, 130, 1000)]
f32_gemm = functools.partial(jaxgemm.gemm, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("rhs_block", [SQUARE, ROW])
def test_any_shape(m, n, k, rhs_block, implementation):
    lhs, rhs = operands(m, n, k, rhs_block=rhs_block)
    out = f32_gemm(lhs, rhs, implementation=implementation)
    assert (out.shape, out.dtype) == ((m, n), jnp.float32)
    assert_close(out, oracle(lhs, rhs))


@settings(deadline=None, max_examples=5)
@given(m=st.integers(1, 300), n=st.integers(1, 300), k=st.integers(1, 400), seed=st.integers(0, 9))
def test_any_shape_at_random(m, n, k, seed):
    for implementation in available_implementations():
        lhs, rhs = operands(m, n, k, seed=seed)
        assert_close(f32_gemm(lhs, rhs, implementation=implementation), oracle(lhs, rhs))


@pytest.mark.parametrize("lhs_block", [ROW, SQUARE, (1, 200), (130, 200)])
@pytest.mark.parametrize("rhs_block", [ROW, SQUARE, (1, 200), (70, 200)])
def test_any_blocks(lhs_block, rhs_block):
    lhs, rhs = operands(130, 70, 200, lhs_block=lhs_block, rhs_block=rhs_block)
    assert_close(f32_gemm(lhs, rhs), oracle(lhs, rhs))


@pytest.mark.parametrize("lhs_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("rhs_dtype", [E4M3, E5M2])
def test_any_formats_also_mixed(lhs_dtype, rhs_dtype, implementation):
    lhs, rhs = operands(37, 70, 200, lhs_dtype=lhs_dtype, rhs_dtype=rhs_dtype)
    assert (lhs.dtype, rhs.dtype) == (lhs_dtype, rhs_dtype)
    assert_close(f32_gemm(lhs, rhs, implementation=implementation), oracle(lhs, rhs))


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
@pytest.mark.parametrize("bias_dtype", [None, jnp.bfloat16, jnp.float32])
def test_epilogue(out_dtype, activation, bias_dtype, implementation):
    lhs, rhs = operands(37, 70, 200)
    bias = None if bias_dtype is None else random(5, 70, dtype=bias_dtype, scale=10)
    out = jaxgemm.gemm(
        lhs, rhs, bias, activation=activation, preferred_element_type=out_dtype, implementation=implementation
    )
    assert out.dtype == out_dtype
    assert_close(out, oracle(lhs, rhs, bias, activation))


LARGE_TILES = {
    "high": (GemmConfig(256, 128, 3), SQUARE, jnp.bfloat16),
    "high, loads shared": (GemmConfig(256, 128, 3, share=2), SQUARE, jnp.bfloat16),
    "three warpgroups": (GemmConfig(192, 128, 4, 3), SQUARE, jnp.bfloat16),
    "three warpgroups, loads shared, along n": (
        GemmConfig(192, 128, 3, 3, share=2, band=2, band_along_n=True), SQUARE, jnp.float32,
    ),
    "three warpgroups, narrow": (GemmConfig(192, 96, 5, 3, share=2, band_along_n=True), SQUARE, jnp.bfloat16),
    "wide": (GemmConfig(128, 192, 4, band=16), SQUARE, jnp.bfloat16),
    "nine chunks": (GemmConfig(128, 144, 4), SQUARE, jnp.float32),
    "nine chunks, two bytes": (GemmConfig(128, 144, 5, band=16), SQUARE, jnp.bfloat16),
    "scales multiplied": (GemmConfig(128, 128, 5, share=2, band=16, multiply_scales=True), ROW, jnp.float32),
    "scales multiplied, high": (GemmConfig(256, 104, 4, share=2, multiply_scales=True), ROW, jnp.float32),
    "scales multiplied, two bytes": (GemmConfig(256, 96, 4, share=2, multiply_scales=True), ROW, jnp.bfloat16),
    "scales multiplied, loads not shared": (GemmConfig(256, 80, 3, multiply_scales=True), ROW, jnp.float32),
    "scales read, high": (GemmConfig(256, 112, 3), ROW, jnp.float32),
}  # fmt: skip


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("name", LARGE_TILES)
@pytest.mark.parametrize(
    "m, n, k",
    [(700, 1000, 1100), (257, 260, 129), (5000, 3000, 640), (1100, 701, 300), (600, 1002, 400), (640, 1920, 900)],
)
def test_tiles_of_large_products(name, m, n, k):
    """Tiles that small products do not get by themselves; of odd rows, those that TMA cannot store.

    Most reach past the end of an operand; of some pairs of blocks, one has a tile past the end of n.
    """
    config, rhs_block, out_dtype = LARGE_TILES[name]
    config = dataclasses.replace(config, masked_store=True)
    lhs, rhs = operands(m, n, k, rhs_block=rhs_block)
    bias = random(5, n, scale=10)
    with tiles.forced(config):
        out = jaxgemm.gemm(lhs, rhs, bias, preferred_element_type=out_dtype, implementation="mosaic")
    assert_close(out, oracle(lhs, rhs, bias))


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
def test_a_long_product_of_even_waves():
    """From k = 4096 on only as many pairs of blocks run as even waves need: here three quarters of them."""
    config = GemmConfig(256, 32, 4, share=2)
    lhs, rhs = operands(1000, 2280, 4100)
    with tiles.forced(config):
        out = jaxgemm.gemm(lhs, rhs, preferred_element_type=jnp.float32, implementation="mosaic")
    assert_close(out, oracle(lhs, rhs))


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
@pytest.mark.parametrize("tile_m, split_k", [(8, 2), (16, 2), (24, 2), (40, 3), (64, 4), (72, 8)])
def test_blocks_that_share_out_k_compute_many_tiles(tile_m, split_k, warpgroups):
    """A cluster may send the parts of a tile only when those of the one before have been read."""
    config = GemmConfig(tile_m, 64 * warpgroups, 2, warpgroups, swap_operands=True, split_k=split_k)
    lhs, rhs = operands(150, 9000, 1100)
    with tiles.forced(config):
        out = jaxgemm.gemm(lhs, rhs, random(5, 9000), preferred_element_type=jnp.bfloat16, implementation="mosaic")
        again = jaxgemm.gemm(lhs, rhs, random(5, 9000), preferred_element_type=jnp.bfloat16, implementation="mosaic")
    assert_close(out, oracle(lhs, rhs, random(5, 9000)))
    np.testing.assert_array_equal(out, again)


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("k", [100, 1100, 1150, 7168])
@pytest.mark.parametrize(
    "tile", ["64x32", "128x64", "192x64", "256x64, loads shared", "16x64, swapped", "64x192, swapped"]
)
@pytest.mark.parametrize("m", [1, 9, 61, 72, 200])
def test_few_rows_in_tiles_of_two_k_tiles_at_once(tile, m, k):
    """Odd and even numbers of k tiles; tiles of which only the rows that there are have been loaded."""
    config = {
        "64x32": GemmConfig(64, 32, 12, 1),
        "128x64": GemmConfig(128, 64, 3),
        "192x64": GemmConfig(192, 64, 2, 3),
        "256x64, loads shared": GemmConfig(256, 64, 4, share=2),
        "16x64, swapped": GemmConfig(16, 64, 8, 1, swap_operands=True),
        "64x192, swapped": GemmConfig(64, 192, 5, 3, swap_operands=True),
    }[tile]
    lhs, rhs = operands(m, 1000, k)
    with tiles.forced(config):
        out = jaxgemm.gemm(lhs, rhs, preferred_element_type=jnp.bfloat16, implementation="mosaic")
    assert_close(out, oracle(lhs, rhs))


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "config, rhs_block",
    [
        *itertools.product(
            [
                GemmConfig(16, 64, 3, 1, swap_operands=True),
                GemmConfig(16, 192, 3, 3, swap_operands=True),
                GemmConfig(64, 16, 3, 1),
            ],
            [SQUARE, ROW],
        ),
        (GemmConfig(192, 32, 3, 3), SQUARE),
        (GemmConfig(192, 128, 3, 3), SQUARE),
    ],
    ids=str,
)
def test_stages_are_not_written_again_before_every_warp_has_read_them(config, rhs_block):
    """Few stages, mostly of short products: when one thread freed them for all, one warp's scales were wrong at times."""
    lhs, rhs = operands(400, 6000, 1500, rhs_block=rhs_block)
    run = jax.jit(functools.partial(f32_gemm, implementation="mosaic"))
    with tiles.forced(config):
        outs = [run(lhs, rhs) for _ in range(30)]
    assert_close(outs[0], oracle(lhs, rhs))
    assert all((out == outs[0]).all() for out in outs[1:])


def test_a_scale_wrong_in_one_block_is_seen():
    """The bound must catch what the loose one lets pass: one k-block of one 128-row tile scaled by 1.1."""
    lhs, rhs = operands(256, 256, 1024)
    scales = np.array(lhs.scales)
    scales[:128, 3] *= 1.1
    wrong = f32_gemm(ScaledArray.from_parts(lhs.values, jnp.asarray(scales), ROW), rhs)
    with pytest.raises(AssertionError):
        assert_close(wrong, oracle(lhs, rhs))


@pytest.mark.parametrize("m, n, k", [(64, 200, 512), (33, 128, 7168), (23, 200, 4096)])
def test_near_the_unquantised_product(m, n, k, implementation):
    x, w = random(0, m, k), random(1, n, k)
    out = f32_gemm(jaxgemm.quantize(x), jaxgemm.quantize(w, SQUARE), implementation=implementation)
    assert difference(out, np.asarray(x, np.float64) @ np.asarray(w, np.float64).T) < LOOSE


def test_small_integers_are_exact(implementation):
    """Integers with power-of-two scales round nowhere, so any order of summing gives the very same bits."""
    key = jax.random.split(jax.random.key(0), 4)
    lhs_values, rhs_values = (jax.random.randint(k, (130, 300), -8, 9).astype(E4M3) for k in key[:2])
    lhs_scales, rhs_scales = (
        2.0 ** jax.random.randint(key, shape, -2, 3).astype(jnp.float32)
        for key, shape in zip(key[2:], [(130, 3), (2, 3)], strict=True)
    )
    lhs = ScaledArray.from_parts(lhs_values, lhs_scales, ROW)
    rhs = ScaledArray.from_parts(rhs_values, rhs_scales, SQUARE)
    np.testing.assert_array_equal(f32_gemm(lhs, rhs, implementation=implementation), oracle(lhs, rhs))


def test_repeated_runs_are_bitwise_equal(implementation):
    lhs, rhs = operands(130, 300, 500)
    first = np.asarray(f32_gemm(lhs, rhs, implementation=implementation))
    for _ in range(3):
        np.testing.assert_array_equal(f32_gemm(lhs, rhs, implementation=implementation), first)


def test_nothing_reads_the_padding(implementation):
    lhs, rhs = operands(37, 70, 200)
    clean = f32_gemm(lhs, rhs, implementation=implementation)

    def poison(q):
        values = q.stored_values.at[q.rows :].set(jnp.nan)
        scales = q.stored_scales.at[:, q.rows :].set(jnp.nan) if q.block_shape == ROW else q.stored_scales
        return ScaledArray(values, scales, q.rows, q.cols, q.block_shape)

    np.testing.assert_array_equal(f32_gemm(poison(lhs), poison(rhs), implementation=implementation), clean)


@pytest.mark.parametrize("m, n, k", [(0, 5, 7), (5, 0, 7), (5, 7, 0), (0, 0, 0)])
def test_empty_operands(m, n, k, implementation):
    lhs, rhs = operands(m, n, k)
    bias = jnp.arange(n, dtype=jnp.float32)
    out = f32_gemm(lhs, rhs, bias, implementation=implementation)
    np.testing.assert_array_equal(out, np.broadcast_to(bias, (m, n)) if k == 0 else np.zeros((m, n)))


def test_is_one_equation():
    lhs, rhs = operands(7, 9, 200)
    jaxpr = jax.make_jaxpr(jaxgemm.gemm)(lhs, rhs)
    assert [e.primitive.name for e in jaxpr.eqns] == ["fp8_gemm"]
    jaxpr = jax.make_jaxpr(jaxgemm.quantize)(jnp.ones((7, 9)))
    assert [e.primitive.name for e in jaxpr.eqns] == ["fp8_quantize"]


@pytest.fixture
def lhs():
    return jaxgemm.quantize(jnp.ones((4, 200)))


@pytest.mark.parametrize(
    "error, call, message",
    [
        (
            ValueError,
            lambda x: jaxgemm.gemm(x, jaxgemm.quantize(jnp.ones((5, 201)), SQUARE)),
            r"lhs and rhs must agree in k, the last axis: lhs is \[4, 200\] with k = 200, rhs is \[5, 201\]",
        ),
        (
            TypeError,
            lambda x: jaxgemm.gemm(x, jnp.ones((5, 200), jnp.int8)),
            "rhs must be a ScaledArray .* int8",
        ),
        (TypeError, lambda x: jaxgemm.gemm(x.values, x), "lhs must be a ScaledArray of FP8 values"),
        (
            ValueError,
            lambda x: jaxgemm.gemm(x, jaxgemm.quantize(jnp.ones((1, 4, 200)))),
            r"rhs must be \[n, k\]",
        ),
        (ValueError, lambda x: jaxgemm.gemm(x, x, jnp.ones(5)), r"bias must be \[n\] = \[4\], got \[5\]"),
        (
            ValueError,
            lambda x: jaxgemm.gemm(x, x, jnp.ones((1, 4))),
            r"bias must be \[n\], got shape \[1, 4\]",
        ),
        (TypeError, lambda x: jaxgemm.gemm(x, x, jnp.ones(4, jnp.int32)), "bias.dtype must be bfloat16"),
        (
            ValueError,
            lambda x: jaxgemm.gemm(x, x, activation="tanh"),
            "activation must be one of None, 'relu'",
        ),
        (
            ValueError,
            lambda x: jaxgemm.gemm(x, x, implementation="cublas"),
            "implementation must be one of None",
        ),
        (
            TypeError,
            lambda x: jaxgemm.gemm(x, x, preferred_element_type=jnp.int32),
            "preferred_element_type must be bfloat16, float16 or float32, got int32",
        ),
    ],
)
def test_errors(lhs, error, call, message):
    with pytest.raises(error, match=message):
        call(lhs)


@pytest.mark.parametrize("name", sorted({"mosaic", "triton"} - set(available_implementations())))
def test_kernels_say_why_they_cannot_run_here(lhs, name):
    for call in (jaxgemm.gemm, jax.jit(jaxgemm.gemm, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' cannot serve this call: "):
            call(lhs, lhs, implementation=name)
