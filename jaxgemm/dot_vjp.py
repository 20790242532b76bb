"""The gradients of the FP8 products: fprop, dgrad and wgrad of dense, grouped and masked layers.

All three kinds share one custom VJP. What differs is how rows belong to weights, and so which product each step is:

| kind | fprop and dgrad | wgrad |
|---|---|---|
| dense | `gemm` | `gemm`, contracting m |
| grouped | `grouped_gemm` | `k_grouped_gemm` of segments aligned to 128 |
| masked | `masked_grouped_gemm` | `k_masked_gemm` of `[g, k, max_m]`, contracting the valid part of max_m |

Rows of contiguous groups that a mesh splits stay where they are: `split_over_rows`.

Kept for the backward pass, under these names for `jax.checkpoint` policies: `jaxgemm_lhs` (lhs transposed, one byte an
element), `jaxgemm_rhs` (the quantised weight), `jaxgemm_pre_activation` (only if there is an activation).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxgemm import layout
from jaxgemm.gemm import gemm, grouped_gemm, k_grouped_gemm, k_masked_gemm, masked_grouped_gemm
from jaxgemm.manual_axes import is_manual, sum_replicated, varying_axes
from jaxgemm.primitives import bind_row_sums
from jaxgemm.problem import RowSums
from jaxgemm.quantize import (
    dequantize,
    quantize,
    quantize_both,
    quantize_function,
    quantize_segments,
    quantize_transposed,
)
from jaxgemm.recipe import Recipe
from jaxgemm.reference import activate
from jaxgemm.scaled_array import ScaledArray
from jaxgemm.scopes import part
from jaxgemm.wgrad_bf16 import grouped_wgrad_bf16, wgrad_bf16

RESIDUAL_NAMES = ("jaxgemm_lhs", "jaxgemm_rhs", "jaxgemm_pre_activation")


@dataclasses.dataclass(frozen=True)
class DotOptions:
    """What is static about a differentiable product.

    Attributes:
        kind: "dense", "grouped" or "masked".
        lhs_dtype: of lhs, and so of its gradient.
        rhs_dtype: of the high-precision rhs, and so of its gradient; None if rhs came quantised.
        bias_dtype: of the bias, and so of its gradient; None without a bias.
        out_dtype: of the result.
        activation: a name, or None.
        recipe: formats and blocks.
        implementation: a name, or None.
        varying: inside `shard_map`: the mesh axes that lhs, rhs and bias vary over.
    """

    kind: str
    lhs_dtype: np.dtype
    rhs_dtype: np.dtype | None
    bias_dtype: np.dtype | None
    out_dtype: np.dtype
    activation: str | None
    recipe: Recipe
    implementation: str | None
    varying: tuple[frozenset[Any], frozenset[Any], frozenset[Any]]

    def quantizer(self, dtype: Any) -> dict[str, Any]:
        """Returns the keywords that every quantising function takes.

        "triton" names a kernel that multiplies: what quantises its operands is the best there is.
        """
        return {
            "dtype": dtype,
            "power_of_two": self.recipe.power_of_two,
            "implementation": None if self.implementation == "triton" else self.implementation,
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled_dot(options: DotOptions, lhs: Any, rhs: Any, bias: Any, sizes: Any) -> jax.Array:
    """Computes `activation(lhs @ rhs + bias)` in FP8, all arguments checked before.

    Args:
        options: everything static.
        lhs: float `[m, k]`; masked `[g, m, k]`.
        rhs: float `[k, n]`, grouped and masked `[g, k, n]`; or `ScaledArray` `[n, k]`, `[g, n, k]`.
        bias: float `[n]`, grouped and masked `[g, n]`; or None.
        sizes: integer `[g]`: `group_sizes` or `masked_m`; None if dense.

    Returns:
        `[m, n]`; masked `[g, m, n]`.
    """
    recipe = options.recipe
    with part("fprop"):
        keywords = {"valid_rows": valid_rows(options, lhs, sizes), **options.quantizer(recipe.lhs_dtype)}
        lhs_q = quantize(lhs, recipe.lhs_block_shape, **keywords)
        if not isinstance(rhs, ScaledArray):
            rhs = quantize_transposed(rhs, recipe.rhs_block_shape, **options.quantizer(recipe.rhs_dtype))
        return row_product(options, lhs_q, rhs, sizes, options.out_dtype, bias, options.activation)


def _forward(options: DotOptions, lhs: Any, rhs: Any, bias: Any, sizes: Any) -> tuple[jax.Array, Any]:
    """fprop, keeping what the backward pass needs."""
    with part("fprop"):
        lhs_q, lhs_residual = quantize_lhs(options, lhs, sizes)
        rhs_residual, rhs_forward = quantize_rhs(options, rhs)
        out = row_product(options, lhs_q, rhs_forward, sizes, options.out_dtype, bias, None)
    pre_activation = None
    if options.activation is not None:
        # The derivative needs what the activation was applied to, so that is what the product stores.
        pre_activation = checkpoint_name(out, RESIDUAL_NAMES[2])
        out = _activate(options, pre_activation)
    residuals = (
        name_residual(lhs_residual, RESIDUAL_NAMES[0]),
        name_residual(rhs_residual, RESIDUAL_NAMES[1]),
        pre_activation,
        sizes,
        lhs if may_split_rows(options) else None,
    )
    return out, residuals


def _backward(options: DotOptions, residuals: Any, dout: jax.Array) -> tuple[Any, ...]:
    """dgrad, wgrad and the bias' gradient."""
    lhs_residual, rhs_residual, pre_activation, sizes, lhs = residuals
    with part("quantize_dout"):
        if options.kind == "grouped" and pre_activation is not None:  # there is no pass that does it
            dout, pre_activation = _activation_gradient(options, dout, pre_activation), None
        dout_q, dout_wgrad, dbias = quantize_dout(options, dout, sizes, pre_activation)
    dlhs = dgrad(options, dout_q, rhs_residual, sizes, options.lhs_dtype)
    drhs = wgrad(options, lhs_residual, dout_wgrad, sizes)
    if lhs is not None:
        drhs, dbias = split_over_rows(options, lhs, dout, sizes, drhs, dbias)
    return *settle_gradients(options, dlhs, drhs, dbias), None


scaled_dot.defvjp(_forward, _backward)


def row_product(
    options: DotOptions,
    lhs: ScaledArray,
    rhs: ScaledArray,
    sizes: Any,
    out_dtype: Any,
    bias: Any = None,
    activation: str | None = None,
) -> jax.Array:
    """The product in which every row of the result belongs to a row of lhs: fprop and dgrad."""
    keywords: dict[str, Any] = {
        "preferred_element_type": out_dtype, "activation": activation, "implementation": options.implementation,
    }  # fmt: skip
    if options.kind == "dense":
        return gemm(lhs, rhs, bias, **keywords)
    if options.kind == "grouped":
        return grouped_gemm(lhs, rhs, sizes, bias, **keywords)
    return masked_grouped_gemm(lhs, rhs, sizes, bias, **keywords)


@part("dgrad")
def dgrad(options: DotOptions, dout: ScaledArray, rhs: ScaledArray, sizes: Any, out_dtype: Any) -> jax.Array:
    """The gradient of lhs, from the weight that the forward pass kept."""
    if options.rhs_dtype is None:  # one that came quantised was kept as it came
        rhs = rhs.T if rhs.is_transposable else _quantized_along_rows(options, rhs)
    return row_product(options, dout, rhs, sizes, out_dtype)


def _quantized_along_rows(options: DotOptions, rhs: ScaledArray) -> ScaledArray:
    """The transpose of a weight whose blocks are of one row, and do not turn with it: quantised anew."""
    recipe = options.recipe
    return quantize_transposed(dequantize(rhs), recipe.rhs_block_shape, **options.quantizer(recipe.rhs_dtype))


@part("wgrad")
def wgrad(options: DotOptions, lhs: Any, dout: Any, sizes: Any = None) -> jax.Array | None:
    """The gradient of rhs, `[k, n]` or `[g, k, n]`, from what the quantisers below kept; None for a constant."""
    if options.rhs_dtype is None:  # a weight that came quantised
        return None
    if options.recipe.wgrad_dtype == "bf16":
        return grouped_wgrad_bf16(lhs, dout, sizes) if options.kind == "grouped" else wgrad_bf16(lhs, dout)
    # Summed in float32 in any case; rounded by the product itself unless devices' shares are still to be added.
    is_partial = bool(varying_axes(dout) - options.varying[1])
    keywords: dict[str, Any] = {
        "preferred_element_type": jnp.float32 if is_partial else options.rhs_dtype,
        "implementation": options.implementation,
    }
    if options.kind == "dense":
        return gemm(lhs, dout, **keywords)
    if options.kind == "grouped":
        return k_grouped_gemm(lhs, dout, sizes, **keywords)
    return k_masked_gemm(lhs, dout, sizes, **keywords)


@dataclasses.dataclass(frozen=True)
class GroupGradients:
    """The gradients of the weights of groups, and of biases if there are, in float32, from rows in high precision.

    Attributes:
        options: of the product.
    """

    options: DotOptions

    def __call__(self, lhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> list[jax.Array]:
        """Computes `[drhs, dbias]`, or `[drhs]`, of the rows of lhs `[m, k]` and dout `[m, n]`."""
        options = dataclasses.replace(self.options, rhs_dtype=np.dtype(np.float32))
        lhs_q, _ = for_wgrad(options, lhs, sizes, options.quantizer(options.recipe.lhs_dtype))
        keywords = options.quantizer(options.recipe.dout_dtype)
        dout_q, dbias = for_wgrad(options, dout, sizes, keywords, column_sum=options.bias_dtype is not None)
        gradients = wgrad(options, lhs_q, dout_q, sizes), dbias
        return [x for x in gradients if x is not None]


def may_split_rows(options: DotOptions) -> bool:
    """Says whether the compiler is to be offered a split of the rows that weight gradients sum: `split_over_rows`."""
    fp8_wgrad = options.rhs_dtype is not None and options.recipe.wgrad_dtype == "fp8"
    return options.kind == "grouped" and fp8_wgrad and not is_manual()


def split_over_rows(
    options: DotOptions, lhs: jax.Array, dout: jax.Array, sizes: Any, drhs: Any, dbias: Any
) -> tuple[Any, Any]:
    """Returns the gradients of weights and biases of groups, such that a mesh may split the rows that they sum.

    Where a segment lies depends on the sizes of all groups before it, so what a device makes of its part of the rows
    is no part of the segments. And those of lhs are made in the forward pass, where a program for one device reads it
    anyway. Therefore the compiler gets both, gradients made from segments of all rows, and the rows. Where a mesh
    splits these, each device quantises its own, and the given gradients are never computed; elsewhere they are the
    result, and the rows are not kept.
    """
    given = [x for x in (drhs, dbias) if x is not None]
    results = iter(bind_row_sums(RowSums(GroupGradients(options)), given, lhs, dout, sizes))
    return next(results), None if dbias is None else next(results)


def settle_gradients(options: DotOptions, *gradients: Any) -> list[Any]:
    """Gives the gradients of lhs, rhs and bias the dtypes of what they belong to, summed over the mesh where needed."""
    dtypes = (options.lhs_dtype, options.rhs_dtype, options.bias_dtype)
    triples = zip(gradients, options.varying, dtypes, strict=True)
    return [g if g is None else sum_replicated(g, axes).astype(dtype) for g, axes, dtype in triples]


def quantize_rhs(options: DotOptions, rhs: Any) -> tuple[ScaledArray, ScaledArray]:
    """Returns rhs as dgrad and as fprop need it."""
    if isinstance(rhs, ScaledArray):
        return rhs, rhs
    recipe = options.recipe
    return quantize_both(rhs, recipe.rhs_block_shape, **options.quantizer(recipe.rhs_dtype))[:2]


def quantize_lhs(options: DotOptions, lhs: jax.Array, sizes: Any = None) -> tuple[ScaledArray, Any]:
    """Returns lhs as fprop and as wgrad need it; None for wgrad if the weight is a constant."""
    recipe, keywords = options.recipe, options.quantizer(options.recipe.lhs_dtype)
    keywords["valid_rows"] = valid_rows(options, lhs, sizes)
    fp8_wgrad = options.rhs_dtype is not None and recipe.wgrad_dtype == "fp8"
    if fp8_wgrad and options.kind != "grouped" and recipe.lhs_block_shape[0] == 1:
        return quantize_both(lhs, recipe.lhs_block_shape, **keywords)[:2]
    natural = quantize(lhs, recipe.lhs_block_shape, **keywords)
    if options.rhs_dtype is None:
        return natural, None
    return natural, for_wgrad(options, lhs, sizes, keywords)[0] if fp8_wgrad else drop_masked(options, lhs, sizes)


def quantize_dout(
    options: DotOptions, dout: jax.Array, sizes: Any = None, pre_activation: jax.Array | None = None
) -> tuple[ScaledArray, Any, jax.Array | None]:
    """Returns dout as dgrad and as wgrad need it, and its float32 sum over the rows if there is a bias.

    With an activation, what is returned is of the gradient of what it was applied to.
    """
    recipe, keywords = options.recipe, options.quantizer(options.recipe.dout_dtype)
    fp8_wgrad = options.rhs_dtype is not None and recipe.wgrad_dtype == "fp8"
    has_bias = options.bias_dtype is not None
    keywords["valid_rows"] = valid_rows(options, dout, sizes)
    if fp8_wgrad and options.kind != "grouped" and recipe.dout_block_shape[0] == 1:
        if pre_activation is None:
            return quantize_both(dout, recipe.dout_block_shape, column_sum=has_bias, **keywords)
        function = f"{options.activation}_backward"
        [result] = quantize_function(function, dout, pre_activation, column_sum=has_bias, **keywords)
        return result  # type: ignore[return-value]  # natural and transposed are asked for
    if pre_activation is not None:
        dout = _activation_gradient(options, dout, pre_activation)
    natural = quantize(dout, recipe.dout_block_shape, **keywords)
    if fp8_wgrad:
        return natural, *for_wgrad(options, dout, sizes, keywords, column_sum=has_bias)
    dout = drop_masked(options, dout, sizes)
    return natural, dout, _sum_rows(options, dout, sizes) if has_bias else None


def for_wgrad(
    options: DotOptions, x: jax.Array, sizes: Any, keywords: dict[str, Any], column_sum: bool = False
) -> tuple[ScaledArray, jax.Array | None]:
    """Quantises an operand of wgrad, transposed, in blocks of 1x128 along the rows of x; sums the rows if asked to."""
    if options.kind == "grouped":
        keywords = {name: value for name, value in keywords.items() if name != "valid_rows"}
        return quantize_segments(x, sizes, column_sum=column_sum, **keywords)
    total = _sum_rows(options, drop_masked(options, x, sizes), sizes) if column_sum else None
    return quantize_transposed(x, **keywords), total


def _sum_rows(options: DotOptions, dout: jax.Array, sizes: Any) -> jax.Array:
    """The gradient of the bias: the sum of dout over the rows of each weight, in float32."""
    dout = dout.astype(jnp.float32)
    if options.kind != "grouped":
        return dout.sum(-2)
    rows, num_groups = dout.shape[0], sizes.shape[0]
    offsets = layout.group_offsets(sizes, rows)
    group = jnp.where(jnp.arange(rows, dtype=jnp.int32) < offsets[-1], layout.group_of_row(offsets, rows), num_groups)
    return jax.ops.segment_sum(dout, group, num_groups + 1)[:num_groups]


def valid_rows(options: DotOptions, x: jax.Array, sizes: Any) -> jax.Array | None:
    """How many of the first rows of each matrix belong to a group; None where all do."""
    if options.kind == "masked":
        return sizes
    return layout.group_offsets(sizes, x.shape[0])[-1] if options.kind == "grouped" else None


def drop_masked(options: DotOptions, x: jax.Array, sizes: Any) -> jax.Array:
    """Zeroes the rows past `masked_m`, so that whatever they hold reaches neither a scale nor a sum."""
    if options.kind != "masked":
        return x
    valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < layout.clip_to_int32(sizes)[:, None]
    return jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))


def _activate(options: DotOptions, pre_activation: jax.Array) -> jax.Array:
    return activate(options.activation, pre_activation.astype(jnp.float32)).astype(options.out_dtype)


def _activation_gradient(options: DotOptions, dout: jax.Array, pre_activation: jax.Array) -> jax.Array:
    """The gradient of what the activation was applied to."""
    _, pull_back = jax.vjp(functools.partial(_activate, options), pre_activation)
    return pull_back(dout)[0]


def name_residual(residual: Any, name: str) -> Any:
    """Names what is kept for the backward pass, for policies of `jax.checkpoint`."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), residual)
