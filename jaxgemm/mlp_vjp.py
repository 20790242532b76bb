"""The gradients of an MLP in FP8: two layers and the activation between them as one custom VJP.

What two calls of `fp8_dot` with an activation between them cannot do is done here:

- The hidden activations are never stored in high precision. One pass reads what they are made of (gate and up, or the
  one pre-activation) and writes them quantised.
- Their gradients neither: one pass reads the same and dout of the hidden layer, and writes the gradients of gate and
  up quantised both ways, and the hidden activations for the weight gradient of the second layer, made anew.
- The input is quantised once for gate and up. Their gradients of it are added in float32.

| forward | reads | writes |
|---|---|---|
| quantise x | x | x, x transposed (kept) |
| up, gate | x | gate and up (kept, in the dtype of x) |
| quantise hidden | gate, up | hidden |
| down | hidden | out |

| backward | reads | writes |
|---|---|---|
| quantise dout | dout | dout, dout transposed |
| dgrad of down | dout | dhidden |
| quantise | dhidden, gate, up | dgate, dup, both transposed, hidden transposed |
| wgrad of down | hidden, dout, both transposed | |
| dgrad of up, gate | dgate, dup | dx |
| wgrad of up, gate | x, dgate, dup, all transposed | |

With `low_memory` the fused backward pass is two: the natural copies of dgate and dup are used up in dx before the
transposed ones are made. dhidden, gate and up are read twice.

Kept for the backward pass, under the names of `jaxgemm.dot_vjp`: `jaxgemm_lhs` (x transposed, one byte an element),
`jaxgemm_rhs` (the quantised weights) and `jaxgemm_pre_activation` (gate and up).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxgemm.dot_vjp import (
    RESIDUAL_NAMES,
    DotOptions,
    dgrad,
    name_residual,
    quantize_dout,
    quantize_lhs,
    quantize_rhs,
    row_product,
    settle_gradients,
    wgrad,
)
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.quantize import quantize, quantize_function, quantize_transposed
from jaxgemm.scaled_array import ScaledArray
from jaxgemm.scopes import part


@dataclasses.dataclass(frozen=True)
class MlpOptions:
    """What is static about an MLP.

    Attributes:
        first: the layers that x goes through: (up,), or (gate, up), or (gate and up as one,).
        down: the layer behind the activation. Recipe and implementation are those of all layers.
        function: a name in `jaxgemm.elementwise.FUNCTIONS`: from gate and up, or up alone, to the hidden activations.
        joined: whether gate and up are one layer, their columns side by side.
        low_memory: whether the gradients of the hidden layer are quantised in two passes.
    """

    first: tuple[DotOptions, ...]
    down: DotOptions
    function: str
    joined: bool
    low_memory: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled_mlp(options: MlpOptions, x: Any, weights: Any, biases: Any, down: Any, down_bias: Any) -> jax.Array:
    """Computes `activation(x @ gate + gate_bias) * (x @ up + up_bias) @ down + down_bias` in FP8, all checked before.

    Args:
        options: everything static.
        x: float `[m, k]`.
        weights: for each of `options.first` float `[k, h]` (joined `[k, 2 h]`), or `ScaledArray` of the transpose.
        biases: for each of them float `[h]`, or None.
        down: float `[h, n]`, or `ScaledArray` `[n, h]`.
        down_bias: float `[n]`, or None.

    Returns:
        `[m, n]`.
    """
    recipe = options.down.recipe
    with part("mlp_up"):
        x_q = quantize(x, recipe.lhs_block_shape, **options.down.quantizer(recipe.lhs_dtype))
        pre = _up(options, x_q, [_quantize_constant(options, w) for w in weights], biases)
    with part("mlp_down"):
        return _down(options, pre, _quantize_constant(options, down), down_bias)


def _forward(
    options: MlpOptions, x: Any, weights: Any, biases: Any, down: Any, down_bias: Any
) -> tuple[jax.Array, Any]:
    """fprop of both layers, keeping what the backward pass needs."""
    with part("mlp_up"):
        x_q, x_residual = quantize_lhs(_most_trained(options.first), x)
        quantized = [quantize_rhs(layer, w) for layer, w in zip(options.first, weights, strict=True)]
        pre = name_residual(_up(options, x_q, [w for _, w in quantized], biases), RESIDUAL_NAMES[2])
    with part("mlp_down"):
        down_residual, down_forward = quantize_rhs(options.down, down)
        out = _down(options, pre, down_forward, down_bias)
    kept = [w for w, _ in quantized], down_residual
    return out, (name_residual(x_residual, RESIDUAL_NAMES[0]), name_residual(kept, RESIDUAL_NAMES[1]), pre)


def _backward(options: MlpOptions, residuals: Any, dout: jax.Array) -> tuple[Any, ...]:
    """dgrad, wgrad and the biases' gradients of both layers."""
    x_residual, (weights, down), pre = residuals
    with part("mlp_down_backward"):
        dout_q, dout_wgrad, ddown_bias = quantize_dout(options.down, dout)
        dhidden = dgrad(options.down, dout_q, down, None, options.down.lhs_dtype)
    dx = None
    if options.low_memory and _is_fused(options):
        with part("mlp_down_backward"):
            natural = _dpre_in_one_pass(options, dhidden, pre, natural=True, transposed=False)
        dx = _dx(options, [d for d, _, _ in natural], weights)
        # What is transposed is made when the natural copies are used up, and not before. dx is not summed over the mesh
        # yet: inside `shard_map` all that leaves a barrier varies over the same axes.
        dx, dhidden, pre = jax.lax.optimization_barrier((dx, dhidden, pre))
    with part("mlp_down_backward"):
        dpre, hidden = _quantize_dpre(options, dhidden, pre, natural=dx is None)
        ddown = wgrad(options.down, hidden, dout_wgrad)
        _, ddown, ddown_bias = settle_gradients(options.down, None, ddown, ddown_bias)
    if dx is None:
        dx = _dx(options, [d for d, _, _ in dpre], weights)
    with part("mlp_up_backward"):
        dx, *_ = settle_gradients(options.first[0], dx, None, None)
        layers = zip(options.first, dpre, strict=True)
        settled = [settle_gradients(a, None, wgrad(a, x_residual, d_t), total) for a, (_, d_t, total) in layers]
    return dx, tuple(dw for _, dw, _ in settled), tuple(dbias for *_, dbias in settled), ddown, ddown_bias


def _dx(options: MlpOptions, dpre: list[Any], weights: list[Any]) -> jax.Array:
    """The gradient of x, not yet summed over the mesh: two products are added before they are rounded."""
    with part("mlp_up_backward"):
        sum_dtype = options.first[0].lhs_dtype if len(dpre) == 1 else jnp.float32
        products = zip(options.first, dpre, weights, strict=True)
        dx = functools.reduce(jnp.add, [dgrad(layer, d, w, None, sum_dtype) for layer, d, w in products])
        return dx.astype(options.first[0].lhs_dtype)


scaled_mlp.defvjp(_forward, _backward)


def _up(options: MlpOptions, x: ScaledArray, weights: list[ScaledArray], biases: Any) -> list[jax.Array]:
    """Returns what the activation is applied to: gate and up, or up."""
    layers = zip(options.first, weights, biases, strict=True)
    return [row_product(layer, x, w, None, layer.out_dtype, bias) for layer, w, bias in layers]


def _down(options: MlpOptions, pre: list[jax.Array], down: ScaledArray, bias: Any) -> jax.Array:
    """The activation and the second layer."""
    recipe, quantizer = options.down.recipe, options.down.quantizer(options.down.recipe.lhs_dtype)
    if recipe.lhs_block_shape[0] == 1:
        [(hidden, _, _)] = quantize_function(
            options.function, *pre, transposed=False, joined=options.joined, **quantizer
        )
        assert hidden is not None
    else:
        hidden = quantize(_apply(options, options.function, pre)[0], recipe.lhs_block_shape, **quantizer)
    return row_product(options.down, hidden, down, None, options.down.out_dtype, bias)


def _quantize_constant(options: MlpOptions, weight: Any) -> ScaledArray:
    """Returns a weight as fprop needs it, where there is no backward pass."""
    if isinstance(weight, ScaledArray):
        return weight
    recipe = options.down.recipe
    return quantize_transposed(weight, recipe.rhs_block_shape, **options.down.quantizer(recipe.rhs_dtype))


def _is_trained(options: MlpOptions) -> set[bool]:
    """Whether gate and up have gradients; both of the answers if only one of them has."""
    return {layer.rhs_dtype is not None for layer in options.first}


def _scales_rows(options: MlpOptions) -> bool:
    """Whether gradients are quantised by rows for both products, as the fused pass does."""
    return options.down.recipe.wgrad_dtype == "fp8" and options.down.recipe.dout_block_shape[0] == 1


def _is_fused(options: MlpOptions) -> bool:
    """Whether one pass can write the gradients of gate and up both ways."""
    return _scales_rows(options) and _is_trained(options) == {True}


def _dpre_in_one_pass(
    options: MlpOptions, dhidden: jax.Array, pre: list[jax.Array], natural: bool, transposed: bool, hidden: bool = False
) -> list[Any]:
    """Quantises the gradients of what the activation was applied to; the hidden activations behind them, if wanted."""
    has_bias = any(layer.bias_dtype is not None for layer in options.first)
    return quantize_function(
        f"{options.function}_backward", dhidden, *pre, natural=natural, transposed=transposed,
        column_sum=has_bias and transposed, hidden=hidden, joined=options.joined,
        **options.down.quantizer(options.down.recipe.dout_dtype),
    )  # fmt: skip


def _quantize_dpre(
    options: MlpOptions, dhidden: jax.Array, pre: list[jax.Array], natural: bool
) -> tuple[list[Any], Any]:
    """Returns the gradients of what the activation was applied to, and the hidden activations for wgrad.

    The gradients are as `quantize_dout` gives them, without the natural ones if these are not wanted; the hidden
    activations are None if the second layer is a constant.
    """
    recipe, trained = options.down.recipe, _is_trained(options)
    has_bias = any(layer.bias_dtype is not None for layer in options.first)
    if not _scales_rows(options) or trained == {True, False} or (has_bias and trained == {False}):
        *gradients, hidden = _apply(options, f"{options.function}_backward", [dhidden, *pre])
        dpre = [quantize_dout(layer, d) for layer, d in zip(options.first, gradients, strict=True)]
        return dpre, _hidden_for_wgrad(options, hidden)
    # One pass writes one format of FP8, and transposes for the hidden activations only where it does for gradients.
    wants_hidden = options.down.rhs_dtype is not None
    has_hidden = wants_hidden and recipe.lhs_dtype == recipe.dout_dtype and trained == {True}
    results = _dpre_in_one_pass(options, dhidden, pre, natural, trained == {True}, has_hidden)
    if wants_hidden and not has_hidden:
        keywords = options.down.quantizer(recipe.lhs_dtype)
        results += quantize_function(options.function, *pre, natural=False, joined=options.joined, **keywords)
    pairs = zip(results, options.first, strict=False)
    dpre = [(d, d_t, None if layer.bias_dtype is None else total) for (d, d_t, total), layer in pairs]
    return dpre, results[-1][1] if wants_hidden else None


def _hidden_for_wgrad(options: MlpOptions, hidden: jax.Array) -> Any:
    if options.down.rhs_dtype is None:
        return None
    if options.down.recipe.wgrad_dtype != "fp8":
        return hidden
    return quantize_transposed(hidden, **options.down.quantizer(options.down.recipe.lhs_dtype))


def _apply(options: MlpOptions, function: str, inputs: list[jax.Array]) -> list[jax.Array]:
    """Returns a function's results in high precision, for recipes that no fused pass serves."""
    dtype = inputs[0].dtype
    if options.joined:
        inputs = [*inputs[:-1], *jnp.split(inputs[-1], 2, -1)]
    results = FUNCTIONS[function].apply(*(x.astype(jnp.float32) for x in inputs))
    rounded = [x.astype(dtype) for x in results]
    if options.joined and len(rounded) == 3:
        return [jnp.concatenate(rounded[:2], -1), rounded[2]]
    return rounded


def _most_trained(layers: tuple[DotOptions, ...]) -> DotOptions:
    """Returns a layer whose weight has a gradient, if there is one: what x is kept for."""
    return next((layer for layer in layers if layer.rhs_dtype is not None), layers[0])
