"""The public functions under JAX's transformations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROW, SAME, SQUARE, assert_close, operands, oracle, random

import jaxgemm
from jaxgemm.gemm import k_masked_gemm

f32 = {"preferred_element_type": jnp.float32}
B, M, N, K = 3, 9, 33, 200


def in_turn(function, args, axes):
    """What vmap must give: a loop."""
    slices = [
        [x if a is None else jax.tree.map(lambda x, i=i: x[i], x) for x, a in zip(args, axes, strict=True)]
        for i in range(B)
    ]
    return jnp.stack([function(*s) for s in slices])


@pytest.mark.parametrize("batched", [c for c in itertools.product([0, None], repeat=3) if any(a == 0 for a in c)])
@pytest.mark.parametrize("lhs_block, rhs_block", [(ROW, SQUARE), (ROW, ROW), (SQUARE, SQUARE)])
def test_vmap_of_gemm(batched, lhs_block, rhs_block):
    lhs, rhs = (
        jaxgemm.quantize(random(0, B, M, K), lhs_block),
        jaxgemm.quantize(random(1, B, N, K), rhs_block),
    )
    args = [
        x if a == 0 else jax.tree.map(lambda x: x[0], x)
        for x, a in zip((lhs, rhs, random(2, B, N)), batched, strict=True)
    ]
    function = functools.partial(jaxgemm.gemm, activation="relu", **f32)
    assert_close(jax.vmap(function, batched)(*args), in_turn(function, args, batched))


def test_vmap_along_another_axis_and_nested():
    x, w = random(0, M, B, 2, K), random(1, K, N)
    nested = jax.vmap(jax.vmap(jaxgemm.fp8_dot, (1, None), 1), (1, None), 1)(x, w)
    assert_close(nested.reshape(-1, N), jaxgemm.fp8_dot(x.reshape(-1, K), w))


GROUPS = 4
SIZES = jnp.array([[2, 0, 5, 1], [9, 0, 0, 0], [0, 3, 3, 3]])


@pytest.mark.parametrize("batched", [(0, 0, 0), (None, 0, None), (0, None, None), (None, None, 0)])
@pytest.mark.parametrize("name", ["grouped_gemm", "masked_grouped_gemm", "k_grouped_gemm", "k_masked_gemm"])
def test_vmap_of_groups(name, batched):
    lhs = jaxgemm.quantize(random(0, B, *([GROUPS] if "masked" in name else []), M, K))
    rhs = jaxgemm.quantize(random(1, B, *([] if name == "k_grouped_gemm" else [GROUPS]), N, K))
    args = [x if a == 0 else jax.tree.map(lambda x: x[0], x) for x, a in zip((lhs, rhs, SIZES), batched, strict=True)]
    function = functools.partial(getattr(jaxgemm, name, k_masked_gemm), **f32)
    assert_close(jax.vmap(function, batched)(*args), in_turn(function, args, batched))


@pytest.mark.parametrize("batched", [(0, 0, 0), (None, 0, None), (0, None, 0)])
def test_vmap_of_gradients(batched):
    args = [random(0, B, M, K), random(1, B, K, N), random(2, B, N)]
    args = [x if a == 0 else x[0] for x, a in zip(args, batched, strict=True)]
    for argnum in range(3):
        gradient = jax.grad(lambda x, w, b: (jaxgemm.fp8_dot(x, w, b, activation="gelu") ** 2).sum(), argnum)
        assert_close(jax.vmap(gradient, batched)(*args), in_turn(gradient, args, batched))


def layers(w, x, checkpoint):
    def layer(x, w):
        return jaxgemm.fp8_dot(x, w, activation="gelu"), None

    return (jax.lax.scan(checkpoint(layer), x, w)[0] ** 2).sum()


def test_scan_and_checkpoint():
    w, x = random(0, 4, K, K) / K**0.5, random(1, M, K)
    plain = jax.jit(jax.grad(functools.partial(layers, checkpoint=lambda f: f)))(w, x)
    for policy in (None, jax.checkpoint_policies.save_only_these_names("jaxgemm_lhs", "jaxgemm_rhs")):
        remade = jax.jit(
            jax.grad(functools.partial(layers, checkpoint=functools.partial(jax.checkpoint, policy=policy)))
        )
        assert_close(remade(w, x), plain, 1e-6)


def test_named_residuals_can_be_kept_or_dropped():
    w, x = random(0, K, K), random(1, M, K)

    def quantisations(policy):
        """How often the backward pass must quantise, the forward pass apart."""
        f = jax.checkpoint(lambda w, x: jaxgemm.fp8_dot(x, w).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f))(w, x)).count("fp8_quantize[")

    names = ("jaxgemm_lhs", "jaxgemm_rhs", "jaxgemm_pre_activation")
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    assert quantisations(keep) < quantisations(jax.checkpoint_policies.nothing_saveable)


def test_a_scan_over_stacked_quantised_weights():
    w = random(0, 3, K, K) / K**0.5
    stacked = jax.vmap(lambda w: jaxgemm.quantize_transposed(w, SQUARE))(w)
    x = random(1, M, K)
    out, _ = jax.lax.scan(lambda x, w: (jaxgemm.fp8_dot(x, w), None), x, stacked)
    expected = functools.reduce(jaxgemm.fp8_dot, w, x)
    assert_close(out, expected, 1e-6)


@pytest.mark.parametrize("transform", [jax.jvp, jax.linearize])
def test_forward_mode_is_refused_clearly(transform):
    x, w = random(0, M, K), random(1, K, N)

    def forward():
        if transform is jax.jvp:
            return jax.jvp(lambda x: jaxgemm.fp8_dot(x, w), (x,), (x,))
        return jax.linearize(lambda x: jaxgemm.fp8_dot(x, w), x)[1](x)

    with pytest.raises(TypeError, match="custom_vjp"):
        forward()


@pytest.mark.parametrize("call", [jaxgemm.quantize, lambda x: jaxgemm.gemm(jaxgemm.quantize(x), jaxgemm.quantize(x))])
def test_quantised_level_says_where_the_derivatives_are(call):
    def loss(x):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(call(x)))

    with pytest.raises(NotImplementedError, match="fp8_quantize has no derivative.*jaxgemm.fp8_dot"):
        jax.grad(loss)(random(0, M, K))
    jax.grad(lambda x: loss(jax.lax.stop_gradient(x)) + x.sum())(random(0, M, K))


def test_disable_jit_and_debug_nans():
    lhs, rhs = operands(M, N, K)
    with jax.disable_jit(), jax.debug_nans(True):
        assert_close(jaxgemm.gemm(lhs, rhs, **f32), oracle(lhs, rhs))


def test_debug_nans_sees_none_but_the_callers_own():
    """Padding, masked rows and zero blocks make no NaN on the way; a NaN of the caller is found."""
    x, w = random(0, 2, M, K).at[0].set(0), random(1, 2, K, N)

    def loss(x, w):
        return (jaxgemm.masked_grouped_fp8_dot(x, w, jnp.array([0, 5]), activation="silu") ** 2).sum()

    with jax.debug_nans(True):
        jax.tree.map(lambda g: g.block_until_ready(), jax.jit(jax.grad(loss, (0, 1)))(x, w))
        with pytest.raises(FloatingPointError):
            jaxgemm.fp8_dot(x[1].at[0, 0].set(jnp.nan), w[0]).block_until_ready()


def test_disable_jit_of_gradients():
    x, w = random(0, M, K), random(1, K, N)
    gradient = jax.grad(lambda x, w: (jaxgemm.fp8_dot(x, w, activation="gelu") ** 2).sum(), (0, 1))
    expected = gradient(x, w)
    with jax.disable_jit():
        for a, b in zip(gradient(x, w), expected, strict=True):
            assert_close(a, b, SAME)


def test_nested_vmap_of_gradients_over_different_operands():
    x, w, bias = random(0, 2, M, K), random(1, 3, K, N), random(2, N)
    gradient = jax.grad(lambda x, w, b: (jaxgemm.fp8_dot(x, w, b) ** 2).sum(), (0, 1, 2))
    nested = jax.vmap(jax.vmap(gradient, (None, 0, None)), (0, None, None))(x, w, bias)
    for i, j in itertools.product(range(2), range(3)):
        for a, b in zip(jax.tree.map(lambda g, i=i, j=j: g[i, j], nested), gradient(x[i], w[j], bias), strict=True):
            assert_close(np.atleast_1d(a), np.atleast_1d(b), SAME)


def test_x64_mode():
    with jax.enable_x64(True):
        lhs, rhs = operands(M, N, K, groups=(2,))
        out = jaxgemm.grouped_gemm(lhs, rhs, jnp.array([2**40, 1]), **f32)
        assert_close(out, oracle(lhs, jax.tree.map(lambda x: x[0], rhs)))
        x, w = random(0, M, K), random(1, K, N)
        gradient = jax.grad(lambda x: jaxgemm.fp8_dot(x, w, activation="silu").sum())(x)
        assert gradient.dtype == jnp.float32


def test_ahead_of_time_and_export_for_cpu():
    x, w = random(0, M, K), random(1, K, N)
    function = jax.jit(lambda x, w: jax.grad(lambda x: jaxgemm.fp8_dot(x, w).sum())(x))
    expected = function(x, w)
    np.testing.assert_array_equal(function.lower(x, w).compile()(x, w), expected)
    exported = jax.export.deserialize(jax.export.export(function)(x, w).serialize())
    np.testing.assert_array_equal(exported.call(x, w), expected)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (None, None, 0), (0, 0, None)], ids=str)
@pytest.mark.parametrize("kind", ["dense", "grouped", "masked"])
def test_vmap_of_gradients_with_weight_gradients_in_bfloat16(kind, axes):
    """Of any operand alone; sizes are shared. XLA on a CPU has no product of bfloat16 with some of these axes."""
    sizes, recipe = jnp.array([4, 0, 3]), jaxgemm.Recipe(wgrad_dtype="bf16")
    functions = {
        "dense": lambda x, w, b: jaxgemm.fp8_dot(x[0], w[0], b[0], recipe=recipe),
        "grouped": lambda x, w, b: jaxgemm.grouped_fp8_dot(x[0], w, sizes, b, recipe=recipe),
        "masked": lambda x, w, b: jaxgemm.masked_grouped_fp8_dot(x, w, sizes, b, recipe=recipe),
    }
    gradient = jax.grad(lambda *args: (functions[kind](*args) ** 2).sum(), 1)
    shapes = (3, M, K), (3, K, N), (3, N)
    args = [
        random(i, *([B] if axis == 0 else []), *shape) for i, (shape, axis) in enumerate(zip(shapes, axes, strict=True))
    ]
    assert_close(jax.block_until_ready(jax.vmap(gradient, axes)(*args)), in_turn(gradient, args, axes))


@pytest.mark.parametrize("axes", [c for c in itertools.product([0, None], repeat=4) if any(a == 0 for a in c)], ids=str)
def test_vmap_of_weight_gradients_of_groups_in_bfloat16_whatever_is_batched(axes):
    """Also where dout is batched and depends on nothing that is, as that of a plain sum."""

    def gradient(x, w, bias, sizes):
        dot = functools.partial(jaxgemm.grouped_fp8_dot, recipe=jaxgemm.Recipe(wgrad_dtype="bf16"))
        return jax.grad(lambda w: dot(x, w, sizes, bias).sum())(w)

    batches = random(0, B, M, K), random(1, B, GROUPS, K, N), random(2, B, GROUPS, N), SIZES
    args = [x if axis == 0 else x[0] for x, axis in zip(batches, axes, strict=True)]
    assert_close(jax.vmap(gradient, axes)(*args), in_turn(gradient, args, axes))


def test_nested_vmap_of_weight_gradients_of_groups_in_bfloat16():
    x, w = random(0, 2, M, B, K), random(1, GROUPS, K, N)

    def gradient(x, sizes):
        dot = functools.partial(jaxgemm.grouped_fp8_dot, recipe=jaxgemm.Recipe(wgrad_dtype="bf16"))
        return jax.grad(lambda w: (dot(x, w, sizes) ** 2).sum())(w)

    nested = jax.jit(jax.vmap(jax.vmap(gradient, (1, 0)), (0, None)))(x, SIZES)
    for i in range(2):
        assert_close(nested[i], in_turn(gradient, (x[i].swapaxes(0, 1), SIZES), (0, 0)))
