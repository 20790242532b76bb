"""What the tests of Linen and NNX share: inputs, and a comparison that fails also if nothing ran in FP8."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

LOOSE = 0.06
"""Bound on a relative error in norm. A product of e4m3 operands has about 0.037: both round by up to 2^-4."""


def make_input(*shape, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def relative_error(actual, expected):
    actual, expected = (np.asarray(a, np.float32) for a in (actual, expected))
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def assert_trees_near(actual, expected, bound=LOOSE):
    """Near in each leaf, yet not equal in all: equal trees would mean that nothing ran in FP8."""
    errors = jax.tree.map(relative_error, actual, expected)
    assert max(jax.tree.leaves(errors)) < bound, errors
    assert max(jax.tree.leaves(errors)) > 1e-4, "the same as without FP8"


def primitive_names(function, *args):
    """Names of all primitives that a function traces to, inner functions included."""
    names = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            names.append(equation.primitive.name)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return names
