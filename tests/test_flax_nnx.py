"""`jaxgemm.flax.nnx`: Flax's own parameters, outputs and gradients near it, whole models switched."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

from flax_support import assert_trees_near, make_input, primitive_names  # noqa: E402

import jaxgemm  # noqa: E402
from jaxgemm.flax import nnx as fp8_nnx  # noqa: E402


def make_pair(in_features, out_features, **keywords):
    """Our layer and Flax's, from the same keys."""
    keywords.setdefault("bias_init", nnx.initializers.normal(1.0))
    return tuple(
        layer(in_features, out_features, rngs=nnx.Rngs(0), **keywords) for layer in (fp8_nnx.Linear, nnx.Linear)
    )


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 130), (7,)])
def test_linear_has_flax_parameters_and_nearly_its_outputs(shape, use_bias):
    ours, theirs = make_pair(shape[-1], 70, use_bias=use_bias)
    actual, expected = (nnx.to_pure_dict(nnx.state(layer)) for layer in (ours, theirs))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    x = make_input(*shape)
    assert (ours(x).shape, ours(x).dtype) == (theirs(x).shape, theirs(x).dtype)
    assert_trees_near(ours(x), theirs(x))


def test_linear_takes_all_of_flax_arguments():
    ours = inspect.signature(fp8_nnx.Linear).parameters
    for name, parameter in inspect.signature(nnx.Linear).parameters.items():
        assert name in ours
        assert ours[name].kind == parameter.kind
        if name != "dot_general":
            assert ours[name].default == parameter.default


def test_state_of_one_updates_the_other():
    ours, theirs = make_pair(16, 8)
    fresh = nnx.Linear(16, 8, rngs=nnx.Rngs(7))
    nnx.update(ours, nnx.state(fresh))
    np.testing.assert_array_equal(ours.kernel[...], fresh.kernel[...])
    nnx.update(theirs, nnx.state(ours))
    np.testing.assert_array_equal(theirs.kernel[...], fresh.kernel[...])


@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("preferred_element_type", [None, jnp.float32, jnp.bfloat16])
def test_linear_promotes_dtypes_as_flax_does(input_dtype, dtype, param_dtype, preferred_element_type):
    x = make_input(3, 16, dtype=input_dtype)
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = make_pair(
            16, 8, dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred_element_type
        )
        assert ours(x).dtype == theirs(x).dtype
    assert ours.kernel.dtype == theirs.kernel.dtype


def test_linear_gradients_are_near_flax():
    ours, theirs = make_pair(130, 40)
    x, weights = make_input(24, 130), make_input(24, 40, seed=3)

    def loss(model, x):
        return jnp.sum(weights * model(x))

    actual, expected = (nnx.grad(loss, argnums=(0, 1))(layer, x) for layer in (ours, theirs))
    assert_trees_near(nnx.to_pure_dict(actual[0]), nnx.to_pure_dict(expected[0]))
    assert_trees_near(actual[1], expected[1])


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_linear_applies_the_activation_after_the_bias(activation):
    ours, theirs = make_pair(64, 32)
    ours.activation = activation
    x = make_input(6, 64)
    assert_trees_near(ours(x), getattr(jax.nn, activation)(theirs(x)))


def test_linear_with_a_dot_general_of_its_own_is_flax_linear():
    ours, theirs = make_pair(64, 32, dot_general=jax.lax.dot_general)
    x = make_input(6, 64)
    np.testing.assert_array_equal(ours(x), theirs(x))
    with pytest.raises(ValueError, match="activation must be None where dot_general"):
        fp8_nnx.Linear(4, 4, dot_general=jax.lax.dot_general, activation="relu", rngs=nnx.Rngs(0))


def test_linear_passes_recipe_and_implementation_on():
    x = make_input(6, 64)
    with pytest.raises(ValueError, match="implementation"):
        fp8_nnx.Linear(64, 32, implementation="abacus", rngs=nnx.Rngs(0))(x)
    recipe = dataclasses.replace(jaxgemm.DEEPSEEK, power_of_two=True)
    rounded = fp8_nnx.Linear(64, 32, recipe=recipe, rngs=nnx.Rngs(0))
    assert np.any(rounded(x) != fp8_nnx.Linear(64, 32, rngs=nnx.Rngs(0))(x))


def test_fp8_dot_general_in_linear():
    x = make_input(6, 64)
    fp8 = nnx.Linear(64, 32, dot_general=jaxgemm.fp8_dot_general, rngs=nnx.Rngs(0))
    assert_trees_near(fp8(x), nnx.Linear(64, 32, rngs=nnx.Rngs(0))(x))


class Network(nnx.Module):
    """A model as a user wrote it: layers in a list, attention, a layer that is used twice, and a head."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=32, decode=False, rngs=rngs)
        self.hidden = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])
        self.again = self.hidden[0]
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        for layer in (*self.hidden, self.again):
            x = x + nnx.gelu(layer(x))
        return self.head(x)


def test_convert_switches_a_model_in_place_and_leaves_what_the_filter_refuses():
    x = make_input(2, 6, 32)
    model = Network(nnx.Rngs(0))
    expected, before = model(x), nnx.to_pure_dict(nnx.state(model))
    assert fp8_nnx.convert(model, lambda path, layer: path[-1] != "head") is model
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert type(model.head) is nnx.Linear and type(model.hidden[1]) is fp8_nnx.Linear
    assert model.again is model.hidden[0]
    # Query, key, value, out, and the hidden layers, one of them twice.
    assert primitive_names(model, x).count("fp8_gemm") == 7
    assert_trees_near(nnx.jit(lambda model, x: model(x))(model, x), expected, 0.1)


def test_converted_models_are_equal_to_jit():
    graphs = [nnx.split(fp8_nnx.convert(Network(nnx.Rngs(0))))[0] for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_convert_leaves_layers_that_have_their_own_product():
    model = nnx.Sequential(
        nnx.Linear(4, 4, dot_general=jaxgemm.fp8_dot_general, rngs=nnx.Rngs(0)),
        nnx.Linear(4, 4, rngs=nnx.Rngs(0)),
    )
    fp8_nnx.convert(model)
    assert [type(layer) for layer in model.layers] == [nnx.Linear, fp8_nnx.Linear]


def test_convert_says_when_there_is_nothing_to_switch():
    with pytest.raises(ValueError, match="got 7 such layers, none of them accepted"):
        fp8_nnx.convert(Network(nnx.Rngs(0)), lambda path, layer: "hiden" in path)
    with pytest.raises(ValueError, match="got 0 such layers"):
        fp8_nnx.convert(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("gated, use_bias", [(True, False), (False, True)])
def test_mlp_is_its_layers_fused(gated, use_bias):
    activation = "silu" if gated else "gelu"
    keywords = dict(gated=gated, activation=activation, use_bias=use_bias, bias_init=nnx.initializers.normal(1.0))
    model = fp8_nnx.Mlp(130, 70, 20, rngs=nnx.Rngs(0), **keywords)
    x, weights = make_input(2, 3, 130), make_input(2, 3, 20, seed=3)

    def layers(model, x):
        hidden = model.up(x)
        hidden = jax.nn.silu(model.gate(x)) * hidden if gated else jax.nn.gelu(hidden)
        return model.down(hidden)

    def gradients(apply):
        return nnx.jit(nnx.grad(lambda model, x: (apply(model, x) * weights).sum()))(model, x)

    fused, apart = (nnx.to_pure_dict(gradients(apply)) for apply in (lambda model, x: model(x), layers))
    assert set(fused) == {"up", "down"} | ({"gate"} if gated else set())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), fused, apart)
    assert model(x).shape == (2, 3, 20)
    names = primitive_names(lambda x: model(x), x)
    assert names.count("fp8_gemm") == 2 + gated and "dot_general" not in names


def test_mlp_takes_the_keywords_that_have_an_effect():
    rngs = nnx.Rngs(0)
    options = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32, "kernel_init": nnx.initializers.ones}
    mlp = jaxgemm.flax.nnx.Mlp(8, 16, **options, rngs=rngs)
    assert mlp(jnp.ones((2, 8))).dtype == jnp.float32 and (mlp.up.kernel[...] == 1).all()
    with pytest.raises(TypeError, match="got dot_general"):
        jaxgemm.flax.nnx.Mlp(8, 16, dot_general=jax.lax.dot_general, rngs=rngs)


def test_mlp_of_no_features_has_none():
    model = fp8_nnx.Mlp(16, 8, 0, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    assert model(make_input(3, 16)).shape == (3, 0)
