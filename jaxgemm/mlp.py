"""The MLP of a transformer in FP8, differentiable: two layers with the activation between them fused."""

import math
from typing import Any

import jax

from jaxgemm.dot import as_array, check_rhs, column_entry, dot_options
from jaxgemm.dot_vjp import DotOptions
from jaxgemm.elementwise import ACTIVATIONS
from jaxgemm.explicit_axes import entries_of, run_automatic
from jaxgemm.mlp_vjp import MlpOptions, scaled_mlp
from jaxgemm.problem import check_bias, check_float_array
from jaxgemm.recipe import DEEPSEEK, Recipe
from jaxgemm.scaled_array import ScaledArray

Weight = jax.Array | ScaledArray


def fp8_mlp(
    x: jax.Array,
    w_up: Weight,
    w_down: Weight,
    w_gate: Weight | None = None,
    *,
    bias_up: jax.Array | None = None,
    bias_down: jax.Array | None = None,
    bias_gate: jax.Array | None = None,
    activation: str = "silu",
    preferred_element_type: Any = None,
    recipe: Recipe = DEEPSEEK,
    low_memory: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Computes `activation(x @ w_up) @ w_down`, or gated `(activation(x @ w_gate) * (x @ w_up)) @ w_down`, in FP8.

    The same, to rounding, as calls of `fp8_dot` with the activation between them, differentiable likewise, but in
    fewer passes over memory and with fewer bytes kept: the hidden activations and their gradients are quantised as
    they are made, and never stored in high precision. What is kept for the backward pass are x and the weights in FP8
    and, in x's dtype, what the activation was applied to; `docs/memory.md` has the bytes, and how to keep fewer.

    Args:
        x: bfloat16, float16 or float32 `[..., k]`.
        w_up: float `[k, h]`; or `[k, 2, h]`, gate and up in one, which is one product in place of two. Or a
            `ScaledArray` `[h, k]`, a weight that is FP8 already and gets no gradient.
        w_down: float `[h, n]`; or a `ScaledArray` `[n, h]`.
        w_gate: float `[k, h]`, or a `ScaledArray` `[h, k]`; None for an MLP without gate, or if w_up holds it.
        bias_up: float, as w_up has columns: `[h]` or `[2, h]`; or None.
        bias_down: float `[n]`, or None.
        bias_gate: float `[h]`, or None.
        activation: "relu", "gelu" (tanh approximation) or "silu", taken in float32.
        preferred_element_type: bfloat16, float16 or float32: dtype of the result; None for that of x.
        recipe: as in `fp8_dot`.
        low_memory: whether the backward pass makes the natural and the transposed copies of the hidden layer's
            gradients one after the other: its peak falls from 11 h bytes a row to 9 h, and dhidden, gate and up are
            read twice. To the same bits. It has no effect where no single pass serves: where only one of gate and up
            is trained, or with a recipe of other blocks or bfloat16 weight gradients.
        implementation: as in `fp8_dot`.

    Returns:
        `[..., n]`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `fp8_dot` does.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w_gate, w_up, w_down = jnp.ones((2, 3, 8)), jnp.ones((8, 16)), jnp.ones((8, 16)), jnp.ones((16, 8))
        >>> fp8_mlp(x, w_up, w_down, w_gate).shape
        (2, 3, 8)
        >>> fp8_mlp(x, jnp.stack([w_gate, w_up], 1), w_down).shape  # the gate within w_up: [8, 2, 16]
        (2, 3, 8)
        >>> fp8_mlp(x, w_up, w_down, activation="gelu").shape  # no gate
        (2, 3, 8)
    """
    x, w_up, w_down, w_gate = (as_array(a) for a in (x, w_up, w_down, w_gate))
    bias_up, bias_down, bias_gate = (as_array(a) for a in (bias_up, bias_down, bias_gate))
    joined, k, h, n = _check(x, w_up, w_down, w_gate, bias_up, bias_down, bias_gate, activation)
    first = [(w_up, bias_up)] if w_gate is None else [(w_gate, bias_gate), (w_up, bias_up)]
    weights, biases = zip(*first, strict=True)

    def layer(w: Any, bias: Any, out_dtype: Any = None) -> DotOptions:
        return dot_options("dense", x, w, bias, out_dtype, None, recipe, implementation)

    options = MlpOptions(
        first=tuple(layer(w, bias) for w, bias in first),
        down=layer(w_down, bias_down, preferred_element_type),
        function=activation if w_gate is None and not joined else f"{activation}_gate",
        joined=joined,
        low_memory=low_memory,
    )

    def mlp(x: Any, weights: Any, biases: Any, w_down: Any, bias_down: Any) -> jax.Array:
        rows = x.reshape(math.prod(x.shape[:-1]), k)
        if joined:
            weights, biases = jax.tree.map(lambda a: a.reshape(*a.shape[:-2], 2 * h), (weights, biases))
        return scaled_mlp(options, rows, weights, biases, w_down, bias_down).reshape(*x.shape[:-1], n)

    def out_entries() -> Any:
        return (*entries_of(x)[:-1], column_entry(w_down))

    return run_automatic(mlp, out_entries, x, weights, biases, w_down, bias_down)


def _check(
    x: Any, w_up: Any, w_down: Any, w_gate: Any, bias_up: Any, bias_down: Any, bias_gate: Any, activation: Any
) -> tuple[bool, int, int, int]:
    """Returns whether w_up holds the gate, and k, h and n; raises if something does not fit."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    check_float_array("x", x, ("...", "k"))
    joined = not isinstance(w_up, ScaledArray) and len(getattr(w_up, "shape", ())) == 3
    if joined:
        check_float_array("w_up", w_up, ("k", "2", "h"))
        k, pair, h = w_up.shape
        if pair != 2 or w_gate is not None:
            given = "a w_gate beside it" if w_gate is not None else f"w_up of shape {list(w_up.shape)}"
            raise ValueError(f"w_up must be [k, 2, h] of gate and up, w_gate then None, or [k, h]; got {given}")
    else:
        k, h = check_rhs(w_up, ("k", "h"), "w_up")
    if x.shape[-1] != k:
        raise ValueError(f"x must be [..., k] = [..., {k}] to match w_up, got {list(x.shape)}")
    if w_gate is not None and tuple(check_rhs(w_gate, ("k", "h"), "w_gate")) != (k, h):
        raise ValueError(f"w_gate must be [k, h] = [{k}, {h}] as w_up is, got {list(w_gate.shape)}")
    if w_gate is None and bias_gate is not None:
        raise ValueError("bias_gate must be None without w_gate")
    h_down, n = check_rhs(w_down, ("h", "n"), "w_down")
    if h_down != h:
        raise ValueError(f"w_down must be [h, n] = [{h}, n] to match w_up, got {list(w_down.shape)}")
    if joined:
        check_bias(bias_up, (2, h), "bias_up", ("2", "h"))
    else:
        check_bias(bias_up, (h,), "bias_up", ("h",))
    check_bias(bias_gate, (h,), "bias_gate", ("h",))
    check_bias(bias_down, (n,), "bias_down")
    return joined, k, h, n
