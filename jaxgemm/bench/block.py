"""A gated MLP, and a transformer block around it, forward and backward: attention stays in bfloat16."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm.bench.measure import Call, temporary_mib
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

Dot = Callable[[jax.Array, jax.Array], jax.Array]
Mlp = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Of x, gate and up side by side `[k, 2 h]`, and down `[h, k]`."""

LAYERS = f"{OWN}, layer by layer"
"""Column with the MLP as two products and an activation between them, in place of the fused one."""


@dataclasses.dataclass(frozen=True)
class MlpCase:
    """A SwiGLU MLP, by default of the size of Llama 3 8B.

    Attributes:
        rows: of the input.
        width: of the input and the output.
        hidden: of gate and up.
    """

    rows: int = 8192
    width: int = 4096
    hidden: int = 14336

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"mlp: {self.rows} rows, {self.width} -> 2 x {self.hidden} -> {self.width}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of x, and of the result."""
        return self.rows, self.width

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the linear layers, `[k, n]`."""
        return {"gate_up": (self.width, 2 * self.hidden), "down": (self.hidden, self.width)}

    @property
    def flops(self) -> float:
        """Forward and backward."""
        return 6.0 * self.rows * sum(k * n for k, n in self.weight_shapes.values())


@dataclasses.dataclass(frozen=True)
class BlockCase:
    """Attention and a SwiGLU MLP with their norms, by default of the size of Llama 3 8B, 8192 tokens.

    Attributes:
        batch: sequences.
        length: tokens of a sequence.
        width: of the residual stream.
        hidden: of the MLP.
        heads: of attention.
        kv_heads: of keys and values.
        attention: implementation that `jax.nn.dot_product_attention` takes.
    """

    batch: int = 4
    length: int = 2048
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    attention: Literal["cudnn", "xla"] = "cudnn"

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"block: {self.batch}x{self.length} tokens, width {self.width}, hidden {self.hidden}"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of x, and of the result."""
        return self.batch, self.length, self.width

    @property
    def head_width(self) -> int:
        """Of one head."""
        return self.width // self.heads

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the linear layers, `[k, n]`."""
        return {
            "qkv": (self.width, (self.heads + 2 * self.kv_heads) * self.head_width),
            "out": (self.width, self.width),
            "gate_up": (self.width, 2 * self.hidden),
            "down": (self.hidden, self.width),
        }

    @property
    def flops(self) -> float:
        """Of the linear layers, forward and backward; attention's are left out of the rate, not of the time."""
        return 6.0 * self.batch * self.length * sum(k * n for k, n in self.weight_shapes.values())


def run_case(case: BlockCase | MlpCase, setup: Setup) -> list[Row]:
    """Measures forward and backward (gradients of input and weights), weights quantised in each step."""
    x = normal(0, *case.input_shape)
    weights = {
        name: normal(i + 1, *shape) * jnp.bfloat16(shape[0] ** -0.5)
        for i, (name, shape) in enumerate(case.weight_shapes.items())
    }
    arguments = [x, weights, normal(9, *x.shape)]

    fp8_dot, fp8_mlp = fp8_products(case, setup.implementation)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention does not pass under "strict"
        own = Call.jitted(_training_step(case, fp8_dot, fp8_mlp), arguments)
        by_layer = Call.jitted(_training_step(case, fp8_dot), arguments)
        calls = {OWN: own, LAYERS: by_layer}
        if "xla-bf16" in setup.peers:
            calls["xla-bf16"] = Call.jitted(_training_step(case, jnp.matmul), arguments)
    result = own.first()
    row = Row(case.name, dict(group=case.name.split(":")[0], cold=False, **dataclasses.asdict(case)), case.flops, 0.0)
    row.bytes = float(stored_bytes(arguments, result))
    row.measured(setup, calls)
    row.compared_with_bf16(calls, result)
    row.checks["layer by layer temp MiB"] = temporary_mib(by_layer)
    return [row]


def fp8_products(case: BlockCase | MlpCase, implementation: str | None) -> tuple[Dot, Mlp]:
    """Returns a linear layer and the whole MLP in FP8."""

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        return jaxgemm.fp8_dot(x, w, implementation=implementation)

    def mlp(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        gate_up = gate_up.reshape(case.width, 2, case.hidden)
        return jaxgemm.fp8_mlp(x, gate_up, down, implementation=implementation)

    return dot, mlp


def _training_step(case: BlockCase | MlpCase, dot: Dot, mlp: Mlp | None = None) -> Callable[..., Any]:
    def forward(x: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
        if isinstance(case, BlockCase):
            return transformer_block(case, dot, x, weights, mlp)
        return (mlp or functools.partial(_mlp, dot))(x, weights["gate_up"], weights["down"])

    def training_step(x: jax.Array, weights: dict[str, jax.Array], dout: jax.Array) -> Any:
        out, pull_back = jax.vjp(forward, x, weights)
        return out, pull_back(dout)

    return training_step


def transformer_block(
    case: BlockCase, dot: Dot, x: jax.Array, weights: dict[str, jax.Array], mlp: Mlp | None = None
) -> jax.Array:
    """Attention and MLP, each behind a norm and added to `x` [batch, length, width]; the MLP made of `dot` if None."""
    x = x + dot(_attention(case, dot(rms_norm(x), weights["qkv"])), weights["out"])
    return x + (mlp or functools.partial(_mlp, dot))(rms_norm(x), weights["gate_up"], weights["down"])


def _mlp(dot: Dot, x: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
    gate, up = jnp.split(dot(x, gate_up), 2, -1)
    return dot(jax.nn.silu(gate) * up, down)


def _attention(case: BlockCase, qkv: jax.Array) -> jax.Array:
    heads = qkv.reshape(*qkv.shape[:-1], case.heads + 2 * case.kv_heads, case.head_width)
    q, k, v = jnp.split(heads, (case.heads, case.heads + case.kv_heads), -2)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=case.attention)
    return out.reshape(*qkv.shape[:-1], case.width)


def rms_norm(x: jax.Array) -> jax.Array:
    """Divides by the root of the mean square of the last axis, in float32."""
    high = x.astype(jnp.float32)
    return (high * jax.lax.rsqrt((high * high).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)
