import functools

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
    dequantized,
    difference,
    group_rows,
    random,
)

import jaxgemm
from jaxgemm import DEEPSEEK, Recipe, quantize

GRADIENT_LOOSE = 2e-3
"""Bound on a gradient against float32: two quantised operands, as in the product, of more spread-out numbers."""

SHAPES = [(7, 7, 7), (1, 9, 300), (33, 200, 200), (130, 40, 576), (200, 130, 130)]


def quantised_gradients(x, w, dout, recipe=DEEPSEEK):
    """dlhs, drhs and dbias of the very same quantised maths, in float64 numpy."""
    kind = {"power_of_two": recipe.power_of_two}
    dout_n = dequantized(quantize(dout, recipe.dout_block_shape, recipe.dout_dtype, **kind))
    w_k = dequantized(quantize(w, recipe.rhs_block_shape, recipe.rhs_dtype, **kind))
    x_t = dequantized(quantize(x.T, ROW, recipe.lhs_dtype, **kind))
    dout_t = dequantized(quantize(dout.T, ROW, recipe.dout_dtype, **kind))
    if recipe.wgrad_dtype == "bf16":
        x_t, dout_t = (np.asarray(a.T.astype(jnp.bfloat16), np.float64) for a in (x, dout))
    return dout_n @ w_k.T, x_t @ dout_t.T, np.asarray(dout, np.float64).sum(0)


@pytest.mark.parametrize(
    "recipe, m, n, k",
    [(DEEPSEEK, *shape) for shape in SHAPES]
    + [
        (Recipe(power_of_two=True, dout_dtype=E5M2), 130, 40, 576),
        (Recipe(wgrad_dtype="bf16"), 33, 200, 200),
        (Recipe(rhs_block_shape=ROW, dout_block_shape=SQUARE, lhs_block_shape=SQUARE), 200, 130, 130),
    ],
)
def test_forward_and_gradients_are_the_quantised_maths(recipe, m, n, k, implementation):
    """Also for k == n, where a wrong transpose has the right shape."""
    x, w, bias, dout = random(0, m, k), random(1, k, n), random(2, n), random(3, m, n)
    function = functools.partial(jaxgemm.fp8_dot, recipe=recipe, implementation=implementation)
    out, pull_back = jax.vjp(function, x, w, bias)
    lhs = quantize(x, recipe.lhs_block_shape, recipe.lhs_dtype, power_of_two=recipe.power_of_two)
    rhs = quantize(w.T, recipe.rhs_block_shape, recipe.rhs_dtype, power_of_two=recipe.power_of_two)
    assert_close(out, dequantized(lhs) @ dequantized(rhs).T + np.asarray(bias))
    for got, want in zip(jax.jit(pull_back)(dout), quantised_gradients(x, w, dout, recipe), strict=True):
        assert_close(got, want)
    np.testing.assert_array_equal(function(x, w, bias), out)


@pytest.mark.parametrize("m, n, k", [(64, 128, 256), (200, 256, 256)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_gradients_are_near_float32(m, n, k, activation):
    x, w, bias = random(0, m, k), random(1, k, n) / k**0.5, random(2, n)

    def loss(dot, x, w, bias):
        return (dot(x, w, bias) ** 2).sum()

    def exact(x, w, bias):
        out = jnp.dot(x, w, precision="highest") + bias
        return {None: lambda x: x, "relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}[activation](out)

    fp8 = functools.partial(jaxgemm.fp8_dot, activation=activation)
    gradients = jax.jit(jax.grad(functools.partial(loss, fp8), (0, 1, 2)))(x, w, bias)
    for got, want in zip(gradients, jax.grad(functools.partial(loss, exact), (0, 1, 2))(x, w, bias), strict=True):
        assert difference(got, want) < GRADIENT_LOOSE


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("w_dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes_follow_the_inputs(dtype, w_dtype):
    x, w, bias = random(0, 5, 70, dtype=dtype), random(1, 70, 30, dtype=w_dtype), random(2, 30)
    out, pull_back = jax.vjp(jaxgemm.fp8_dot, x, w, bias)
    assert out.dtype == dtype
    assert [g.dtype for g in pull_back(out)] == [dtype, w_dtype, jnp.float32]
    assert jaxgemm.fp8_dot(x, w, preferred_element_type=jnp.float32).dtype == jnp.float32
    assert difference(out, np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(bias)) < 2 * LOOSE


@settings(deadline=None, max_examples=4)
@given(lead=st.lists(st.integers(0, 4), max_size=3), n=st.integers(1, 140), k=st.integers(1, 200))
def test_any_leading_axes(lead, n, k):
    x, w, bias = random(0, *lead, k), random(1, k, n), random(2, n)
    out, pull_back = jax.vjp(jaxgemm.fp8_dot, x, w, bias)
    assert out.shape == (*lead, n)
    assert [g.shape for g in pull_back(out)] == [x.shape, w.shape, bias.shape]
    flat = jaxgemm.fp8_dot(x.reshape(-1, k), w, bias) if out.size else out
    np.testing.assert_allclose(out.reshape(flat.shape), flat, rtol=1e-6)


def test_the_residual_of_lhs_is_one_byte_an_element():
    """What is kept for the backward pass: lhs and the weight, both FP8, no float copy of either."""
    x, w = random(0, 256, 512, dtype=jnp.bfloat16), random(1, 512, 384, dtype=jnp.bfloat16)
    residuals = jax.eval_shape(lambda x, w: jax.vjp(jaxgemm.fp8_dot, x, w)[1], x, w)
    sizes = {}
    for leaf in jax.tree.leaves(residuals):
        sizes.setdefault(str(leaf.dtype), []).append(leaf.size)
    assert sorted(sizes["float8_e4m3fn"]) == [256 * 512, 512 * 384]
    assert sizes.keys() <= {"float8_e4m3fn", "float32"}
    assert sum(sizes["float32"]) <= 512 * 2 + 4 * 3


def test_wgrad_sums_in_float32():
    """4096 equal products: a bfloat16 sum would stop growing at 256."""
    x, w = jnp.ones((4096, 8), jnp.bfloat16), jnp.ones((8, 8), jnp.float32)
    gradient = jax.grad(lambda w: jaxgemm.fp8_dot(x, w, preferred_element_type=jnp.float32).sum())(w)
    np.testing.assert_allclose(gradient, 4096.0, rtol=1e-6)


def test_a_quantised_weight_is_a_constant():
    x, w = random(0, 9, 200), random(1, 200, 70)
    q = jaxgemm.quantize_transposed(w, SQUARE)
    np.testing.assert_array_equal(jaxgemm.fp8_dot(x, q), jaxgemm.fp8_dot(x, w))
    dout = random(2, 9, 70)
    from_q, from_w = (jax.vjp(lambda x, w=w: jaxgemm.fp8_dot(x, w), x)[1](dout)[0] for w in (q, w))
    np.testing.assert_array_equal(from_q, from_w)


GROUPS, M, N, K = 4, 90, 40, 70


def per_group(function, x, w, bias, dout, slices):
    """Value and gradients of a grouped layer, one dense layer per group in turn."""
    out, dx = np.zeros(dout.shape), np.zeros(x.shape)
    dw, db = np.zeros(w.shape), np.zeros(bias.shape)
    for group, rows in slices:
        value, pull_back = jax.vjp(function, x[rows], w[group], bias[group])
        out[rows] = value
        dx[rows], dw[group], db[group] = pull_back(dout[rows])
    return out, dx, dw, db


@pytest.mark.parametrize(
    "sizes, activation, wgrad_dtype",
    [
        ([20, 30, 1, 39], None, "fp8"),
        ([0, 0, 90, 0], None, "fp8"),
        ([7, 0, 20, 13], "silu", "fp8"),
        ([0, 0, 0, 0], None, "fp8"),
        ([-3, 50, 100, 4], None, "fp8"),
        ([20, 30, 1, 39], "silu", "bf16"),
        ([7, 0, 20, 13], None, "bf16"),
    ],
)
def test_grouped_equals_a_dense_layer_per_group(sizes, activation, wgrad_dtype):
    """And rows past the last group, which hold NaN here, give and get zeros."""
    recipe = Recipe(wgrad_dtype=wgrad_dtype)
    x, w, bias, dout = random(0, M, K), random(1, GROUPS, K, N), random(2, GROUPS, N), random(3, M, N)
    rows = sum(end - start for _, start, end in group_rows(sizes, M))
    x, dout = x.at[rows:].set(jnp.nan), dout.at[rows:].set(jnp.nan)
    keywords = {"activation": activation, "recipe": recipe}

    @jax.jit
    def run(sizes):
        function = functools.partial(jaxgemm.grouped_fp8_dot, group_sizes=sizes, **keywords)
        out, pull_back = jax.vjp(lambda x, w, b: function(x, w, bias=b), x, w, bias)
        return out, *pull_back(dout)

    slices = [(g, slice(start, end)) for g, start, end in group_rows(sizes, M)]
    expected = per_group(functools.partial(jaxgemm.fp8_dot, **keywords), x, w, bias, dout, slices)
    for got, want in zip(run(jnp.array(sizes)), expected, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("counts", [[17] * 4, [0, 1, 17, 8], [-5, 100, 2, 0]])
@pytest.mark.parametrize("activation, wgrad_dtype", [(None, "bf16"), ("gelu", "fp8")])
def test_masked_equals_a_dense_layer_per_group(counts, activation, wgrad_dtype):
    keywords = {"activation": activation, "recipe": Recipe(wgrad_dtype=wgrad_dtype)}
    x, w, bias, dout = (
        random(0, GROUPS, 17, K),
        random(1, GROUPS, K, N),
        random(2, GROUPS, N),
        random(3, GROUPS, 17, N),
    )
    valid = (jnp.arange(17) < jnp.array(counts)[:, None])[..., None]
    x, dout = (jnp.where(valid, a, jnp.nan) for a in (x, dout))

    @jax.jit
    def run(counts):
        out, pull_back = jax.vjp(
            lambda x, w, b: jaxgemm.masked_grouped_fp8_dot(x, w, counts, b, **keywords), x, w, bias
        )
        return out, *pull_back(dout)

    slices = [(g, np.s_[g, : max(count, 0)]) for g, count in enumerate(counts)]
    expected = per_group(functools.partial(jaxgemm.fp8_dot, **keywords), x, w, bias, dout, slices)
    for got, want in zip(run(jnp.array(counts)), expected, strict=True):
        assert_close(got, want)


DIMENSIONS = [
    ((4, 7), (7, 5), (((1,), (0,)), ((), ()))),
    ((4, 7), (5, 7), (((1,), (1,)), ((), ()))),
    ((7, 4), (7, 5), (((0,), (0,)), ((), ()))),
    ((2, 3, 7), (7, 5), (((2,), (0,)), ((), ()))),
    ((2, 3, 7, 6), (7, 6, 5, 4), (((2, 3), (0, 1)), ((), ()))),
    ((2, 3, 7, 6), (6, 5, 7), (((3, 2), (0, 2)), ((), ()))),
    ((3, 4, 7), (3, 7, 5), (((2,), (1,)), ((0,), (0,)))),
    ((4, 3, 7, 2), (2, 7, 5, 3), (((2,), (1,)), ((1, 3), (3, 0)))),
    ((3, 4), (3, 5), (((), ()), ((0,), (0,)))),
    ((7,), (7,), (((0,), (0,)), ((), ()))),
    ((0, 7), (7, 5), (((1,), (0,)), ((), ()))),
]


@pytest.mark.parametrize("lhs_shape, rhs_shape, numbers", DIMENSIONS)
def test_dot_general_takes_what_lax_takes(lhs_shape, rhs_shape, numbers):
    """On small integers FP8 is exact, and so must equal lax.dot_general; so must its gradients."""
    lhs = jnp.round(random(0, *lhs_shape) * 2).clip(-7, 7)
    rhs = jnp.round(random(1, *rhs_shape) * 2).clip(-7, 7)
    recipe = Recipe(power_of_two=True)
    fp8 = functools.partial(jaxgemm.fp8_dot_general, dimension_numbers=numbers, recipe=recipe)
    lax = functools.partial(jax.lax.dot_general, dimension_numbers=numbers, precision="highest")
    dout = jnp.round(random(2, *jax.eval_shape(lax, lhs, rhs).shape)).clip(-7, 7)

    def run(function):
        out, pull_back = jax.vjp(function, lhs, rhs)
        return out, *pull_back(dout)

    for got, want in zip(jax.jit(lambda: run(fp8))(), jax.jit(lambda: run(lax))(), strict=True):
        np.testing.assert_array_equal(got, want)


x2, w2 = jnp.ones((4, 7)), jnp.ones((7, 5))
sizes2 = jnp.array([2, 2])


@pytest.mark.parametrize(
    "error, call, message",
    [
        (
            ValueError,
            lambda: jaxgemm.fp8_dot(x2, jnp.ones((8, 5))),
            r"lhs must be \[..., k\] = \[..., 8\] .* got \[4, 7\]",
        ),
        (ValueError, lambda: jaxgemm.fp8_dot(x2, jnp.ones(7)), r"rhs must be \[k, n\], got shape \[7\]"),
        (ValueError, lambda: jaxgemm.fp8_dot(jnp.ones(()), w2), r"lhs must be \[..., k\], got shape \[\]"),
        (
            TypeError,
            lambda: jaxgemm.fp8_dot(x2.astype(int), w2),
            "lhs.dtype must be bfloat16, float16 or float32, got int",
        ),
        (TypeError, lambda: jaxgemm.fp8_dot(np.ones((4, 7)), w2), "lhs.dtype must be .* got float64"),
        (TypeError, lambda: jaxgemm.fp8_dot(x2, w2.astype(E4M3)), "rhs.dtype must be .* got float8_e4m3fn"),
        (ValueError, lambda: jaxgemm.fp8_dot(x2, w2, jnp.ones(7)), r"bias must be \[n\] = \[5\], got \[7\]"),
        (
            ValueError,
            lambda: jaxgemm.fp8_dot(x2, w2, activation="swish"),
            "activation must be one of .* got 'swish'",
        ),
        (
            ValueError,
            lambda: jaxgemm.fp8_dot(x2, w2, implementation="x"),
            "implementation must be one of .* got 'x'",
        ),
        (
            TypeError,
            lambda: jaxgemm.fp8_dot(x2, w2, recipe="deepseek"),
            "recipe must be a jaxgemm.Recipe, got str",
        ),
        (
            TypeError,
            lambda: jaxgemm.fp8_dot(x2, w2, preferred_element_type=int),
            "preferred_element_type must be",
        ),
        (
            ValueError,
            lambda: jaxgemm.grouped_fp8_dot(x2, w2, sizes2),
            r"rhs must be \[g, k, n\], got shape \[7, 5\]",
        ),
        (
            ValueError,
            lambda: jaxgemm.grouped_fp8_dot(x2, jnp.ones((3, 7, 5)), sizes2),
            r"group_sizes must be \[g\] = \[3\]",
        ),
        (
            TypeError,
            lambda: jaxgemm.grouped_fp8_dot(x2, jnp.ones((2, 7, 5)), sizes2 * 1.0),
            "group_sizes must be an integer",
        ),
        (
            ValueError,
            lambda: jaxgemm.masked_grouped_fp8_dot(x2, jnp.ones((2, 7, 5)), sizes2),
            r"lhs must be \[g, m, k\]",
        ),
        (
            ValueError,
            lambda: jaxgemm.fp8_dot_general(x2, w2, (((1,), (1,)), ((), ()))),
            "contracting dimensions must have",
        ),
        (
            ValueError,
            lambda: jaxgemm.fp8_dot_general(x2, w2, (((2,), (0,)), ((), ()))),
            "dimension_numbers of lhs must be",
        ),
        (ValueError, lambda: jaxgemm.fp8_dot_general(x2, w2, ((1,), (0,))), "dimension_numbers must be "),
        (ValueError, lambda: Recipe(lhs_block_shape=(1, 64)), "lhs_block_shape must be"),
        (
            TypeError,
            lambda: Recipe(dout_dtype=jnp.bfloat16),
            "dout_dtype must be float8_e4m3fn or float8_e5m2, got bfloat16",
        ),
        (ValueError, lambda: Recipe(wgrad_dtype="fp16"), "wgrad_dtype must be 'fp8' or 'bf16', got 'fp16'"),
    ],
)
def test_errors(error, call, message):
    with pytest.raises(error, match=message), jax.numpy_dtype_promotion("standard"):
        call()


def test_sizes_of_a_dtype_too_narrow_for_all_rows():
    x, w = random(0, 300, 8), random(1, 3, 8, 4)
    sizes = jnp.array([100, 50, 120])
    for dtype in (jnp.int8, jnp.uint8):
        expected, found = (
            jax.value_and_grad(lambda w, s: (jaxgemm.grouped_fp8_dot(x, w, s) ** 2).sum())(w, given)
            for given in (sizes, sizes.astype(dtype))
        )
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numpy_sizes_wider_than_int32_count_as_all_rows():
    x, w = jnp.ones((3, 8)), jnp.ones((2, 8, 4))
    assert jaxgemm.grouped_fp8_dot(x, w, np.array([2**40, 1]))[:, 0].tolist() == [8, 8, 8]
    assert jaxgemm.quantize_grouped(x, np.array([2, 1])).shape == (8, 256)
    masked = jaxgemm.masked_grouped_fp8_dot(jnp.ones((2, 3, 8)), w, np.array([5 - 2**33, 2]))
    assert masked[:, :, 0].tolist() == [[0, 0, 0], [8, 8, 0]]


@pytest.mark.parametrize("recipe", [DEEPSEEK, Recipe(wgrad_dtype="bf16")], ids=["fp8", "bf16"])
@pytest.mark.parametrize("x64", [False, True])
def test_under_strict_rules_of_promotion(x64, recipe):
    """No operand's dtype or number of axes is left to JAX to guess."""
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        x, w, bias = (jnp.ones(shape, jnp.float32) for shape in ((3, 9, 20), (3, 20, 6), (3, 6)))
        sizes = jnp.array([3, 0, 5], jnp.int32)
        options = {"recipe": recipe, "activation": "silu"}

        def loss(w, bias, sizes):
            dense = jaxgemm.fp8_dot(x[0], w[0], bias[0], **options)
            grouped = jaxgemm.grouped_fp8_dot(x[0], w, sizes, bias, **options)
            masked = jaxgemm.masked_grouped_fp8_dot(x, w, sizes, bias, **options)
            return dense.sum() + grouped.sum() + masked.sum()

        expected = jax.grad(loss, (0, 1))(w, bias, sizes)
        for dtype in (jnp.uint8, jnp.uint32):
            found = jax.grad(loss, (0, 1))(w, bias, sizes.astype(dtype))
            jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("block", [(1, 200), (1, 128), (128, 128), (33, 200)], ids=str)
def test_a_quantised_weight_of_any_blocks_has_gradients_beside_it(block):
    """Of lhs and of the bias; blocks of one row do not turn with the weight, which is then quantised anew."""
    x, bias, weight = random(0, 4, 200), random(1, 33), quantize(random(2, 33, 200), block)
    w = jaxgemm.dequantize(weight).T

    def loss(dot, x, bias):
        return (dot(x, bias) ** 2).sum()

    found = jax.grad(lambda *args: loss(lambda x, b: jaxgemm.fp8_dot(x, weight, b), *args), (0, 1))(x, bias)
    expected = jax.grad(lambda *args: loss(lambda x, b: x @ w + b, *args), (0, 1))(x, bias)
    for one, other in zip(found, expected, strict=True):
        assert jnp.linalg.norm(one - other) < 0.15 * jnp.linalg.norm(other)


def test_arguments_that_look_right():
    lhs, rhs = quantize(jnp.ones((2, 3, 8))), quantize(jnp.ones((2, 4, 8)))
    assert jaxgemm.masked_grouped_gemm(lhs, rhs, jnp.array([1, 2]), expected_m=np.int64(2)).shape == (2, 3, 4)
    with pytest.raises(TypeError, match="preferred_element_type must be bfloat16, float16 or float32, got None"):
        jaxgemm.gemm(quantize(jnp.ones((3, 8))), quantize(jnp.ones((4, 8))), preferred_element_type=None)
    with pytest.raises(ValueError, match=r"lhs_block_shape must be \(1, 128\) or \(128, 128\), got 128"):
        Recipe(lhs_block_shape=128)
    with pytest.raises(TypeError, match="power_of_two must be True or False, got 'no'"):
        Recipe(power_of_two="no")
    assert jax.vmap(jaxgemm.fp8_dot, (0, None))(jnp.ones((0, 9, 200)), jnp.ones((200, 3))).shape == (0, 9, 3)
