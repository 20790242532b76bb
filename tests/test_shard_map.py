"""The public functions inside `jax.shard_map`: what one device gives, several must give too."""

import functools

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
