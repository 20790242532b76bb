"""The functions that quantising applies: the activations and their gradients, as JAX has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgemm.elementwise import ACTIVATIONS, FUNCTIONS

JAX = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
CLOSE = dict(rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_functions_are_the_activations_and_their_gradients(name):
    dout, gate, up = (4 * jax.random.normal(jax.random.key(i), (64, 64)) for i in range(3))
    for suffix, function, inputs in (
        ("", JAX[name], (gate,)),
        ("_gate", lambda gate, up: JAX[name](gate) * up, (gate, up)),
    ):
        forward, backward = FUNCTIONS[name + suffix], FUNCTIONS[f"{name}{suffix}_backward"]
        out, pull_back = jax.vjp(function, *inputs)
        assert (forward.num_inputs, forward.num_outputs) == (len(inputs), 1)
        assert (backward.num_inputs, backward.num_outputs) == (len(inputs) + 1, len(inputs))
        np.testing.assert_allclose(forward.apply(*inputs)[0], out, **CLOSE)
        for actual, expected in zip(backward.apply(dout, *inputs), (*pull_back(dout), out), strict=True):
            np.testing.assert_allclose(actual, expected, **CLOSE)


def test_gelu_of_huge_numbers_is_finite():
    x = jnp.array([-3e38, -1e20, 1e20, 3e38])
    np.testing.assert_array_equal(FUNCTIONS["gelu"].apply(x)[0], jnp.maximum(x, 0))
    np.testing.assert_array_equal(FUNCTIONS["gelu_backward"].apply(jnp.ones(4), x)[0], (x > 0).astype(jnp.float32))
