"""Elementwise functions that quantising applies on the way: float32 in, float32 out, plain `jnp`.

The activations of an MLP, plain and gated, and their gradients. The same code runs in XLA and inside the kernels.
Everything goes through one sigmoid, which costs two special-function operations: `gelu` is its tanh approximation, and
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

ValueAndSlope = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Function:
    """An elementwise function of several arrays, and how its results are used.

    Attributes:
        num_inputs: how many arrays it takes.
        num_outputs: how many results there are to quantise.
        has_hidden: whether one more follows them: the forward function's result, made anew on the way back.
        apply: from the inputs to a tuple of all results.
    """

    num_inputs: int
    num_outputs: int
    has_hidden: bool
    apply: Callable[..., tuple[jax.Array, ...]]


def sigmoid(x: jax.Array) -> jax.Array:
    """Returns `1 / (1 + exp(-x))`."""
    return 1 / (1 + jnp.exp(-x))


def relu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `max(x, 0)` and its derivative."""
    return jnp.maximum(x, np.float32(0)), jnp.where(x > 0, np.float32(1), np.float32(0))


def gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `x * sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))` and its derivative."""
    clipped = jnp.minimum(jnp.maximum(x, -SATURATED), SATURATED)
    cubic = GELU_CUBIC * clipped * clipped
    probability = sigmoid(GELU_SLOPE * clipped * (1 + cubic))
    growth = GELU_SLOPE * clipped * (1 + 3 * cubic)  # x times the slope of the sigmoid's argument
    return x * probability, probability + growth * (probability * (1 - probability))


def silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `x * sigmoid(x)` and its derivative."""
    probability = sigmoid(x)
    value = x * probability
    return value, probability + value * (1 - probability)


def _plain(activation: ValueAndSlope) -> Function:
    """`x -> activation(x)`."""
    return Function(1, 1, False, lambda x: activation(x)[:1])


def _plain_backward(activation: ValueAndSlope) -> Function:
    """`(dout, x) -> gradient of x`, and `activation(x)`."""

    def apply(dout: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activation(x)
        return dout * slope, value

    return Function(2, 1, True, apply)


def _gate(activation: ValueAndSlope) -> Function:
    """`(gate, up) -> activation(gate) * up`, the inside of a gated MLP (with silu: SwiGLU)."""
    return Function(2, 1, False, lambda gate, up: (activation(gate)[0] * up,))


def _gate_backward(activation: ValueAndSlope) -> Function:
    """`(dout, gate, up) -> gradients of gate and up`, and `activation(gate) * up`."""

    def apply(dout: jax.Array, gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activation(gate)
        # NOTE: in this order, which leaves the fewest numbers to be held at once: no register is spilled in kernels.
        hidden, dup = value * up, dout * value
        return dout * (up * slope), dup, hidden

    return Function(3, 2, True, apply)


ACTIVATIONS: dict[str, ValueAndSlope] = {"relu": relu, "gelu": gelu, "silu": silu}

FUNCTIONS: dict[str, Function] = {
    name + suffix: make(activation)
    for name, activation in ACTIVATIONS.items()
    for suffix, make in {
        "": _plain,
        "_backward": _plain_backward,
        "_gate": _gate,
        "_gate_backward": _gate_backward,
    }.items()
}
"""By name: an activation, then `_gate` if its result is multiplied with a second input, then `_backward`."""
