"""Linen: `Dense` with FP8 products and a fused bias, and an interceptor that switches a whole model.

The parameters are Flax's own, in high precision and under the same names: a checkpoint of a
`flax.linen` model loads into the FP8 model and the reverse.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from jaxgemm.dot import fp8_dot, fp8_dot_general
from jaxgemm.mlp import fp8_mlp
from jaxgemm.recipe import DEEPSEEK, Recipe

__all__ = ["Dense", "Mlp", "fp8_interceptor"]

# Says of one layer, by its path in the model and itself, whether it is switched to FP8.
LayerFilter = Callable[[tuple[str, ...], nn.Module], bool]


class Dense(nn.Dense):
    """`flax.linen.Dense` in FP8: `activation(inputs @ kernel + bias)` as one fused product.

    All fields of `flax.linen.Dense` are here, with the same defaults and the same parameters: `kernel`
    [inputs' last axis, features] and `bias` [features], both `param_dtype`. `precision` has no meaning
    for FP8 operands and is ignored. A `dot_general` or `dot_general_cls` replaces the FP8 product.
    The kernel is quantised from `param_dtype` and its gradient has that dtype, also if `dtype` is narrower.

    Attributes:
        activation: None, "relu", "gelu" or "silu", applied to the float32 accumulator after the bias.
        recipe: How the operands of the forward and backward products are quantised.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_dot`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = Dense(features=4, activation="relu")
        >>> x = jnp.ones((2, 3), jnp.bfloat16)
        >>> variables = layer.init(jax.random.key(0), x)
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'bias': (4,), 'kernel': (3, 4)}}
        >>> layer.apply(variables, x).shape
        (2, 4)
    """

    activation: str | None = None
    recipe: Recipe = DEEPSEEK
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Multiplies the last axis of `inputs` [..., k] by the kernel.

        Args:
            inputs: Floating-point array [..., k].

        Returns:
            Array [..., features], of the dtype that `flax.linen.Dense` would return.

        Raises:
            ValueError: If `activation` is given together with a product that cannot fuse it.
        """
        if self.dot_general is None and self.dot_general_cls is None:
            return _fused_dense(
                self,
                inputs,
                activation=self.activation,
                recipe=self.recipe,
                implementation=self.implementation,
            )
        if self.activation is not None:
            raise ValueError(
                f"activation must be None where dot_general replaces the FP8 product, got {self.activation!r}"
            )
        return super().__call__(inputs)


class Mlp(nn.Module):
    """The MLP of a transformer in FP8, fused: `down(activation(gate(inputs)) * up(inputs))`, or without gate.

    The parameters are those of three `flax.linen.Dense` layers named `gate`, `up` and `down`. They are quantised
    from `param_dtype`, and their gradients have that dtype, also if `dtype` is narrower.

    Attributes:
        hidden_features: Columns of `gate` and `up`.
        features: Columns of `down`; None for the inputs' last axis.
        gated: Whether there is a `gate`; without one, `down(activation(up(inputs)))`.
        activation: "relu", "gelu" or "silu".
        use_bias: Whether each layer adds a bias.
        dtype: Dtype of the computation; None infers it from the inputs and parameters.
        param_dtype: Dtype of the parameters.
        kernel_init: Initialiser of the kernels.
        bias_init: Initialiser of the biases.
        recipe: How operands are quantised.
        low_memory: Whether the backward pass needs less memory and more time, as in `jaxgemm.fp8_mlp`.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_mlp`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> layer = Mlp(hidden_features=16)
        >>> variables = layer.init(jax.random.key(0), jnp.ones((2, 8)))
        >>> jax.tree.map(jnp.shape, variables)
        {'params': {'down': {'kernel': (16, 8)}, 'gate': {'kernel': (8, 16)}, 'up': {'kernel': (8, 16)}}}
    """

    hidden_features: int
    features: int | None = None
    gated: bool = True
    activation: str = "silu"
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Callable[..., Any] = nn.linear.default_kernel_init
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    recipe: Recipe = DEEPSEEK
    low_memory: bool = False
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Applies the MLP to the last axis of `inputs` [..., k]; returns [..., features], of the promoted dtype."""
        in_features = jnp.shape(inputs)[-1]
        gate, gate_bias = self._layer("gate", in_features, self.hidden_features) if self.gated else (None, None)
        up, up_bias = self._layer("up", in_features, self.hidden_features)
        features = in_features if self.features is None else self.features
        down, down_bias = self._layer("down", self.hidden_features, features)
        promoted: Any = nn.dtypes.promote_dtype(inputs, gate, up, down, gate_bias, up_bias, down_bias, dtype=self.dtype)
        return fp8_mlp(
            promoted[0],
            up,
            down,
            gate,
            bias_up=up_bias,
            bias_down=down_bias,
            bias_gate=gate_bias,
            activation=self.activation,
            recipe=self.recipe,
            low_memory=self.low_memory,
            implementation=self.implementation,
        )

    def _layer(self, name: str, in_features: int, features: int) -> tuple[Array, Array | None]:
        return _DenseParameters(
            in_features, features, self.use_bias, self.param_dtype, self.kernel_init, self.bias_init, name=name
        )()


class _DenseParameters(nn.Module):
    """Kernel and bias of a Dense layer, made or read as `flax.linen.Dense` does."""

    in_features: int
    features: int
    use_bias: bool
    param_dtype: Any
    kernel_init: Callable[..., Any]
    bias_init: Callable[..., Any]

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", self.kernel_init, (self.in_features, self.features), self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        return kernel, bias


def fp8_interceptor(
    filter: LayerFilter | None = None, *, recipe: Recipe = DEEPSEEK, implementation: str | None = None
) -> Callable[..., Any]:
    """Returns an interceptor under which a model's `Dense` and `DenseGeneral` layers multiply in FP8.

    Nothing in the model changes: parameters, their names and their initial values stay what they were,
    and the layers are plain again outside the `with` block. Embeddings, normalisation, the products
    inside attention and convolutions are never touched; a layer that was given its own `dot_general`
    keeps it. `Dense` gets its bias fused.

    Args:
        filter: Called with the layer's path (the names from the root to it) and the layer; True switches it.
            None switches all of them. The output head is commonly kept in high precision.
        recipe: How operands are quantised.
        implementation: None, "mosaic", "triton" or "xla", as in `jaxgemm.fp8_dot`.

    Returns:
        A function for `flax.linen.intercept_methods`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(3, name="head")])
        >>> x = jnp.ones((2, 8))
        >>> variables = model.init(jax.random.key(0), x)
        >>> with nn.intercept_methods(fp8_interceptor(lambda path, layer: path[-1] != "head")):
        ...     y = model.apply(variables, x)
        >>> y.shape
        (2, 3)
    """
    dot_general = functools.partial(fp8_dot_general, recipe=recipe, implementation=implementation)

    def intercept(
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        layer = context.module
        if context.method_name != "__call__" or not _is_plain(layer):
            return call(*args, **kwargs)
        if filter is not None and not filter(layer.path, layer):
            return call(*args, **kwargs)
        if isinstance(layer, nn.Dense):
            return _fused_dense(layer, *args, **kwargs, recipe=recipe, implementation=implementation)
        return _call_with_dot_general(layer, dot_general, call, args, kwargs)

    return intercept


def _is_plain(layer: nn.Module) -> bool:
    """Whether `layer` multiplies as Flax's own Dense or DenseGeneral does, with nothing put in its place."""
    own_call = type(layer).__call__
    if own_call is not nn.Dense.__call__ and own_call is not nn.DenseGeneral.__call__:
        return False
    return layer.dot_general is None and layer.dot_general_cls is None


def _fused_dense(layer: nn.Dense, inputs: Array, **fp8_dot_keywords: Any) -> Array:
    """The product of a Dense layer, with its parameters made or read just as `flax.linen.Dense` does."""
    in_features = jnp.shape(inputs)[-1]
    kernel = layer.param("kernel", layer.kernel_init, (in_features, layer.features), layer.param_dtype)
    bias = None
    if layer.use_bias:
        bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype)
    operands: Any = layer.promote_dtype(inputs, kernel, bias, dtype=layer.dtype)
    if layer.promote_dtype is nn.Dense.promote_dtype:
        # Rounding the kernel to a narrower dtype before FP8 would only lose bits, of its gradient too.
        operands = (operands[0], kernel, bias)
    return fp8_dot(*operands, **fp8_dot_keywords)


def _call_with_dot_general(
    layer: nn.Module,
    dot_general: Callable[..., Array],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls `layer` with its `dot_general` field replaced for the length of this call."""
    # A bound module refuses assignment, and a clone would need a scope of its own: set the field beneath.
    object.__setattr__(layer, "dot_general", dot_general)
    try:
        return call(*args, **kwargs)
    finally:
        object.__setattr__(layer, "dot_general", None)
