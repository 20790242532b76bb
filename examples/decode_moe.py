"""Decoding with a mixture of experts: one compiled step for all steps, however many tokens each expert gets.

The experts' weights are quantised once. In every step, the tokens of the sequences that are not finished yet (fewer
and fewer) are put into groups `[experts, batch, d_model]`, one group for each expert; `masked_m` counts the rows of
each group that hold a token. It is an array on the device, so that no step compiles anything anew. The Hopper kernels
read no tile of rows that all lie past it: products leave these unwritten, and quantising writes zeros there. What XLA
does between them, the SwiGLU for one, it does for every row. At the end, every step's result is compared with that of
each token by itself.

    python examples/decode_moe.py                                              # small, for a CPU
    python examples/decode_moe.py --experts 8 --d-model 4096 --d-ff 14336 --batch 128 --steps 64   # for a GPU
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flags import positive_int

import jaxgemm
from jaxgemm import ScaledArray

COMPILATION = "/jax/core/compile/backend_compile_duration"
"""What JAX calls a compilation where it tells of its doings."""


class Weights(NamedTuple):
    """A router and its `g` experts, SwiGLU layers; their matrices are right operands, the contracted axis last."""

    router: jax.Array  # float32 [d_model, g]
    gate_up: ScaledArray  # [g, 2 * d_ff, d_model]
    down: ScaledArray  # [g, d_model, d_ff]


def init_weights(num_experts: int, d_model: int, d_ff: int, key: jax.Array) -> Weights:
    """Draws weights and quantises the experts' once, in blocks of 128x128."""
    keys = jax.random.split(key, 3)
    gate_up = jax.random.normal(keys[1], (num_experts, 2 * d_ff, d_model)) / d_model**0.5
    down = jax.random.normal(keys[2], (num_experts, d_model, d_ff)) / d_ff**0.5
    return Weights(
        router=jax.random.normal(keys[0], (d_model, num_experts)),
        gate_up=jaxgemm.quantize(gate_up, (128, 128)),
        down=jaxgemm.quantize(down, (128, 128)),
    )


def route(weights: Weights, x: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the experts of each token, int32 `[batch, top_k]`, and their shares, float32."""
    shares, experts = jax.lax.top_k(jax.nn.softmax(x.astype(jnp.float32) @ weights.router), top_k)
    return experts, shares / shares.sum(axis=1, keepdims=True)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """Returns `silu(gate) * up` of `[..., 2 * d_ff]`, rounded once, to its dtype.

    Told to round, the compiler does: by itself it may keep more digits where it fuses this into what comes next, in one
    program and not in another, and FP8 values would differ.
    """
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    info = jnp.finfo(gate_up.dtype)
    return jax.lax.reduce_precision(jax.nn.silu(gate) * up, info.nexp, info.nmant).astype(gate_up.dtype)


def moe_layer(
    weights: Weights, x: jax.Array, is_active: jax.Array, top_k: int, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Sends the active tokens of `x` [batch, d_model] through their experts.

    Args:
        weights: Router and experts.
        x: bfloat16 or float32 `[batch, d_model]`.
        is_active: bool `[batch]`; a token that is not goes to no expert, and gets zeros.
        top_k: Experts of a token.
        implementation: Of the experts' products.

    Returns:
        The outputs `[batch, d_model]`, and `masked_m` [g]: the rows that each expert got.
    """
    (batch, d_model), num_experts = x.shape, weights.router.shape[1]
    experts, shares = route(weights, x, top_k)

    # Give each copy of an active token the next free row of its expert's group. A token goes to an expert at most
    # once, so that a group never needs more than `batch` rows.
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.int32).sum(axis=1) * is_active[:, None]
    masked_m = chosen.sum(axis=0)
    row = jnp.take_along_axis(jnp.cumsum(chosen, axis=0) - 1, experts, axis=1)
    row = jnp.where(is_active[:, None], row, batch)
    groups = jnp.zeros((num_experts, batch, d_model), x.dtype).at[experts, row].set(x[:, None], mode="drop")

    # What lies past `masked_m` is never looked at again, so that nothing needs to be written there.
    options: dict[str, Any] = dict(
        expected_m=max(1, batch * top_k // num_experts), fill="unspecified", implementation=implementation
    )
    lhs = jaxgemm.quantize(groups, valid_rows=masked_m)
    hidden = swiglu(jaxgemm.masked_grouped_gemm(lhs, weights.gate_up, masked_m, **options))
    lhs = jaxgemm.quantize(hidden, valid_rows=masked_m)
    outputs = jaxgemm.masked_grouped_gemm(lhs, weights.down, masked_m, **options)

    copies = outputs.at[experts, row].get(mode="fill", fill_value=0).astype(jnp.float32)
    return jnp.einsum("tkd,tk->td", copies, shares).astype(x.dtype), masked_m


def token_layer(weights: Weights, x: jax.Array, top_k: int) -> jax.Array:
    """The same for one token `[d_model]`, with one plain product after another."""
    experts, shares = route(weights, x[None], top_k)

    def one_expert(expert: jax.Array) -> jax.Array:
        gate_up, down = (jax.tree.map(lambda leaf: leaf[expert], w) for w in (weights.gate_up, weights.down))
        hidden = swiglu(jaxgemm.gemm(jaxgemm.quantize(x[None]), gate_up))
        return jaxgemm.gemm(jaxgemm.quantize(hidden), down)[0]

    copies = jnp.stack([one_expert(experts[0, i]) for i in range(top_k)]).astype(jnp.float32)
    return (shares[0] @ copies).astype(x.dtype)


def decode(
    weights: Weights, x: jax.Array, lengths: np.ndarray, top_k: int, implementation: str | None = None
) -> tuple[list[dict[str, Any]], int]:
    """Takes steps until all sequences have their length, each from the last one's outputs.

    Args:
        weights: Router and experts.
        x: `[batch, d_model]`, what the first step gets.
        lengths: int `[batch]`, steps of each sequence.
        top_k: Experts of a token.
        implementation: Of the experts' products.

    Returns:
        For each step its `x`, `is_active`, `y` and `masked_m`; and how often JAX compiled after the first step.
    """

    @jax.jit
    def step(weights: Weights, x: jax.Array, is_active: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        y, masked_m = moe_layer(weights, x, is_active, top_k, implementation)
        following = (x + y).astype(jnp.float32)
        following *= jax.lax.rsqrt(jnp.square(following).mean(axis=1, keepdims=True))
        return y, masked_m, following.astype(x.dtype)

    compilations: list[str] = []

    def listen(event: str, duration_secs: float, **metadata: str | int) -> None:
        if event == COMPILATION:
            compilations.append(event)

    steps = []
    after_first = 0
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for i in range(int(lengths.max())):
            is_active = lengths > i
            y, masked_m, following = step(weights, x, is_active)
            steps.append(dict(x=x, is_active=is_active, y=y, masked_m=np.asarray(masked_m)))
            x = following
            if i == 0:
                after_first = len(compilations)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return steps, len(compilations) - after_first


def largest_error(weights: Weights, steps: list[dict[str, Any]], top_k: int) -> float:
    """Returns by how much, relative in norm, any step differs from each token by itself (zeros if not active)."""

    @jax.jit
    def error(weights: Weights, x: jax.Array, is_active: jax.Array, y: jax.Array) -> jax.Array:
        alone = jax.lax.map(lambda token: token_layer(weights, token, top_k), x)
        expected = jnp.where(is_active[:, None], alone, 0).astype(jnp.float32)
        return jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)

    return max(float(error(weights, step["x"], step["is_active"], step["y"])) for step in steps)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Decodes, and says what was compiled and how far the results are from those of each token by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=positive_int, default=8)
    parser.add_argument("--top-k", type=positive_int, default=2)
    parser.add_argument("--d-model", type=positive_int, default=256)
    parser.add_argument("--d-ff", type=positive_int, default=512)
    parser.add_argument("--batch", type=positive_int, default=16, help="sequences")
    parser.add_argument("--steps", type=positive_int, default=8, help="of the longest sequence")
    parser.add_argument("--implementation", choices=("mosaic", "xla"), help="of the experts' products")
    arguments = parser.parse_args(argv)
    if arguments.top_k > arguments.experts:
        parser.error(f"--top-k must be from 1 to --experts {arguments.experts}, got {arguments.top_k}")

    keys = jax.random.split(jax.random.key(0), 2)
    weights = init_weights(arguments.experts, arguments.d_model, arguments.d_ff, keys[0])
    x = jax.random.normal(keys[1], (arguments.batch, arguments.d_model)).astype(jnp.bfloat16)
    lengths = np.linspace(1, arguments.steps, arguments.batch).round().astype(int)
    steps, compilations = decode(weights, x, lengths, arguments.top_k, arguments.implementation)
    for i, step in enumerate(steps):
        print(f"step {i:3d}: {int(step['is_active'].sum()):4d} tokens, rows an expert: {step['masked_m'].tolist()}")
    error = largest_error(weights, steps, arguments.top_k)
    print(f"compilations after the first step: {compilations}")
    print(f"largest difference from each token by itself: {error:.1e}")
    return {"steps": steps, "compilations": compilations, "error": error}


if __name__ == "__main__":
    main()
