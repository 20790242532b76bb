"""Contiguous groups whose rows are split over a mesh: gradients are summed where the rows lie, block by block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import assert_close, collectives, group_rows, random

import jaxgemm
from jaxgemm.row_blocks import take_blocks

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

M, K, N, G = 2048, 256, 512, 5
BLOCK = 128
SPLITS = {  # of x [m, k], w [g, k, n] and bias [g, n]
    "data": ((8, 1), P("a"), P(), P()),
    "data, over two axes": ((4, 2), P(("b", "a")), P(), P()),
    "data and columns": ((2, 4), P("a"), P(None, None, "b"), P(None, "b")),
    "data and rows": ((4, 2), P("a", "b"), P(None, "b"), P()),
    "fsdp": ((4, 2), P("a"), P(None, None, "a"), P(None, "a")),
    "fsdp of the other side": ((2, 4), P("a"), P(None, "a"), P()),
}


def value_and_gradients(x, w, bias, sizes, constrain=lambda out: out):
    """Of a loss whose gradient depends on the result's signs alone, so that no rounding is quantised and so enlarged."""

    def loss(x, w, bias):
        out = constrain(jaxgemm.grouped_fp8_dot(x, w, sizes, bias, activation="relu"))
        return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(x, w, bias)


def operands(m=M, k=K, n=N, g=G):
    return random(0, m, k), random(1, g, k, n) / k**0.5, random(2, g, n)


def place(shape, specs, args, axis_type=AxisType.Auto):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(axis_type,) * 2)
    return jax.device_put(args, tuple(NamedSharding(mesh, spec) for spec in specs))


def assert_all_close(got, expected, bound=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.atleast_1d(a), np.atleast_1d(b), bound)


SIZES = jnp.array([300, 0, 900, 77, 500])
"""Groups that end within a device's rows, one that crosses whole devices, and rows of no group."""


@functools.cache
def on_one_device():
    return jax.jit(value_and_gradients)(*operands(), SIZES)


@pytest.mark.parametrize("split", SPLITS)
def test_rows_stay_where_they_are(split, tmp_path):
    shape, *specs = SPLITS[split]
    placed = place(shape, specs, operands())
    mesh = placed[0].sharding.mesh
    function = value_and_gradients
    if split.startswith("fsdp"):  # else the compiler moves x, which is smaller than the weights
        rows_by_a = NamedSharding(mesh, P("a"))
        function = functools.partial(function, constrain=lambda out: jax.lax.with_sharding_constraint(out, rows_by_a))
    layouts = (NamedSharding(mesh, P()), tuple(x.sharding for x in placed))
    gradients = jax.jit(function, out_shardings=layouts)
    compiled, moved = collectives(gradients.lower(*placed, SIZES), tmp_path)
    assert_all_close(compiled(*placed, SIZES), on_one_device())

    # At the borders of devices alone, 128 rows of x and of dout go to the device before.
    exchanged = [dims for op, _, dims in moved if op == "collective-permute"]
    assert [dims[0] for dims in exchanged] == [BLOCK, BLOCK]
    rows = placed[0].addressable_shards[0].data.shape[0]
    large = [(op, dtype, dims) for op, dtype, dims in moved if np.prod(dims) >= rows * K // 2 and dims[0] != BLOCK]
    gradient = "reduce-scatter" if split.startswith("fsdp") else "all-reduce"
    partial = {"data and columns": [(rows, K)], "data and rows": [(rows, N)]}.get(split, [])
    assert {dims for op, _, dims in large if op == gradient and len(dims) == 3} == {
        placed[1].addressable_shards[0].data.shape
    }
    assert [dims for op, _, dims in large if op == "all-reduce" and len(dims) == 2] == partial
    weights = [x for x in large if x[0] == "all-gather"]
    assert len(large) == 1 + len(partial) + len(weights)
    assert all(dtype == "f8e4m3fn" and dims[0] == G for _, dtype, dims in weights)
    assert bool(weights) == split.startswith("fsdp")


def every_kind_of_sizes(m, g):
    rng = np.random.default_rng(0)
    zipf = np.sort(rng.multinomial(m, (ranks := 1 / np.arange(1, g + 1) ** 1.2) / ranks.sum()))
    return {
        "Zipf, rising": zipf,
        "Zipf, falling": zipf[::-1],
        "random": rng.multinomial(m, rng.dirichlet(np.ones(g))),
        "below m": rng.multinomial(m // 3, rng.dirichlet(np.ones(g))),
        "above m": rng.integers(0, m, g),
        "none": np.zeros(g, int),
        "one has all": np.eye(g, dtype=int)[g // 2] * m,
        "a few rows each": rng.integers(0, 5, g),
        "negative": np.where(np.arange(g) % 2, -7, m // g + 11),
        "ends of devices": np.full(g, m // 8),
        "huge": np.full(g, np.iinfo(np.int32).max),
    }


@functools.cache
def any_sizes_on_one_device():
    """Operands, sizes and results of every kind of sizes: shares of 161 rows, no multiple of anything. What lies past
    the groups is not looked at."""
    m, g = 8 * 161, 12
    x, w, bias = operands(m, 130, 100, g)
    gradients, cases = jax.jit(value_and_gradients), {}
    for name, sizes in every_kind_of_sizes(m, g).items():
        *_, (_, _, end) = group_rows(sizes, m)
        args, sizes = (x.at[end:].set(jnp.nan), w, bias), jnp.asarray(sizes, jnp.int32)
        cases[name] = args, sizes, gradients(*args, sizes)
    return cases


@pytest.mark.parametrize("shape, rows", [((8, 1), P("a")), ((2, 4), P(("a", "b"))), ((4, 2), P("a"))])
def test_any_group_sizes(shape, rows):
    gradients = jax.jit(value_and_gradients)
    for name, (args, sizes, expected) in any_sizes_on_one_device().items():
        got = gradients(*place(shape, (rows, P(), P()), args), sizes)
        assert np.isfinite(np.asarray(got[1][1])).all(), name
        assert_all_close(got, expected)


def test_a_device_of_fewer_rows_than_a_block():
    args, sizes = operands(8 * 24, 128, 64), jnp.array([3, 50, 0, 100, 20])
    gradients = jax.jit(value_and_gradients)
    assert_all_close(gradients(*place((8, 1), (P("a"), P(), P()), args), sizes), gradients(*args, sizes))


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_each_block_is_whole_on_one_device(num_devices):
    """The blocks that devices find in their groups are those of all rows, each once."""
    m, g = 8 * 161, 7
    mesh = jax.make_mesh((num_devices,), ("a",), devices=jax.devices()[:num_devices], axis_types=(AxisType.Auto,))

    def share(rows, sizes):
        [rows], sizes = take_blocks([rows], sizes, m, ("a",), ("a",))
        return rows, sizes

    taken = jax.jit(
        jax.shard_map(share, mesh=mesh, in_specs=(P("a"), P()), out_specs=(P("a"), P("a")), check_vma=False)
    )

    def blocks(groups, rows):
        starts = ((group, begin, end) for group, first, end in groups for begin in range(first, end, BLOCK))
        return [(group, *rows[begin : min(begin + BLOCK, end)].tolist()) for group, begin, end in starts]

    for name, sizes in every_kind_of_sizes(m, g).items():
        rows, counts = taken(jnp.arange(m), jnp.asarray(sizes, jnp.int32))
        rows, counts = np.split(np.asarray(rows), num_devices), np.split(np.asarray(counts), num_devices)
        found = [
            block
            for mine, count in zip(rows, counts, strict=True)
            for block in blocks(group_rows(count, len(mine)), mine)
        ]
        assert sorted(found) == sorted(blocks(group_rows(sizes, m), np.arange(m))), name


def layers(dot, x, weights, sizes):
    x, _ = jax.lax.scan(lambda x, w: (dot(x, w, sizes), None), x, weights)
    return (x * x).sum()


@pytest.mark.parametrize("policy", [None, "nothing", "names"])
def test_scanned_layers_bring_no_rows_together(policy):
    """The sums that are given are never computed, also where what they are made of would be kept for all layers."""
    dot = jaxgemm.grouped_fp8_dot
    if policy is not None:
        kept = jax.checkpoint_policies.save_only_these_names(*(["jaxgemm_lhs", "jaxgemm_rhs"] * (policy == "names")))
        dot = jax.checkpoint(dot, policy=kept)
    x, weights = random(0, 1024, 128), random(1, 3, G, 128, 128) / 11
    sizes = jnp.array([100, 0, 500, 24, 300])
    gradients = jax.jit(jax.grad(functools.partial(layers, dot), (0, 1)))
    placed = place((8, 1), (P("a"), P()), (x, weights))
    compiled = gradients.lower(*placed, sizes).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    assert_all_close(compiled(*placed, sizes), gradients(x, weights, sizes), 1e-9)


def test_one_device_keeps_no_rows_in_high_precision():
    x, weights = random(0, 1024, 128), random(1, 3, G, 128, 128) / 11
    sizes = jnp.array([100, 0, 500, 24, 300])
    gradients = jax.jit(jax.grad(functools.partial(layers, jaxgemm.grouped_fp8_dot), (0, 1)))
    text = gradients.lower(x, weights, sizes).compile().as_text()
    assert "f8e4m3fn[3,128," in text and "f32[3,1024,128]" not in text


def test_explicit_mode():
    args = operands(1024, 128, 256)
    placed = place((2, 4), (P("a"), P(None, None, "b"), P(None, "b")), args, AxisType.Explicit)
    with jax.set_mesh(placed[0].sharding.mesh):
        got = jax.jit(value_and_gradients)(*placed, SIZES)
    assert all(x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in zip(got[1], placed, strict=True))
    assert_all_close(got, jax.jit(value_and_gradients)(*args, SIZES))


def test_the_older_partitioner():
    args = operands(1024, 128, 256)
    expected = jax.jit(value_and_gradients)(*args, SIZES)
    placed = place((4, 2), (P("a"), P(), P()), args)
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        got = jax.jit(value_and_gradients)(*placed, SIZES)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert_all_close(got, expected)


def test_vmap():
    x, w, bias = operands(1024, 128, 128)
    sizes = jnp.stack([SIZES // 2, SIZES[::-1] // 3])
    xs = jnp.stack([x, -x])
    gradients = jax.jit(jax.vmap(value_and_gradients, (0, None, None, 0)))
    placed = place((4, 2), (P(None, "a"), P(), P()), (xs, w, bias))
    assert_all_close(gradients(*placed, sizes), gradients(xs, w, bias, sizes))
