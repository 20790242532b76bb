"""Experts on many devices: tokens travel to them and back in FP8, with their scales.

Each device holds some of the tokens and some of the experts. A token is quantised once, where it is; its FP8 values
and float32 scales go to the device of its expert by `all_to_all`, a little more than half the bytes of bfloat16. There
`masked_grouped_gemm` multiplies what came, and the results go back the way the tokens came. Each device has `capacity`
places for the tokens of one device to one expert; a token that finds none is passed on unchanged.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/expert_parallel.py   # on a CPU
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flags import positive_int
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgemm
from jaxgemm import ScaledArray

AXIS = "expert"


class Experts(NamedTuple):
    """The weights of `g` experts, quantised: the right operands of their two products."""

    up: ScaledArray  # [g, d_ff, d_model]
    up_bias: jax.Array  # [g, d_ff]
    down: ScaledArray  # [g, d_model, d_ff]


def init_experts(num_experts: int, d_model: int, d_ff: int, key: jax.Array) -> Experts:
    """Draws weights and quantises them in blocks of 128x128."""
    keys = jax.random.split(key, 3)
    up = jax.random.normal(keys[0], (num_experts, d_ff, d_model)) / d_model**0.5
    down = jax.random.normal(keys[1], (num_experts, d_model, d_ff)) / d_ff**0.5
    bias = jax.random.normal(keys[2], (num_experts, d_ff))
    return Experts(jaxgemm.quantize(up, (128, 128)), bias, jaxgemm.quantize(down, (128, 128)))


def apply_experts(experts: Experts, tokens: ScaledArray, counts: jax.Array) -> jax.Array:
    """Sends the first `counts[g]` tokens of each group, `[g, rows, d_model]`, through expert g."""
    hidden = jaxgemm.masked_grouped_gemm(tokens, experts.up, counts, experts.up_bias, activation="silu")
    return jaxgemm.masked_grouped_gemm(jaxgemm.quantize(hidden, valid_rows=counts), experts.down, counts)


def local_layer(experts: Experts, x: jax.Array, expert_of: jax.Array, capacity: int) -> jax.Array:
    """One device's part of the layer, inside `shard_map`.

    Args:
        experts: `g` of them, this device's own.
        x: `[tokens, d_model]`, this device's own.
        expert_of: int32 `[tokens]`, the expert of each token, numbered over all devices.
        capacity: places for the tokens of one device to one expert.

    Returns:
        `[tokens, d_model]`.
    """
    num_devices, local_experts = jax.lax.axis_size(AXIS), experts.up_bias.shape[0]
    num_experts = num_devices * local_experts

    # Give each token a place among those of its expert; one that has none goes nowhere.
    chosen = jax.nn.one_hot(expert_of, num_experts, dtype=jnp.int32)
    place = jnp.sum((jnp.cumsum(chosen, axis=0) - 1) * chosen, axis=1)
    slot = jnp.where(place < capacity, expert_of * capacity + place, num_experts * capacity)
    counts = jnp.minimum(chosen.sum(axis=0), capacity)

    # Exchange: the groups [experts, capacity] of this device's tokens for those of this device's experts.
    rows = jnp.zeros((num_experts * capacity, x.shape[1]), x.dtype).at[slot].set(x, mode="drop")
    groups = jaxgemm.quantize(rows.reshape(num_devices, local_experts, capacity, -1))
    received = jax.tree.map(exchange, groups)
    received_counts = exchange(counts.reshape(num_devices, local_experts))

    # For each expert, put the rows that hold a token first, whichever device they came from, and multiply.
    valid = (jnp.arange(capacity) < received_counts[..., None]).swapaxes(0, 1).reshape(local_experts, -1)
    order = jnp.argsort(~valid, axis=1, stable=True)
    tokens = ScaledArray.from_parts(
        take_rows(by_expert(received.values), order), take_rows(by_expert(received.scales), order), (1, 128)
    )
    outputs = take_rows(apply_experts(experts, tokens, valid.sum(axis=1)), jnp.argsort(order, axis=1))
    outputs = outputs.reshape(local_experts, num_devices, capacity, -1).swapaxes(0, 1)

    # And back: from each slot to the token that it was given to.
    returned = exchange(outputs).reshape(num_experts * capacity, -1)
    results = returned.at[slot].get(mode="fill", fill_value=0).astype(x.dtype)
    return jnp.where((slot < num_experts * capacity)[:, None], results, x)


def exchange(x: jax.Array) -> jax.Array:
    """Sends part i of the first axis to device i, and gets one from each."""
    return jax.lax.all_to_all(x, AXIS, split_axis=0, concat_axis=0, tiled=True)


def by_expert(x: jax.Array) -> jax.Array:
    """Joins the rows of all devices for each expert: `[devices, g, rows, ...]` to `[g, devices * rows, ...]`."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])


def take_rows(x: jax.Array, order: jax.Array) -> jax.Array:
    """Takes rows `order` [g, rows] of each group of `x` [g, rows, columns]."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def expert_parallel_layer(mesh: Mesh, experts: Experts, x: jax.Array, expert_of: jax.Array, capacity: int) -> jax.Array:
    """Sends tokens `x` [tokens, d_model], split over the mesh, through experts that are split over it too."""

    def local(experts: Experts, x: jax.Array, expert_of: jax.Array) -> jax.Array:
        return local_layer(experts, x, expert_of, capacity)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(AXIS), P(AXIS), P(AXIS)), out_specs=P(AXIS))(
        experts, x, expert_of
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the layer on all devices, and says what travelled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=positive_int, default=1024)
    parser.add_argument("--experts", type=positive_int, default=16)
    parser.add_argument("--d-model", type=positive_int, default=256)
    parser.add_argument("--d-ff", type=positive_int, default=512)
    parser.add_argument("--capacity", type=positive_int, default=32, help="places for a device's tokens to one expert")
    arguments = parser.parse_args(argv)
    for name in ("tokens", "experts"):
        if (size := getattr(arguments, name)) % jax.device_count():
            parser.error(f"--{name} must be a multiple of the number of devices, {jax.device_count()}, got {size}")
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, P(AXIS))

    keys = jax.random.split(jax.random.key(0), 3)
    experts = init_experts(arguments.experts, arguments.d_model, arguments.d_ff, keys[0])
    x = jax.random.normal(keys[1], (arguments.tokens, arguments.d_model), jnp.bfloat16)
    expert_of = jax.random.randint(keys[2], (arguments.tokens,), 0, arguments.experts)
    experts, x, expert_of = jax.device_put((experts, x, expert_of), split)

    @jax.jit
    def layer(experts: Experts, x: jax.Array, expert_of: jax.Array) -> jax.Array:
        return expert_parallel_layer(mesh, experts, x, expert_of, arguments.capacity)

    y = layer(experts, x, expert_of)
    slots = arguments.experts * arguments.capacity
    sent = slots * (arguments.d_model + 4 * -(-arguments.d_model // 128))
    norm = jnp.linalg.norm(y.astype(jnp.float32))
    print(f"{mesh.size} devices, {arguments.experts} experts, {arguments.tokens} tokens: output norm {norm:.4f}")
    print(
        f"a device sends {sent / 1e3:.1f} kB of tokens in FP8, {2 * slots * arguments.d_model / 1e3:.1f} kB in bfloat16"
    )


if __name__ == "__main__":
    main()
