"""The public functions inside `jax.shard_map`: what one device gives, several must give too."""

import functools
import re

import expert_parallel
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, random

import jaxgemm

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

M, N, K = 256, 512, 256
SPLITS = {
    "data": (P("a", None), P(None, None), P(None)),
    "columns": (P(None, None), P(None, "b"), P("b")),
    "data and columns": (P("a", None), P(None, "b"), P("b")),
}


def mesh(shape):
    return jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def loss(dot, x, w, bias):
    return (dot(x, w, bias) ** 2).sum()


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_gradients_are_summed_where_they_must_be(split, check_vma):
    """M and N are cut at multiples of 128, so that each device quantises the very blocks that one would."""
    args = random(0, M, K), random(1, K, N), random(2, N)
    specs = SPLITS[split]
    out_spec = P(specs[0][0], specs[1][1])
    sharded = jax.shard_map(jaxgemm.fp8_dot, mesh=mesh((2, 4)), in_specs=specs, out_specs=out_spec, check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), (0, 1, 2)))(*args)
    expected = jax.value_and_grad(functools.partial(loss, jaxgemm.fp8_dot), (0, 1, 2))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.atleast_1d(a), np.atleast_1d(b), 1e-6)


def test_grouped():
    """Expert parallel: each device has its groups and their rows."""
    x, w, bias = random(0, 4, 64, K), random(1, 8, K, 128), random(2, 8, 128)
    sizes = jnp.array([40, 24, 0, 64, 10, 20, 30, 34])

    def local(x, w, bias, sizes):
        return jaxgemm.grouped_fp8_dot(x[0], w, sizes, bias)[None]

    sharded = jax.shard_map(local, mesh=mesh((4, 2)), in_specs=(P("a"), P("a"), P("a"), P("a")), out_specs=P("a"))
    in_turn = jnp.stack(
        [
            jaxgemm.grouped_fp8_dot(x[i], w[2 * i : 2 * i + 2], sizes[2 * i : 2 * i + 2], bias[2 * i : 2 * i + 2])
            for i in range(4)
        ]
    )
    assert_close(jax.jit(sharded)(x, w, bias, sizes), in_turn, 1e-9)
    gradient = jax.jit(jax.grad(lambda w: (sharded(x, w, bias, sizes) ** 2).sum()))(w)
    assert np.isfinite(np.asarray(gradient)).all() and np.asarray(gradient).any()


def test_manual_over_one_mesh_axis_and_automatic_over_the_other():
    args = random(0, M, K), random(1, K, N), random(2, N)
    on = mesh((2, 4))
    sharded = jax.shard_map(jaxgemm.fp8_dot, mesh=on, in_specs=(P("a"), P(), P()), out_specs=P("a"), axis_names={"a"})
    specs = P("a"), P(None, "b"), P("b")
    placed = [jax.device_put(x, NamedSharding(on, spec)) for x, spec in zip(args, specs, strict=True)]
    got = jax.jit(jax.value_and_grad(functools.partial(loss, sharded), (0, 1, 2)))(*placed)
    expected = jax.value_and_grad(functools.partial(loss, jaxgemm.fp8_dot), (0, 1, 2))(*args)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.atleast_1d(a), np.atleast_1d(b), 1e-6)


def test_groups_where_one_mesh_axis_is_manual_and_the_other_automatic():
    x, w, sizes = random(0, 256, K), random(1, 2, K, 64), jnp.array([40, 60])

    def local(x, w):
        return jaxgemm.grouped_fp8_dot(x, w, sizes)

    sharded = jax.shard_map(local, mesh=mesh((2, 4)), in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
    expected = jnp.concatenate([local(part, w) for part in jnp.split(x, 2)])
    np.testing.assert_array_equal(jax.jit(sharded)(x, w), expected)


def test_tensor_parallel_mlp():
    """Columns, then rows, then one sum over the mesh; each device keeps its part of the hidden layer to itself."""
    x, up, bias, down = random(0, 64, K), random(1, K, 1024) / 16, random(2, 1024), random(3, 1024, K) / 32
    args = x, up, bias, down

    def mlp(x, up, bias, down, axis=None):
        hidden = jaxgemm.fp8_dot(x, up, bias, activation="gelu")
        out = jaxgemm.fp8_dot(hidden, down)
        return jax.lax.psum(out, axis) if axis else out

    def mean(mlp, *args):
        weights = jnp.cos(jnp.arange(64.0 * K)).reshape(64, K)
        return (mlp(*args) * weights).sum()

    specs = P(), P(None, "b"), P("b"), P("b")
    sharded = jax.shard_map(functools.partial(mlp, axis="b"), mesh=mesh((2, 4)), in_specs=specs, out_specs=P())
    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(mean, f), (0, 1, 2, 3)))(*args) for f in (sharded, mlp)
    )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.atleast_1d(a), np.atleast_1d(b), 1e-10)


def test_expert_parallel_example():
    """The tokens travel in FP8, and each comes back as the product with its expert, or unchanged if it had no place."""
    num_experts, tokens, d_model, capacity = 16, 256, 192, 4
    experts = expert_parallel.init_experts(num_experts, d_model, 256, jax.random.key(0))
    x = random(1, tokens, d_model)
    expert_of = jnp.minimum(jax.random.randint(jax.random.key(2), (tokens,), 0, num_experts), 13)  # two experts idle
    on = jax.make_mesh((8,), (expert_parallel.AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    layer = jax.jit(lambda *args: expert_parallel.expert_parallel_layer(on, *args, capacity=capacity))
    y = layer(experts, x, expert_of)

    every_token = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_experts, *leaf.shape)), jaxgemm.quantize(x))
    counts = jnp.full(num_experts, tokens)
    products = expert_parallel.apply_experts(experts, every_token, counts)[expert_of, jnp.arange(tokens)]
    chosen = np.asarray(jax.nn.one_hot(expert_of, num_experts)).reshape(8, tokens // 8, num_experts)
    has_place = ((chosen.cumsum(1) * chosen).sum(-1) <= capacity).reshape(tokens, 1)
    assert 0 < has_place.mean() < 1
    assert_close(y, np.where(has_place, products.astype(jnp.float32), x), 1e-9)
    sent = re.findall(
        r"all_to_all.*?tensor<[\dx]*(f8E4M3FN|f32|i32|bf16)>", layer.lower(experts, x, expert_of).as_text(), re.S
    )
    assert sent == ["f8E4M3FN", "f32", "i32", "bf16"]  # values, scales, counts; results
