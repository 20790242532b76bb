"""Elementwise functions that quantising kernels apply on the way: float32 in, float32 out, plain `jnp`.

The same code runs inside the kernels and, outside of them, as their oracle. Everything goes through one
sigmoid, which costs two special-function operations: `gelu` is its tanh approximation, and
`0.5 (1 + tanh u) = sigmoid(2 u)`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GELU_SLOPE = np.float32(np.sqrt(8 / np.pi))
GELU_CUBIC = np.float32(0.044715)
SATURATED = np.float32(100)
"""Beyond this gelu is the identity or zero in float32, and its inner cubic need not overflow."""


@dataclasses.dataclass(frozen=True)
class Function:
    """An elementwise function of `num_inputs` arrays that returns a tuple of `num_outputs`."""

    num_inputs: int
    num_outputs: int
    apply: Callable[..., tuple[jax.Array, ...]]


def sigmoid(x: jax.Array) -> jax.Array:
    """Returns `1 / (1 + exp(-x))`."""
    return 1 / (1 + jnp.exp(-x))


def silu_gate(gate: jax.Array, up: jax.Array) -> tuple[jax.Array]:
    """Returns `silu(gate) * up`, the inside of a SwiGLU layer."""
    return (gate * sigmoid(gate) * up,)


def silu_gate_backward(dout: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `silu_gate` with respect to gate and up."""
    probability = sigmoid(gate)
    silu = gate * probability
    return dout * up * (probability + silu * (1 - probability)), dout * silu


def gelu(x: jax.Array) -> tuple[jax.Array]:
    """Returns `x * sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))`."""
    return (x * _gelu_probability(x)[0],)


def gelu_backward(dout: jax.Array, x: jax.Array) -> tuple[jax.Array]:
    """Returns the gradient of `gelu`."""
    probability, growth = _gelu_probability(x)
    return (dout * (probability + growth * (probability * (1 - probability))),)


def _gelu_probability(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sigmoid in gelu, and x times the slope of the sigmoid's argument."""
    x = jnp.minimum(jnp.maximum(x, -SATURATED), SATURATED)
    cubic = GELU_CUBIC * x * x
    return sigmoid(GELU_SLOPE * x * (1 + cubic)), GELU_SLOPE * x * (1 + 3 * cubic)


FUNCTIONS = {
    "silu_gate": Function(2, 1, silu_gate),
    "silu_gate_backward": Function(3, 2, silu_gate_backward),
    "gelu": Function(1, 1, gelu),
    "gelu_backward": Function(2, 1, gelu_backward),
}
