"""NNX: `Linear` with FP8 products and a fused bias, and `convert`, which switches a whole model.

The parameters are Flax's own, in high precision and under the same names: the state of a `flax.nnx`
model loads into the FP8 model and the reverse.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init
from jax import Array, lax
from jax.typing import DTypeLike

from jaxgemm.dot import fp8_dot, fp8_dot_general
from jaxgemm.mlp import fp8_mlp
from jaxgemm.recipe import DEEPSEEK, Recipe

__all__ = ["Linear", "Mlp", "convert"]

Model = TypeVar("Model", bound=nnx.Module)

# Says of one layer, by its path in the model and itself, whether it is switched to FP8.
LayerFilter = Callable[[tuple[Any, ...], nnx.Module], bool]


class Linear(nnx.Linear):
    """`flax.nnx.Linear` in FP8: `activation(inputs @ kernel + bias)` as one fused product.

    All arguments of `flax.nnx.Linear` are here, with the same defaults and the same parameters: `kernel`
    [in_features, out_features] and `bias` [out_features], both `param_dtype`. `precision` has no meaning
    for FP8 operands and is ignored. A `dot_general` replaces the FP8 product. The kernel is quantised from
    `param_dtype` and its gradient has that dtype, also if `dtype` is narrower.

    Args:
        in_features: Size k of the inputs' last axis.
        out_features: Size n of the outputs' last axis.
        use_bias: Whether a bias [out_features] is added.
        dtype: Dtype of the computation; None infers it from the inputs and parameters.
        param_dtype: Dtype of the parameters.
        precision: Ignored.
        kernel_init: Initialiser of the kernel.
        bias_init: Initialiser of the bias.
        dot_general: Product to use in place of the FP8 one; None for FP8.
        promote_dtype: Brings `(inputs, kernel, bias)` to one dtype.
        preferred_element_type: Dtype of the product; None for the promoted dtype.
        rngs: Random keys for the parameters.
        kernel_metadata: Metadata of the kernel's `nnx.Param`.
        bias_metadata: Metadata of the bias' `nnx.Param`.
        activation: None, "relu", "gelu" or "silu", applied to the float32 accumulator after the bias.
        recipe: How the operands of the forward and backward products are quantised.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_dot`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> layer = Linear(3, 4, activation="gelu", rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 3))).shape
        (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Array] = default_kernel_init,
        bias_init: Callable[..., Array] = default_bias_init,
        dot_general: Callable[..., Array] | None = None,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        activation: str | None = None,
        recipe: Recipe = DEEPSEEK,
        implementation: str | None = None,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
        )
        if dot_general is not None and activation is not None:
            raise ValueError(f"activation must be None where dot_general replaces the FP8 product, got {activation!r}")
        self.dot_general = dot_general  # type: ignore[assignment]  # None here means FP8
        self.activation = activation
        self.recipe = recipe
        self.implementation = implementation

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Multiplies the last axis of `inputs` [..., in_features] by the kernel.

        Args:
            inputs: Floating-point array [..., in_features].
            out_sharding: Sharding of the result, under explicit sharding.

        Returns:
            Array [..., out_features], of the dtype that `flax.nnx.Linear` would return.
        """
        if self.dot_general is not None:
            return super().__call__(inputs, out_sharding)
        kernel = self.kernel[...]
        bias = self.bias[...] if self.bias is not None else None
        operands = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)

        # Flax adds the bias to a product of the preferred dtype, and the sum promotes.
        out_dtype = self.preferred_element_type
        if out_dtype is not None and bias is not None:
            out_dtype = jnp.result_type(out_dtype, operands[2].dtype)
        if self.promote_dtype is dtypes.promote_dtype:
            # Rounding the kernel to a narrower dtype before FP8 would only lose bits, of its gradient too.
            operands = (operands[0], kernel, bias)
        out = fp8_dot(
            *operands,
            preferred_element_type=out_dtype,
            activation=self.activation,
            recipe=self.recipe,
            implementation=self.implementation,
        )
        return out if out_sharding is None else jax.sharding.reshard(out, out_sharding)


MLP_KEYWORDS = ("kernel_init", "bias_init", "kernel_metadata", "bias_metadata")
"""What `Mlp` passes on to its layers: all that concerns their parameters."""


class Mlp(nnx.Module):
    """The MLP of a transformer in FP8, fused: `down(activation(gate(inputs)) * up(inputs))`, or without gate.

    The layers `gate`, `up` and `down` are `jaxgemm.flax.nnx.Linear`, with Flax's own parameters. These are quantised
    from `param_dtype`, and their gradients have that dtype, also if `dtype` is narrower.

    Args:
        in_features: Size k of the inputs' last axis.
        hidden_features: Columns of `gate` and `up`.
        out_features: Columns of `down`; None for in_features.
        gated: Whether there is a `gate`; without one, `down(activation(up(inputs)))`.
        activation: "relu", "gelu" or "silu".
        use_bias: Whether each layer adds a bias.
        dtype: Dtype of the computation; None infers it from the inputs and parameters.
        param_dtype: Dtype of the parameters.
        rngs: Random keys for the parameters.
        recipe: How operands are quantised.
        low_memory: Whether the backward pass needs less memory and more time, as in `jaxgemm.fp8_mlp`.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_mlp`.
        preferred_element_type: Dtype of the result; None for that of the computation.
        **linear_keywords: Further arguments of the `Linear` layers' parameters: `kernel_init`, `bias_init`,
            `kernel_metadata` and `bias_metadata`.

    Raises:
        TypeError: for other keywords: `fp8_mlp` computes the layers, not their own products.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> Mlp(8, 16, rngs=nnx.Rngs(0))(jnp.ones((2, 8))).shape
        (2, 8)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        gated: bool = True,
        activation: str = "silu",
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        recipe: Recipe = DEEPSEEK,
        low_memory: bool = False,
        implementation: str | None = None,
        preferred_element_type: DTypeLike | None = None,
        **linear_keywords: Any,
    ):
        if unknown := linear_keywords.keys() - MLP_KEYWORDS:
            raise TypeError(f"linear_keywords must be of {', '.join(MLP_KEYWORDS)}, got {', '.join(sorted(unknown))}")

        def layer(in_features: int, out_features: int) -> Linear:
            keywords = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **linear_keywords)
            return Linear(in_features, out_features, recipe=recipe, implementation=implementation, **keywords)

        self.gate = layer(in_features, hidden_features) if gated else None
        self.up = layer(in_features, hidden_features)
        self.down = layer(hidden_features, in_features if out_features is None else out_features)
        self.activation = activation
        self.dtype = dtype
        self.recipe = recipe
        self.low_memory = low_memory
        self.implementation = implementation
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Array) -> Array:
        """Applies the MLP to the last axis of `inputs` [..., k]; returns [..., out_features]."""
        up, down, gate = self.up, self.down, self.gate
        layers = [up, down] if gate is None else [up, down, gate]
        parameters = [a[...] for layer in layers for a in (layer.kernel, layer.bias) if a is not None]
        promoted = dtypes.promote_dtype((inputs, *parameters), dtype=self.dtype)
        return fp8_mlp(
            promoted[0],
            up.kernel[...],
            down.kernel[...],
            None if gate is None else gate.kernel[...],
            bias_up=None if up.bias is None else up.bias[...],
            bias_down=None if down.bias is None else down.bias[...],
            bias_gate=None if gate is None or gate.bias is None else gate.bias[...],
            preferred_element_type=self.preferred_element_type,
            activation=self.activation,
            recipe=self.recipe,
            low_memory=self.low_memory,
            implementation=self.implementation,
        )


def convert(
    model: Model,
    filter: LayerFilter | None = None,
    *,
    recipe: Recipe = DEEPSEEK,
    implementation: str | None = None,
) -> Model:
    """Switches the `nnx.Linear` and `nnx.LinearGeneral` layers of a model to FP8, in place.

    Parameters stay what they were, also where layers share them, and so do their paths. A `Linear`
    becomes `jaxgemm.flax.nnx.Linear`, with its bias fused; a `LinearGeneral` gets an FP8 `dot_general`.
    Embeddings, normalisation, the products inside attention and convolutions are never touched; a layer
    that was given its own `dot_general` keeps it. Convert before `nnx.split` or `nnx.jit` see the model.

    Args:
        model: Any `nnx.Module`.
        filter: Called with the layer's path (the keys from the root to it) and the layer; True switches it.
            None switches all of them. The output head is commonly kept in high precision.
        recipe: How operands are quantised.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_dot`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If there is no layer to switch, as when `filter` names a path that does not exist.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.relu, nnx.Linear(16, 3, rngs=rngs))
        >>> model = convert(model, lambda path, layer: layer.out_features != 3)
        >>> [type(layer).__module__ for layer in (model.layers[0], model.layers[2])]
        ['jaxgemm.flax.nnx', 'flax.nnx.nn.linear']
    """
    plain = [(path, layer) for path, layer in nnx.iter_modules(model) if _is_plain(layer)]
    chosen = [layer for path, layer in plain if filter is None or filter(path, layer)]
    if not chosen:
        raise ValueError(
            f"model must have a Linear or LinearGeneral that filter accepts, got {len(plain)} such layers, "
            "none of them accepted"
        )
    for layer in chosen:
        if isinstance(layer, nnx.LinearGeneral):
            layer.dot_general = _dot_general(recipe, implementation)
            continue
        _become_fp8(layer, recipe, implementation)
    return model


def _become_fp8(layer: Any, recipe: Recipe, implementation: str | None) -> None:
    """Makes a Linear of this module out of Flax's, in place: all that refer to it see the change."""
    layer.__class__ = Linear
    layer.dot_general = None
    layer.activation = None
    layer.recipe = recipe
    layer.implementation = implementation


def _is_plain(layer: Any) -> bool:
    """Whether `layer` is Flax's own Linear or LinearGeneral, with nothing put in its product's place."""
    if type(layer) is nnx.Linear:
        return layer.dot_general is lax.dot_general
    return type(layer) is nnx.LinearGeneral and layer.dot_general is None and layer.dot_general_cls is None


@functools.cache
def _dot_general(recipe: Recipe, implementation: str | None) -> Callable[..., Array]:
    """One function object for each choice: a new one would make `nnx.jit` compile equal models again."""
    return functools.partial(fp8_dot_general, recipe=recipe, implementation=implementation)
