"""A mixture of experts whose products are FP8: a router, `grouped_fp8_dot` and a loss that balances the load.

Each token goes to its `top_k` best experts. Rows are sorted by expert, so that one grouped product serves all
of them, however many tokens each got: there is no capacity, and no token is dropped. The router stays in
float32, as in the DeepSeek-V3 report, 3.3.1.

    python examples/moe.py --steps 200
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import jaxgemm


@dataclass(frozen=True)
class Sizes:
    """Sizes of the layer."""

    num_experts: int = 8
    top_k: int = 2
    d_model: int = 64
    d_ff: int = 128


class Params(NamedTuple):
    """Float32 parameters of the layer; `g` experts."""

    router: jax.Array  # [d_model, g]
    up: jax.Array  # [g, d_model, d_ff]
    up_bias: jax.Array  # [g, d_ff]
    down: jax.Array  # [g, d_ff, d_model]


class Routing(NamedTuple):
    """Where the copies of each token go; `tokens * top_k` copies, sorted by expert."""

    source: jax.Array  # [copies] token that each sorted row is a copy of
    position: jax.Array  # [tokens, top_k] sorted row of each copy
    weights: jax.Array  # [tokens, top_k] share of each expert in the token's output
    group_sizes: jax.Array  # [g] rows of each expert
    balance_loss: jax.Array  # [] about 1 if every expert gets the same, g if one gets all


def init_params(sizes: Sizes, key: jax.Array) -> Params:
    """Draws parameters."""
    keys = jax.random.split(key, 3)
    normal = jax.nn.initializers.lecun_normal(batch_axis=0)
    return Params(
        router=jax.nn.initializers.lecun_normal()(keys[0], (sizes.d_model, sizes.num_experts)),
        up=normal(keys[1], (sizes.num_experts, sizes.d_model, sizes.d_ff)),
        up_bias=jnp.zeros((sizes.num_experts, sizes.d_ff)),
        down=normal(keys[2], (sizes.num_experts, sizes.d_ff, sizes.d_model)),
    )


def route(router: jax.Array, x: jax.Array, top_k: int) -> Routing:
    """Chooses the experts of tokens `x` [tokens, d_model] and sorts the copies by expert."""
    num_tokens, num_experts = x.shape[0], router.shape[1]
    probabilities = jax.nn.softmax(x.astype(jnp.float32) @ router)
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


def moe_layer(params: Params, x: jax.Array, top_k: int) -> tuple[jax.Array, Routing]:
    """Sends tokens `x` [tokens, d_model] through their experts; returns the like, and their routing."""
    routing = route(params.router, x, top_k)
    rows = x[routing.source]
    hidden = jaxgemm.grouped_fp8_dot(rows, params.up, routing.group_sizes, params.up_bias, activation="silu")
    outputs = jaxgemm.grouped_fp8_dot(hidden, params.down, routing.group_sizes)

    # Put each token's copies side by side again, and add them up by their weights.
    copies = outputs[routing.position].astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", copies, routing.weights).astype(x.dtype), routing


def make_task(sizes: Sizes, num_tokens: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens around as many centres as there are experts, each with a linear map of its own to learn."""
    keys = jax.random.split(key, 4)
    centres = jax.random.normal(keys[0], (sizes.num_experts, sizes.d_model))
    maps = jax.random.normal(keys[1], (sizes.num_experts, sizes.d_model, sizes.d_model)) / sizes.d_model**0.5
    kind = jax.random.randint(keys[2], (num_tokens,), 0, sizes.num_experts)
    x = centres[kind] + 0.5 * jax.random.normal(keys[3], (num_tokens, sizes.d_model))
    return x, jnp.einsum("td,tde->te", x, maps[kind])


def train(sizes: Sizes, steps: int, num_tokens: int, seed: int) -> tuple[Params, list[float]]:
    """Trains the layer on the task, and prints as it goes; returns the parameters and every step's loss."""
    task_key, params_key = jax.random.split(jax.random.key(seed))
    x, target = make_task(sizes, num_tokens, task_key)
    params = init_params(sizes, params_key)
    optimizer = optax.adam(3e-3)
    optimizer_state = optimizer.init(params)

    def loss_function(params: Params) -> tuple[jax.Array, tuple[jax.Array, Routing]]:
        y, routing = moe_layer(params, x, sizes.top_k)
        error = jnp.mean(jnp.square(y - target)) / jnp.mean(jnp.square(target))
        return error + 0.01 * routing.balance_loss, (error, routing)

    @jax.jit
    def step_function(params, optimizer_state):
        gradient, (error, routing) = jax.grad(loss_function, has_aux=True)(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state, error, routing

    errors = []
    for step in range(steps):
        params, optimizer_state, error, routing = step_function(params, optimizer_state)
        errors.append(float(error))
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            sizes_text = " ".join(f"{size:4d}" for size in routing.group_sizes.tolist())
            balance = float(routing.balance_loss)
            print(f"step {step:4d}  error {errors[-1]:.4f}  balance {balance:.3f}  rows an expert: {sizes_text}")
    return params, errors


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and trains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    train(Sizes(), arguments.steps, arguments.tokens, arguments.seed)


if __name__ == "__main__":
    main()
