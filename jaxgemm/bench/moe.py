"""A mixture-of-experts layer forward and backward: what FP8 is worth with routing and permuting around the products."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm.bench import peers
from jaxgemm.bench.measure import Call
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

GroupedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class MoeCase:
    """Router, permutation and SwiGLU experts, by default of the size of Mixtral 8x7B, 8192 tokens.

    Attributes:
        tokens: rows of the input.
        experts: how many there are.
        top_k: experts of a token.
        width: of the input and output.
        hidden: of an expert.
    """

    tokens: int = 8192
    experts: int = 8
    top_k: int = 2
    width: int = 4096
    hidden: int = 14336

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return (
            f"layer: {self.tokens} tokens, {self.experts} experts, top {self.top_k}, "
            f"width {self.width}, hidden {self.hidden}"
        )

    @property
    def flops(self) -> float:
        """Of the experts' products, forward and backward; the router's are left out of the rate, not of the time."""
        return 6.0 * self.tokens * self.top_k * 3 * self.width * self.hidden


def run_case(case: MoeCase, setup: Setup) -> list[Row]:
    """Measures forward and backward (gradients of input, router and weights), weights quantised in each step."""
    x, dout = normal(0, case.tokens, case.width), normal(9, case.tokens, case.width)
    weights = {
        "router": normal(1, case.width, case.experts, dtype=jnp.float32) * case.width**-0.5,
        "gate_up": normal(2, case.experts, case.width, 2 * case.hidden) * jnp.bfloat16(case.width**-0.5),
        "down": normal(3, case.experts, case.hidden, case.width) * jnp.bfloat16(case.hidden**-0.5),
    }
    arguments = [x, weights, dout]

    def fp8_dot(rows: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return jaxgemm.grouped_fp8_dot(rows, w, sizes, implementation=setup.implementation)

    own = Call.jitted(_training_step(case, fp8_dot), arguments)
    calls, missing = {OWN: own}, {}
    if "xla-bf16" in setup.peers:
        calls["xla-bf16"] = Call.jitted(_training_step(case, jax.lax.ragged_dot), arguments)
    if "tokamax" in setup.peers:
        made = peers.prepare("tokamax", lambda: Call.jitted(_training_step(case, peers.tokamax_dot()), arguments))
        calls, missing = {**calls, **made[0]}, made[1]
    result = own.first()
    row = Row(case.name, dict(group="layer", cold=False, **dataclasses.asdict(case)), case.flops, 0.0)
    row.bytes = float(stored_bytes(arguments, result))
    row.measured(setup, calls, missing)
    row.compared_with_bf16(calls, result)
    return [row]


def _training_step(case: MoeCase, dot: GroupedDot) -> Callable[..., Any]:
    def training_step(x: jax.Array, weights: dict[str, jax.Array], dout: jax.Array) -> Any:
        out, pull_back = jax.vjp(lambda x, weights: _layer(case, dot, x, weights), x, weights)
        return out, pull_back(dout)

    return training_step


def _layer(case: MoeCase, dot: GroupedDot, x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
    """Sends each token through its experts, and adds up what they return by the router's shares."""
    shares, experts = jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32) @ weights["router"]), case.top_k)
    shares = shares / shares.sum(axis=1, keepdims=True)
    order = jnp.argsort(experts.reshape(-1), stable=True)
    position = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype)).reshape(experts.shape)
    sizes = jnp.bincount(experts.reshape(-1), length=case.experts)

    gate, up = jnp.split(dot(x[order // case.top_k], weights["gate_up"], sizes), 2, axis=1)
    copies = dot(jax.nn.silu(gate) * up, weights["down"], sizes)[position]
    return jnp.einsum("tkd,tk->td", copies.astype(jnp.float32), shares).astype(x.dtype)
