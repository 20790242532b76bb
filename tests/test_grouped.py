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
    ROW,
    SQUARE,
    TIGHT,
    activate,
    assert_close,
    available_implementations,
    dequantized,
    difference,
    group_rows,
    operands,
    random,
)

import jaxgemm
from jaxgemm import tiles
from jaxgemm.gemm import k_masked_gemm
from jaxgemm.gemm_config import GemmConfig

M, N, K, GROUPS = 150, 40, 200, 5
SIZES = [[30] * 5, [0, 0, 150, 0, 0], [1, 128, 1, 0, 20], [7, 0, 33, 2, 0], [0] * 5, [-4, 10, 200, 3, -1]]
f32 = {"preferred_element_type": jnp.float32}


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def grouped(lhs, rhs, sizes, bias=None, activation=None, implementation=None):
    return jaxgemm.grouped_gemm(lhs, rhs, sizes, bias, activation=activation, implementation=implementation, **f32)


def grouped_oracle(lhs, rhs, sizes, bias=None, activation=None):
    x, w = dequantized(lhs), dequantized(rhs)
    out = np.zeros((lhs.rows, rhs.rows))
    for group, start, end in group_rows(sizes, lhs.rows):
        product = x[start:end] @ w[group].T
        out[start:end] = activate(product if bias is None else product + np.asarray(bias)[group], activation)
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("with_bias, activation", [(False, None), (True, "silu")])
def test_contiguous_groups(sizes, with_bias, activation):
    lhs, rhs = operands(M, N, K, groups=(GROUPS,))
    bias = random(3, GROUPS, N) if with_bias else None
    out = grouped(lhs, rhs, jnp.array(sizes), bias, activation)
    assert_close(out, grouped_oracle(lhs, rhs, sizes, bias, activation))
    assert not np.asarray(out)[sum(max(s, 0) for s in sizes) :].any()


@settings(deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 60), min_size=GROUPS, max_size=GROUPS))
def test_any_sizes(sizes):
    lhs, rhs = operands(M, N, K, groups=(GROUPS,))
    assert_close(grouped(lhs, rhs, jnp.array(sizes)), grouped_oracle(lhs, rhs, sizes))


def test_every_pattern_of_empty_groups():
    lhs, rhs = operands(M, N, K, groups=(GROUPS,))
    for pattern in itertools.product([0, 29], repeat=GROUPS):
        assert_close(grouped(lhs, rhs, jnp.array(pattern)), grouped_oracle(lhs, rhs, pattern))


def test_agrees_with_ragged_dot():
    """On integers both are exact: the semantics must be those of `jax.lax.ragged_dot`, rows of no group included."""
    x = jax.random.randint(jax.random.key(0), (M, K), -4, 5).astype(jnp.float32)
    w = jax.random.randint(jax.random.key(1), (GROUPS, K, N), -4, 5).astype(jnp.float32)
    one = {"dtype": E4M3, "power_of_two": True}
    lhs, rhs = jaxgemm.quantize(x, **one), jaxgemm.quantize_transposed(w, SQUARE, **one)
    for sizes in SIZES[:4]:
        expected = jax.lax.ragged_dot(x, w, jnp.array(sizes), precision="highest")
        np.testing.assert_array_equal(grouped(lhs, rhs, jnp.array(sizes)), expected)


def test_rows_of_no_group_may_hold_nan():
    x = random(0, M, K)
    lhs, rhs = operands(M, N, K, groups=(GROUPS,))
    poisoned = jaxgemm.quantize(x.at[42:].set(jnp.nan))
    sizes = jnp.array(SIZES[3])
    np.testing.assert_array_equal(grouped(poisoned, rhs, sizes), grouped(lhs, rhs, sizes))


@functools.partial(jax.jit, static_argnames=("activation",))
def masked(lhs, rhs, masked_m, bias=None, activation=None):
    return jaxgemm.masked_grouped_gemm(lhs, rhs, masked_m, bias, activation=activation, expected_m=9, **f32)


def masked_operands(max_m=17, rhs_block=SQUARE):
    lhs = jaxgemm.quantize(random(0, GROUPS, max_m, K))
    return lhs, jaxgemm.quantize(random(1, GROUPS, N, K), rhs_block)


@pytest.mark.parametrize("counts", [[17] * 5, [0] * 5, [0, 1, 17, 8, 3], [-5, 100, 2, 0, 17]])
@pytest.mark.parametrize("with_bias, activation", [(False, None), (True, "gelu")])
@pytest.mark.parametrize("rhs_block", [SQUARE, ROW])
def test_masked_groups(counts, with_bias, activation, rhs_block):
    lhs, rhs = masked_operands(rhs_block=rhs_block)
    bias = random(3, GROUPS, N) if with_bias else None
    product = dequantized(lhs) @ dequantized(rhs).transpose(0, 2, 1)
    expected = activate(product if bias is None else product + np.asarray(bias)[:, None], activation)
    out = np.asarray(masked(lhs, rhs, jnp.array(counts), bias, activation))
    for group, count in enumerate(counts):
        expected[group, max(count, 0) :] = 0
        assert not out[group, max(count, 0) :].any()
    assert_close(out, expected)


def test_masked_groups_scaled_by_rows_end_in_any_warpgroup():
    """Tiles of several warpgroups, some of which have no rows: on a GPU they must not wait for one another."""
    groups, counts = 8, [0, 1, 64, 65, 128, 200, 511, 512]
    n = 4096 if jax.default_backend() == "gpu" else 256  # a CPU has no tiles to choose, and takes seconds for so many
    lhs = jaxgemm.quantize(random(0, groups, 512, 512))
    rhs = jaxgemm.quantize(random(1, groups, n, 512), ROW)
    out = np.asarray(masked(lhs, rhs, jnp.array(counts)))
    expected = dequantized(lhs) @ dequantized(rhs).transpose(0, 2, 1)
    for group, count in enumerate(counts):
        expected[group, count:] = 0
        assert not out[group, count:].any()
    assert_close(out, expected)


def test_masked_rows_may_hold_nan():
    lhs, rhs = masked_operands()
    counts = jnp.array([0, 1, 17, 8, 3])
    x = jnp.where((jnp.arange(17) < counts[:, None])[..., None], random(0, GROUPS, 17, K), jnp.nan)
    np.testing.assert_array_equal(masked(jaxgemm.quantize(x), rhs, counts), masked(lhs, rhs, counts))


def test_unspecified_fill_leaves_valid_rows_alone():
    lhs, rhs = masked_operands()
    counts = [0, 1, 17, 8, 3]
    zero = jaxgemm.masked_grouped_gemm(lhs, rhs, jnp.array(counts))
    out = jaxgemm.masked_grouped_gemm(lhs, rhs, jnp.array(counts), fill="unspecified")
    for group, count in enumerate(counts):
        np.testing.assert_array_equal(
            np.asarray(out[group, :count], np.float32), np.asarray(zero[group, :count], np.float32)
        )


@jax.jit
def k_masked(lhs, rhs, masked_k):
    return k_masked_gemm(lhs, rhs, masked_k)


@pytest.mark.parametrize("counts", [[300] * 5, [0] * 5, [0, 1, 127, 128, 129], [-5, 999, 257, 0, 299]])
def test_k_masked(counts):
    """What lies past the mask, NaN in values or scales included, is not there."""
    valid = (jnp.arange(300) < jnp.array(counts)[:, None])[:, None]
    lhs, rhs = (jaxgemm.quantize(jnp.where(valid, random(i, GROUPS, rows, 300), 0)) for i, rows in enumerate((70, N)))
    expected = dequantized(lhs) @ dequantized(rhs).transpose(0, 2, 1)
    out = np.asarray(k_masked(lhs, rhs, jnp.array(counts)))
    assert out.dtype == np.float32
    assert_close(out, expected)
    for group, count in enumerate(counts):
        assert count > 0 or not out[group].any()

    tiles = -(-np.clip(counts, 0, 300) // 128)[:, None]
    past_values, past_scales = (jnp.array(np.arange(size) >= ends) for size, ends in ((384, 128 * tiles), (3, tiles)))
    poisoned = [
        dataclasses.replace(
            q,
            stored_values=jnp.where(past_values[:, None], jnp.array(jnp.nan, E4M3), q.stored_values),
            stored_scales=jnp.where(past_scales[..., None], jnp.nan, q.stored_scales),
        )
        for q in (lhs, rhs)
    ]
    np.testing.assert_array_equal(k_masked(*poisoned, jnp.array(counts)), out)


@jax.jit
def k_grouped(x, dout, sizes):
    lhs, rhs = jaxgemm.quantize_grouped(x, sizes), jaxgemm.quantize_grouped(dout, sizes)
    return jaxgemm.k_grouped_gemm(lhs, rhs, sizes), lhs, rhs


def k_grouped_oracle(lhs, rhs, sizes, rows):
    x, dout = dequantized(lhs), dequantized(rhs)
    out, start = np.zeros((len(sizes), lhs.rows, rhs.rows)), 0
    for group, first, last in group_rows(sizes, rows):
        out[group] = x[:, start : start + last - first] @ dout[:, start : start + last - first].T
        start += -(-(last - first) // 128) * 128
    return out


@pytest.mark.parametrize("sizes", [*SIZES, [128, 0, 0, 0, 22], [0, 0, 0, 0, 128]])
def test_k_grouped(sizes):
    x, dout = random(0, M, 70), random(1, M, 33)
    out, lhs, rhs = k_grouped(x, dout, jnp.array(sizes))
    assert out.dtype == jnp.float32
    assert_close(out, k_grouped_oracle(lhs, rhs, sizes, M))
    for group, start, end in group_rows(sizes, M):
        if start == end:
            assert not np.asarray(out[group]).any()


def test_k_grouped_with_128_tokens_and_a_zero_channel():
    """DeepGEMM issue 365: an expert of exactly 128 tokens, one channel of which is zero."""
    x, dout = random(0, 256, 70).at[:128, 5].set(0), random(1, 256, 33).at[:128, 7].set(0)
    sizes = [128, 128]
    out, lhs, rhs = k_grouped(x, dout, jnp.array(sizes))
    assert_close(out, k_grouped_oracle(lhs, rhs, sizes, 256))
    assert not np.asarray(out[0, 5]).any() and not np.asarray(out[0, :, 7]).any()
    for group in range(2):
        rows = slice(128 * group, 128 * group + 128)
        alone = jaxgemm.gemm(jaxgemm.quantize(x[rows].T), jaxgemm.quantize(dout[rows].T), **f32)
        assert_close(out[group], alone)


@settings(deadline=None, max_examples=20)
@given(sizes=st.lists(st.integers(0, 60), min_size=GROUPS, max_size=GROUPS))
def test_k_grouped_of_any_sizes(sizes):
    x, dout = random(0, M, 70), random(1, M, 33)
    out, lhs, rhs = k_grouped(x, dout, jnp.array(sizes))
    assert_close(out, k_grouped_oracle(lhs, rhs, sizes, M))


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(256, 104, 4, share=2, multiply_scales=True),
        GemmConfig(128, 128, 5, share=2, band=16, multiply_scales=True),
        GemmConfig(128, 128, 4),
    ],
    ids=tiles.describe_config,
)
@pytest.mark.parametrize("n", [420, 421])
def test_tiles_of_large_k_grouped_products(config, n):
    """Tiles that small products do not get by themselves; of odd rows, those that TMA cannot store."""
    sizes = [700, 0, 128, 1, 300]
    x, dout = random(0, 1200, 520), random(1, 1200, n)
    with tiles.forced(dataclasses.replace(config, masked_store=config.num_waves == 1)):  # high ones would spill
        out, lhs, rhs = k_grouped(x, dout, jnp.array(sizes))
    assert_close(out, k_grouped_oracle(lhs, rhs, sizes, 1200))


HIGH_TILES = [
    GemmConfig(256, 128, 3, share=2),
    GemmConfig(192, 128, 3, 3, share=2),
    GemmConfig(192, 128, 3, 3),
    GemmConfig(128, 192, 3),
    GemmConfig(64, 64, 6, 1, share=2),
]


@pytest.mark.skipif("mosaic" not in available_implementations(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("config", HIGH_TILES, ids=tiles.describe_config)
@pytest.mark.parametrize("n, out_dtype", [(420, jnp.bfloat16), (421, jnp.bfloat16), (640, jnp.float32)])
def test_tiles_of_large_products_of_groups(config, n, out_dtype):
    """Those that small products do not get by themselves; an odd number along n leaves a block without a partner."""
    sizes = [700, 0, 128, 1, 300]
    masked_m, bias = [min(size, 640) for size in sizes], random(3, GROUPS, n, scale=10)
    options = {"preferred_element_type": out_dtype, "implementation": "mosaic"}
    lhs, rhs = operands(1200, n, 700, groups=(GROUPS,))
    masks = jaxgemm.quantize(random(2, GROUPS, 640, 700))
    with tiles.forced(dataclasses.replace(config, masked_store=True)):
        contiguous = [np.asarray(jaxgemm.grouped_gemm(lhs, rhs, jnp.array(sizes), bias, **options)) for _ in range(10)]
        out = np.asarray(jaxgemm.masked_grouped_gemm(masks, rhs, jnp.array(masked_m), bias, **options))
    assert_close(contiguous[0], grouped_oracle(lhs, rhs, sizes, bias))
    assert not contiguous[0][sum(sizes) :].any()
    for again in contiguous[1:]:
        np.testing.assert_array_equal(again, contiguous[0])
    product = dequantized(masks) @ dequantized(rhs).transpose(0, 2, 1)
    for group, count in enumerate(masked_m):
        assert not out[group, count:].any()
        if count:
            assert_close(out[group, :count], product[group, :count] + np.asarray(bias)[group])


def test_k_grouped_takes_unpadded_segments_too():
    """Operands that `quantize` made have their groups one after the other, and blocks may straddle them."""
    lhs, rhs = operands(30, 20, 300, rhs_block=ROW)
    sizes, start = [100, 0, 57, 143], 0
    out = jaxgemm.k_grouped_gemm(lhs, rhs, jnp.array(sizes))
    for group, size in enumerate(sizes):
        cols = slice(start, start + size)
        assert_close(out[group], dequantized(lhs)[:, cols] @ dequantized(rhs)[:, cols].T)
        start += size


def test_no_rows_at_all():
    """A device of a mesh, or an expert's share of a batch, may have none: products are empty, gradients zero."""
    sizes, before = jnp.array([0, 2, 1]), random(2, 3, 70, 33)
    out, _, _ = k_grouped(random(0, 0, 70), random(1, 0, 33), sizes)
    assert out.shape == (3, 70, 33) and not out.any()
    lhs, rhs = (jaxgemm.quantize_grouped(random(i, 0, n), sizes) for i, n in ((0, 70), (1, 33)))
    np.testing.assert_array_equal(jaxgemm.k_grouped_gemm(lhs, rhs, sizes, accumulate=before), before)

    def total(x, w, bias):
        return jaxgemm.grouped_fp8_dot(x, w, sizes, bias).sum()

    x, w, bias = random(3, 0, 40), random(4, 3, 40, 24), random(5, 3, 24)
    gradients = jax.grad(total, argnums=(0, 1, 2))(x, w, bias)
    assert [g.shape for g in gradients] == [x.shape, w.shape, bias.shape]
    assert not any(g.any() for g in gradients)


def test_k_grouped_accumulates():
    x, dout, sizes = random(0, M, 70), random(1, M, 33), jnp.array(SIZES[3])
    out, lhs, rhs = k_grouped(x, dout, sizes)
    before = random(2, GROUPS, 70, 33)
    step = jax.jit(lambda total: jaxgemm.k_grouped_gemm(lhs, rhs, sizes, accumulate=total), donate_argnums=0)
    np.testing.assert_allclose(step(before.copy()), before + out, rtol=1e-5, atol=1e-4)


def test_group_sizes_do_not_recompile():
    lhs, rhs = operands(M, N, K, groups=(GROUPS,))
    traces = []

    @jax.jit
    def step(lhs, rhs, sizes):
        traces.append(1)
        return jaxgemm.grouped_gemm(lhs, rhs, sizes)

    for sizes in SIZES:
        step(lhs, rhs, jnp.array(sizes))
    assert len(traces) == 1


def lhs_rhs():
    return operands(12, 9, 40, groups=(3,))


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda x, w: jaxgemm.grouped_gemm(x, w, jnp.ones(2, int)), r"must be \[g\] = \[3\], got shape \[2\]"),
        (ValueError, lambda x, w: jaxgemm.grouped_gemm(x, w, jnp.ones((3, 1), int)), r"group_sizes must be \[g\] = \[3\]"),
        (TypeError, lambda x, w: jaxgemm.grouped_gemm(x, w, jnp.ones(3)), "group_sizes must be an integer array, got float"),
        (TypeError, lambda x, w: jaxgemm.grouped_gemm(x, w, [4, 4, 4]), "group_sizes must be an integer array, got list"),
        (ValueError, lambda x, w: jaxgemm.grouped_gemm(x, w, jnp.ones(3, int), jnp.ones(9)), r"bias must be \[g, n\]"),
        (ValueError, lambda x, w: jaxgemm.grouped_gemm(w, w, jnp.ones(3, int)), r"lhs must be \[m, k\], got shape \[3, 9, 40\]"),
        (ValueError, lambda x, w: jaxgemm.masked_grouped_gemm(x, w, jnp.ones(3, int)), r"lhs must be \[g, m, k\]"),
        (ValueError, lambda x, w: jaxgemm.masked_grouped_gemm(w, w, jnp.ones(2, int)), r"masked_m must be \[g\] = \[3\]"),
        (ValueError, lambda x, w: k_masked_gemm(w, w, jnp.ones(2, int)), r"masked_k must be \[g\] = \[3\]"),
        (ValueError, lambda x, w: jaxgemm.masked_grouped_gemm(w, w, jnp.ones(3, int), fill="nan"), "fill must be one of 'zero'"),
        (ValueError, lambda x, w: jaxgemm.masked_grouped_gemm(w, w, jnp.ones(3, int), expected_m=-1), "expected_m must be"),
        (ValueError, lambda x, w: jaxgemm.k_grouped_gemm(x, w, jnp.ones(3, int)), r"rhs must be \[n, k\]"),
        (
            TypeError,
            lambda x, w: jaxgemm.k_grouped_gemm(x, x, jnp.ones(3, int), accumulate=jnp.ones((3, 12, 12), jnp.bfloat16)),
            "accumulate must be float32, got bfloat16",
        ),
        (
            ValueError,
            lambda x, w: jaxgemm.k_grouped_gemm(x, x, jnp.ones(3, int), accumulate=jnp.ones((12, 12))),
            r"accumulate must be \[g, m, n\] = \[3, 12, 12\], got \[12, 12\]",
        ),
        (
            ValueError,
            lambda x, w: jaxgemm.k_grouped_gemm(
                jaxgemm.quantize(jnp.ones((4, 512))), jaxgemm.quantize_grouped(jnp.ones((258, 4)), jnp.ones(2, int)),
                jnp.ones(2, int),
            ),
            "lhs and rhs must lay their groups out alike",
        ),
    ],
)  # fmt: skip
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call(*lhs_rhs())


# What the interpreter of kernels does not model, and a GPU shows: where copies may start, and where they are cut off.
several = pytest.mark.skipif(
    len(available_implementations("grouped")) < 2, reason="this machine has one implementation"
)
ENDS = [(40, ROW, f32), (64, SQUARE, f32), (37, SQUARE, {}), (516, SQUARE, {}), (520, SQUARE, f32)]


@several
@pytest.mark.parametrize("n, rhs_block, options", ENDS)
@pytest.mark.parametrize("sizes", [[7, 0, 33, 2, 0], [30, 1, 64, 54, 1]])
def test_contiguous_implementations_agree(n, rhs_block, options, sizes):
    lhs, rhs = operands(M, n, K, groups=(GROUPS,), rhs_block=rhs_block)
    bias = random(3, GROUPS, n)
    for implementation in available_implementations("grouped"):
        for addend in (None, bias):
            keywords = {"implementation": implementation} | options
            out = jaxgemm.grouped_gemm(lhs, rhs, jnp.array(sizes), addend, **keywords)
            assert_close(out, grouped_oracle(lhs, rhs, sizes, addend))
            assert not np.asarray(out, np.float32)[sum(sizes) :].any()


@several
@pytest.mark.parametrize("n, rhs_block, options", ENDS)
@pytest.mark.parametrize("max_m", [17, 300])
def test_masked_implementations_agree(n, rhs_block, options, max_m):
    counts = [7, 0, max_m]
    lhs = jaxgemm.quantize(random(0, 3, max_m, K))
    rhs = jaxgemm.quantize(random(1, 3, n, K), rhs_block)
    for implementation in available_implementations("masked"):
        keywords = {"implementation": implementation} | options
        out = np.asarray(jaxgemm.masked_grouped_gemm(lhs, rhs, jnp.array(counts), **keywords), np.float64)
        expected = dequantized(lhs) @ dequantized(rhs).swapaxes(1, 2)
        for group, count in enumerate(counts):
            assert difference(out[group, :count], expected[group, :count]) <= TIGHT
            assert not out[group, count:].any()
