"""A mixture of experts in place of the transformer's feed-forward layer: router, permutation, grouped products.

Each token goes to its `top_k` best experts. The copies of all tokens are sorted by expert, so that one grouped product
serves all of them, however many tokens each got: there is no capacity, and no token is dropped. Router and weighted
sum stay in float32, as in the DeepSeek-V3 report, 3.3.1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxgemm
from lm.model import Transformer


class Routing(NamedTuple):
    """Where the copies of each token go; `tokens * top_k` copies, sorted by expert."""

    source: jax.Array  # int32 [copies] token that each sorted row is a copy of
    position: jax.Array  # int32 [tokens, top_k] sorted row of each copy
    weights: jax.Array  # float32 [tokens, top_k] share of each expert in the token's output
    group_sizes: jax.Array  # int32 [g] rows of each expert
    balance_loss: jax.Array  # float32 [] about 1 if every expert gets the same, g if one gets all


def route(logits: jax.Array, top_k: int) -> Routing:
    """Chooses the experts of tokens by the router's float32 logits `[tokens, g]`, and sorts the copies by expert."""
    num_tokens, num_experts = logits.shape
    probabilities = jax.nn.softmax(logits)
    top, experts = jax.lax.top_k(probabilities, top_k)
    weights = top / top.sum(axis=1, keepdims=True)

    # Sort the copies by expert, and remember where each went.
    order = jnp.argsort(experts.reshape(-1), stable=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size))
    group_sizes = jnp.bincount(experts.reshape(-1), length=num_experts)

    # Load-balancing loss of the Switch Transformer (arXiv 2101.03961, 2.2), over all copies.
    load = group_sizes / (num_tokens * top_k)
    balance_loss = num_experts * jnp.sum(load * probabilities.mean(axis=0))
    return Routing(order // top_k, position.reshape(num_tokens, top_k), weights, group_sizes, balance_loss)


class MixtureOfExperts(nn.Module):
    """Sends each token through `top_k` of `num_experts` SwiGLU layers: `[tokens, d_model]` to the like.

    Sows the loss that balances the load, in "losses", and the share of all rows that each expert got, in "metrics".

    Attributes:
        num_experts, top_k, d_ff: Sizes.
        balance_weight: Of the balancing loss.
        dtype: Dtype of the products' operands and results; parameters are float32.
        fp8: Whether experts multiply in FP8, or by `jax.lax.ragged_dot`.
        implementation: Of the FP8 products.
    """

    num_experts: int
    top_k: int
    d_ff: int
    balance_weight: float
    dtype: jnp.dtype
    fp8: bool
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Routes, multiplies, and adds up."""
        features = x.shape[1]
        router = nn.Dense(self.num_experts, use_bias=False, dtype=jnp.float32, name="router")
        routing = route(router(x.astype(jnp.float32)), self.top_k)
        self.sow("losses", "balance", self.balance_weight * routing.balance_loss)
        self.sow("metrics", "load", routing.group_sizes / (x.shape[0] * self.top_k))

        # One product for gate and up: the rows are quantised once.
        rows = x[routing.source].astype(self.dtype)
        gate, up = jnp.split(self._product(rows, 2 * self.d_ff, routing.group_sizes, "gate_up"), 2, axis=1)
        outputs = self._product(nn.silu(gate) * up, features, routing.group_sizes, "down")

        # Put each token's copies side by side again, and add them up by their weights.
        copies = outputs[routing.position].astype(jnp.float32)
        return jnp.einsum("tkd,tk->td", copies, routing.weights).astype(x.dtype)

    def _product(self, rows: jax.Array, columns: int, group_sizes: jax.Array, name: str) -> jax.Array:
        """Multiplies each group of rows by its expert's matrix: `[m, k]` to `[m, columns]`."""
        init = nn.initializers.lecun_normal(batch_axis=0)
        weights = self.param(name, init, (self.num_experts, rows.shape[1], columns))
        if self.fp8:
            return jaxgemm.grouped_fp8_dot(rows, weights, group_sizes, implementation=self.implementation)
        return jax.lax.ragged_dot(rows, weights.astype(self.dtype), group_sizes)


class MixtureTransformer(Transformer):
    """A `Transformer` whose feed-forward layers are mixtures of experts, as `MixtureOfExperts` has them."""

    num_experts: int
    top_k: int
    balance_weight: float
    implementation: str | None = None

    def _feed_forward(self, x: jax.Array, name: str) -> jax.Array:
        tokens = nn.RMSNorm(dtype=self.dtype, name=f"{name}_norm")(x).reshape(-1, x.shape[-1])
        experts = MixtureOfExperts(
            num_experts=self.num_experts,
            top_k=self.top_k,
            d_ff=self.d_ff,
            balance_weight=self.balance_weight,
            dtype=self.dtype,
            fp8=self.fp8,
            implementation=self.implementation,
            name=f"{name}_experts",
        )
        return experts(tokens).reshape(x.shape)
