"""The fused MLP on meshes and under the transformations of a training step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, collectives, random

import jaxgemm

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

M, K, H, N = 1024, 1024, 1024, 256
SPECS = {  # of x [8, m / 8, k], w_up [k, h] (joined [k, 2, h]), w_down [h, n] and w_gate
    "data": ((8, 1), P("a"), P(), P()),
    "fsdp": ((8, 1), P("a"), P("a"), P("a")),
    "columns, then rows": ((2, 4), P("a"), P(None, "b"), P("b")),
    "fsdp, columns, then rows": ((2, 4), P("a"), P("a", "b"), P("b", "a")),
}


@functools.cache
def arguments(joined=False):
    x, w_down = random(0, 8, M // 8, K), random(2, H, N) / H**0.5
    w_gate, w_up = random(3, K, H) / K**0.5, random(1, K, H) / K**0.5
    return (x, jnp.stack([w_gate, w_up], 1), w_down) if joined else (x, w_up, w_down, w_gate)


def value_and_gradients(*args):
    def loss(*args):
        out = jaxgemm.fp8_mlp(*args)
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    return jax.value_and_grad(loss, tuple(range(len(args))))(*args)


@functools.cache
def on_one_device(joined):
    return jax.jit(value_and_gradients)(*arguments(joined))


@eight_devices
@pytest.mark.parametrize("strategy, joined", [(name, False) for name in SPECS] + [("data", True), ("fsdp", True)])
def test_automatic_sharding(strategy, joined, tmp_path):
    """What is gathered is FP8; without FSDP nothing is, and nothing moves but sums."""
    shape, *specs = SPECS[strategy]
    specs = specs if joined else [*specs, specs[1]]
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
    placed = jax.device_put(arguments(joined), shardings)
    lowered = jax.jit(value_and_gradients, out_shardings=(None, shardings)).lower(*placed)
    compiled, moved = collectives(lowered, tmp_path)
    for got, expected in zip(*map(jax.tree.leaves, (compiled(*placed), on_one_device(joined))), strict=True):
        assert_close(np.atleast_2d(got), np.atleast_2d(expected), 1e-9)
    large = {(op, dtype) for op, dtype, dims in moved if np.prod(dims) >= H * N // 8}
    assert {dtype for op, dtype in large if op == "all-gather"} == ({"f8e4m3fn"} if "fsdp" in strategy else set())
    # With FSDP the compiler may split a weight gradient's operands by its rows, and then exchanges parts of them.
    assert "fsdp" in strategy or {op for op, _ in large} <= {"all-reduce"}


@eight_devices
def test_explicit_sharding():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    specs = P("a"), P(None, "b"), P("b"), P(None, "b")
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments(), specs, strict=True)]
    with jax.set_mesh(mesh):
        value, gradients = jax.jit(value_and_gradients)(*placed)
    assert [jax.typeof(g).sharding.spec for g in gradients] == [jax.typeof(x).sharding.spec for x in placed]
    for got, expected in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(on_one_device(False)), strict=True):
        assert_close(np.atleast_2d(np.asarray(got)), np.atleast_2d(np.asarray(expected)), 1e-9)


def tensor_parallel_loss(function, *args):
    return (function(*args) * jnp.cos(jnp.arange(float(M * N))).reshape(M, N)).sum()


def flat_arguments():
    x, *weights = arguments()
    return x.reshape(M, K), *weights


@functools.cache
def flat_on_one_device():
    loss = functools.partial(tensor_parallel_loss, jaxgemm.fp8_mlp)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*flat_arguments())


@eight_devices
@pytest.mark.parametrize("check_vma, low_memory", [(False, False), (True, False), (True, True)])
def test_tensor_parallel_in_shard_map(check_vma, low_memory):
    """Each device has its part of the hidden layer; one sum over the mesh behind it, one of the input's gradient."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def local(*args):
        return jax.lax.psum(jaxgemm.fp8_mlp(*args, low_memory=low_memory), "b")

    specs = P("a"), P(None, "b"), P("b"), P(None, "b")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("a"), check_vma=check_vma)
    loss = functools.partial(tensor_parallel_loss, sharded)
    got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*flat_arguments())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(flat_on_one_device()), strict=True):
        assert_close(np.atleast_2d(a), np.atleast_2d(b), 1e-9)


NAMES = ("jaxgemm_lhs", "jaxgemm_rhs", "jaxgemm_pre_activation")


def layers(policy, x, weights):
    def layer(x, weights):
        return x + jaxgemm.fp8_mlp(x, *weights), None

    layer = jax.checkpoint(layer, policy=policy) if policy else layer
    return (jax.lax.scan(layer, x, weights)[0] ** 2).sum()


def stacked_layers():
    x, up, down, gate = random(0, 9, 40), random(1, 3, 40, 24), random(2, 3, 24, 40), random(3, 3, 40, 24)
    return x, (up / 40**0.5, down / 24**0.5, gate / 40**0.5)


@pytest.mark.parametrize("kept", [(), NAMES[:2], NAMES])
def test_scan_and_checkpoint_give_the_same_gradients(kept):
    x, weights = stacked_layers()
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    got, expected = (jax.jit(jax.grad(functools.partial(layers, p), (0, 1)))(x, weights) for p in (policy, None))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-6)


def equations(policy, *primitives):
    """How often each primitive is in the gradient's jaxpr."""
    x, weights = stacked_layers()
    f = jax.checkpoint(lambda x, w: jaxgemm.fp8_mlp(x, *w).sum(), policy=policy)
    text = str(jax.make_jaxpr(jax.grad(f, (0, 1)))(x, jax.tree.map(lambda w: w[0], weights)))
    return [text.count(f"{name}[") for name in primitives]


def test_what_each_name_keeps_is_not_made_again():
    """Without any, the backward pass repeats three quantisations and two products of the forward pass."""
    keep, count = jax.checkpoint_policies.save_only_these_names, equations
    forward = [1 + 3 + 1, 3]  # x, three weights, hidden; three products
    backward = [1 + 1, 1 + 2 + 3]  # dout, then dgate and dup with hidden; dgrad and wgrad of three layers
    assert count(keep(*NAMES), "fp8_quantize", "fp8_gemm") == [a + b for a, b in zip(forward, backward, strict=True)]
    again = {
        NAMES[0]: [1, 0],  # x
        NAMES[1]: [3, 0],  # the weights
        NAMES[2]: [3, 2],  # x, and the weights of gate and up, for their products
    }
    for dropped, extra in again.items():
        kept = [name for name in NAMES if name != dropped]
        expected = [a + b + c for a, b, c in zip(forward, backward, extra, strict=True)]
        assert count(keep(*kept), "fp8_quantize", "fp8_gemm") == expected, dropped
