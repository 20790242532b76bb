"""`jaxgemm.flax.linen`: Flax's own parameters, outputs and gradients near it, whole models switched."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nn = pytest.importorskip("flax.linen")

from flax_support import assert_trees_near, make_input, primitive_names  # noqa: E402

import jaxgemm  # noqa: E402
from jaxgemm.flax import linen as fp8_nn  # noqa: E402


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 130), (7,)])
def test_dense_has_flax_parameters_and_nearly_its_outputs(shape, use_bias):
    x = make_input(*shape)
    keywords = {"use_bias": use_bias, "bias_init": nn.initializers.normal(1.0)}
    ours, theirs = fp8_nn.Dense(70, **keywords), nn.Dense(70, **keywords)
    variables = ours.init(jax.random.key(1), x)
    reference = theirs.init(jax.random.key(1), x)
    assert jax.tree.structure(variables) == jax.tree.structure(reference)
    jax.tree.map(np.testing.assert_array_equal, variables, reference)
    y, expected = ours.apply(reference, x), theirs.apply(variables, x)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    assert_trees_near(y, expected)


def test_dense_has_all_of_flax_fields_with_their_defaults():
    defaults = {f.name: f.default for f in dataclasses.fields(fp8_nn.Dense)}
    for field in dataclasses.fields(nn.Dense):
        assert field.name in defaults
        if not callable(field.default):
            assert defaults[field.name] == field.default


@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_dense_promotes_dtypes_as_flax_does(input_dtype, dtype, param_dtype):
    x = make_input(3, 16, dtype=input_dtype)
    keywords = {"dtype": dtype, "param_dtype": param_dtype}
    with jax.numpy_dtype_promotion("standard"):
        expected, reference = nn.Dense(8, **keywords).init_with_output(jax.random.key(0), x)
        y, variables = fp8_nn.Dense(8, **keywords).init_with_output(jax.random.key(0), x)
    assert y.dtype == expected.dtype
    assert jax.tree.map(lambda a: a.dtype, variables) == jax.tree.map(lambda a: a.dtype, reference)


def test_dense_gradients_are_near_flax():
    x = make_input(24, 130)
    weights = make_input(24, 40, seed=3)
    variables = nn.Dense(40, bias_init=nn.initializers.normal(1.0)).init(jax.random.key(1), x)

    def loss(model, variables, x):
        return jnp.sum(weights * model.apply(variables, x))

    actual = jax.grad(functools.partial(loss, fp8_nn.Dense(40)), argnums=(0, 1))(variables, x)
    expected = jax.grad(functools.partial(loss, nn.Dense(40)), argnums=(0, 1))(variables, x)
    assert_trees_near(actual, expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_dense_applies_the_activation_after_the_bias(activation):
    x = make_input(6, 64)
    plain = nn.Dense(32, bias_init=nn.initializers.normal(2.0))
    variables = plain.init(jax.random.key(0), x)
    expected = getattr(jax.nn, activation)(plain.apply(variables, x))
    assert_trees_near(fp8_nn.Dense(32, activation=activation).apply(variables, x), expected)


def test_dense_with_a_dot_general_of_its_own_is_flax_dense():
    x = make_input(6, 64)
    model = fp8_nn.Dense(32, dot_general=jax.lax.dot_general)
    variables = model.init(jax.random.key(0), x)
    np.testing.assert_array_equal(model.apply(variables, x), nn.Dense(32).apply(variables, x))
    with pytest.raises(ValueError, match="activation must be None where dot_general"):
        model.clone(activation="relu").apply(variables, x)


def test_dense_passes_recipe_and_implementation_on():
    x = make_input(6, 64)
    variables = nn.Dense(32).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="implementation"):
        fp8_nn.Dense(32, implementation="abacus").apply(variables, x)
    rounded = fp8_nn.Dense(32, recipe=dataclasses.replace(jaxgemm.DEEPSEEK, power_of_two=True))
    assert np.any(rounded.apply(variables, x) != fp8_nn.Dense(32).apply(variables, x))


@pytest.mark.parametrize(
    "make",
    [
        lambda **product: nn.Dense(24, **product),
        lambda **product: nn.DenseGeneral((3, 8), axis=(-2, -1), **product),
        lambda **product: nn.DenseGeneral(8, axis=-1, batch_dims=(0,), **product),
    ],
    ids=["Dense", "DenseGeneral", "DenseGeneral with batch_dims"],
)
def test_fp8_dot_general_in_flax_layers(make):
    x = make_input(4, 5, 48)
    variables = make().init(jax.random.key(0), x)

    def loss(model, variables):
        return jnp.sum(jnp.square(model.apply(variables, x)))

    fp8 = make(dot_general=jaxgemm.fp8_dot_general)
    assert_trees_near(fp8.apply(variables, x), make().apply(variables, x))
    assert_trees_near(
        jax.grad(functools.partial(loss, fp8))(variables),
        jax.grad(functools.partial(loss, make()))(variables),
        0.1,
    )


def test_fp8_dot_general_in_attention_projections():
    x = make_input(2, 6, 32)
    plain = nn.MultiHeadDotProductAttention(num_heads=4)
    fp8 = plain.clone(qkv_dot_general=jaxgemm.fp8_dot_general, out_dot_general=jaxgemm.fp8_dot_general)
    variables = plain.init(jax.random.key(0), x)
    assert primitive_names(lambda x: fp8.apply(variables, x), x).count("fp8_gemm") == 4
    assert_trees_near(fp8.apply(variables, x), plain.apply(variables, x), 0.1)


class Block(nn.Module):
    """A model as a user wrote it: attention, a hidden layer, and a head."""

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x)
        x = nn.LayerNorm()(x)
        x = x + nn.Dense(x.shape[-1], name="hidden")(x)
        return nn.Dense(5, name="head")(x)


def test_interceptor_switches_a_model_and_leaves_what_the_filter_refuses():
    x = make_input(2, 6, 32)
    model = Block()
    variables = model.init(jax.random.key(0), x)
    seen = []

    def keep_head(path, layer):
        seen.append(path)
        return path[-1] != "head"

    def run(variables, x):
        with nn.intercept_methods(fp8_nn.fp8_interceptor(keep_head)):
            return model.apply(variables, x)

    names = primitive_names(run, variables, x)
    assert names.count("fp8_gemm") == 5  # query, key, value, out, hidden
    assert ("attention", "query") in seen and ("head",) in seen
    assert_trees_near(jax.jit(run)(variables, x), model.apply(variables, x), 0.1)
    assert "fp8_gemm" not in primitive_names(model.apply, variables, x)


def test_interceptor_makes_the_same_parameters():
    x = make_input(2, 6, 32)
    expected = Block().init(jax.random.key(0), x)
    with nn.intercept_methods(fp8_nn.fp8_interceptor()):
        actual = Block().init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_interceptor_leaves_layers_that_have_their_own_product():
    x = make_input(6, 32)
    for model in (nn.Dense(8, dot_general=jax.lax.dot_general), fp8_nn.Dense(8)):
        variables = model.init(jax.random.key(0), x)
        expected = model.apply(variables, x)
        with nn.intercept_methods(fp8_nn.fp8_interceptor(implementation="abacus")):
            np.testing.assert_array_equal(model.apply(variables, x), expected)


def test_interceptor_leaves_a_subclass_with_its_own_call():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    x = make_input(6, 32)
    variables = Doubled(8).init(jax.random.key(0), x)
    expected = Doubled(8).apply(variables, x)
    with nn.intercept_methods(fp8_nn.fp8_interceptor()):
        np.testing.assert_array_equal(Doubled(8).apply(variables, x), expected)


class PlainMlp(nn.Module):
    """What `Mlp` stands for, of Flax's own layers."""

    gated: bool
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        def dense(features, name):
            return nn.Dense(features, use_bias=self.use_bias, name=name, bias_init=nn.initializers.normal(1.0))

        if not self.gated:
            return dense(20, "down")(nn.gelu(dense(70, "up")(x)))
        return dense(20, "down")(nn.silu(dense(70, "gate")(x)) * dense(70, "up")(x))


@pytest.mark.parametrize("gated, use_bias, shape", [(True, False, (2, 3, 130)), (False, True, (24, 130))])
def test_mlp_has_flax_parameters_and_nearly_its_outputs_and_gradients(gated, use_bias, shape):
    x, weights = make_input(*shape), make_input(*shape[:-1], 20, seed=3)
    ours = fp8_nn.Mlp(
        70, 20, gated, "silu" if gated else "gelu", use_bias=use_bias, bias_init=nn.initializers.normal(1.0)
    )
    theirs = PlainMlp(gated, use_bias)
    variables, reference = (model.init(jax.random.key(1), x) for model in (ours, theirs))
    assert jax.tree.structure(variables) == jax.tree.structure(reference)
    jax.tree.map(np.testing.assert_array_equal, variables, reference)

    def loss(model, variables, x):
        return (model.apply(variables, x) * weights).sum()

    actual, expected = (
        jax.jit(jax.grad(functools.partial(loss, model), (0, 1)))(variables, x) for model in (ours, theirs)
    )
    assert_trees_near(actual, expected, 0.12)  # two quantised layers, one behind the other
    names = primitive_names(functools.partial(ours.apply, variables), x)
    assert names.count("fp8_gemm") == 2 + gated and "dot_general" not in names


def test_mlp_computes_in_dtype_and_keeps_its_parameters():
    x = make_input(3, 16)
    y, variables = fp8_nn.Mlp(8, dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert (y.shape, y.dtype) == ((3, 16), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(jnp.float32)}


def test_mlp_of_no_features_has_none():
    model = fp8_nn.Mlp(8, features=0, kernel_init=nn.initializers.zeros)
    assert model.init_with_output(jax.random.key(0), make_input(3, 16))[0].shape == (3, 0)
