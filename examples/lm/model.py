"""The model: a pre-norm transformer over bytes, whose linear layers run in FP8 or in high precision.

Embedding, normalisation, attention and head stay in high precision in both, as in the DeepSeek-V3 report,
3.3.1. The parameters are the same in both, so one seed starts both at the same point.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxgemm.flax.linen as fp8_nn
from lm.text import VOCABULARY


class Transformer(nn.Module):
    """Logits of the next byte: uint8 `[batch, seq]` to float32 `[batch, seq, 256]`.

    Attributes:
        num_layers, num_heads, d_model, d_ff: Sizes.
        dtype: Dtype of the computation; parameters are float32.
        attention: Implementation of `jax.nn.dot_product_attention`.
        fp8: Whether the linear layers of the blocks multiply in FP8.
    """

    num_layers: int
    num_heads: int
    d_model: int
    d_ff: int
    dtype: jnp.dtype
    attention: Literal["xla", "cudnn"]
    fp8: bool

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Runs the blocks between the embedding and the head."""
        x = nn.Embed(VOCABULARY, self.d_model, dtype=self.dtype, name="embedding")(tokens.astype(jnp.int32))
        for layer in range(self.num_layers):
            x += self._attention(x, f"attention_{layer}")
            x += self._feed_forward(x, f"feed_forward_{layer}")
        x = nn.RMSNorm(dtype=self.dtype, name="final_norm")(x)
        return nn.Dense(VOCABULARY, dtype=self.dtype, name="head")(x).astype(jnp.float32)

    def _attention(self, x: jax.Array, name: str) -> jax.Array:
        x = nn.RMSNorm(dtype=self.dtype, name=f"{name}_norm")(x)
        qkv = self._linear(x, 3 * self.d_model, f"{name}_qkv")
        heads = qkv.reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, key, value = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(
            rotate(query), rotate(key), value, is_causal=True, implementation=self.attention
        )
        return self._linear(mixed.reshape(x.shape), self.d_model, f"{name}_out")

    def _feed_forward(self, x: jax.Array, name: str) -> jax.Array:
        x = nn.RMSNorm(dtype=self.dtype, name=f"{name}_norm")(x)
        hidden = self._linear(x, self.d_ff, f"{name}_up", activation="gelu")
        return self._linear(hidden, self.d_model, f"{name}_down")

    def _linear(self, x: jax.Array, features: int, name: str, activation: str | None = None) -> jax.Array:
        if self.fp8:
            return fp8_nn.Dense(features, dtype=self.dtype, activation=activation, name=name)(x)
        y = nn.Dense(features, dtype=self.dtype, name=name)(x)
        return nn.gelu(y) if activation == "gelu" else y


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features by angles that grow with the position (rotary embedding, arXiv 2104.09864).

    Args:
        x: `[batch, seq, heads, size]`, size even.
    """
    seq, half = x.shape[1], x.shape[-1] // 2
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(seq, dtype=jnp.float32)[:, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1).astype(x.dtype)


def cross_entropy(model: nn.Module, params: Any, windows: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Mean negative log-likelihood, in nats, of each byte of uint8 `[batch, seq + 1]` given those before.

    Returns:
        The loss, and what layers sowed: "losses" that training adds to it, and "metrics" that are only watched.
    """
    logits: Any
    logits, sown = model.apply({"params": params}, windows[:, :-1], mutable=["losses", "metrics"])
    targets = windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), dict(sown)
