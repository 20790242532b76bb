"""The public functions under automatic partitioning: what one device gives, eight must give too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import ROW, SQUARE, assert_close, collectives, random

import jaxgemm
from jaxgemm import partition
from jaxgemm.gemm import k_masked_gemm

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

M, N, K = 1024, 512, 1024
DENSE = {  # of x [8, m / 8, k], w [k, n] and bias [n]
    "data": ((8, 1), P("a"), P(), P()),
    "columns": ((2, 4), P(), P(None, "b"), P("b")),
    "data and columns": ((4, 2), P("a"), P(None, "b"), P("b")),
    "rows": ((1, 8), P(None, None, "b"), P("b"), P()),
    "data and rows": ((4, 2), P("a", None, "b"), P("b"), P()),
    "fsdp": ((8, 1), P("a"), P("a"), P("a")),
    "fsdp of columns, and rows": ((2, 4), P("a", None, "b"), P("b", "a"), P("a")),
    "all data": ((2, 4), P(("a", "b")), P(("b", "a")), P()),
}


def mesh(shape):
    return jax.make_mesh(shape, ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def shardings(shape, specs):
    on = mesh(shape)
    return jax.tree.map(lambda spec: NamedSharding(on, spec), specs, is_leaf=lambda x: isinstance(x, P))


def loss(dot, *args):
    """A loss whose gradient depends on the result's signs alone, so that no rounding is quantised and so enlarged."""
    out = dot(*args)
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape).astype(out.dtype)
    return (jax.nn.relu(out) * weights).sum()


def value_and_gradients(dot, argnums=(0, 1, 2)):
    return jax.value_and_grad(functools.partial(loss, dot), argnums)


def assert_all_close(got, expected, bound):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.atleast_1d(a), np.atleast_1d(b), bound)


@functools.cache
def dense_on_one_device():
    args = random(0, 8, M // 8, K), random(1, K, N) / K**0.5, random(2, N)
    return args, jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*args)


@pytest.mark.parametrize("strategy", DENSE)
def test_dense(strategy, tmp_path):
    shape, *specs = DENSE[strategy]
    args, expected = dense_on_one_device()
    placed = jax.device_put(args, tuple(shardings(shape, specs)))
    gradients = jax.jit(
        value_and_gradients(jaxgemm.fp8_dot), out_shardings=tuple(shardings(shape, (P(), tuple(specs))))
    )
    compiled, moved = collectives(gradients.lower(*placed), tmp_path)
    got = compiled(*placed)
    assert_all_close(got, expected, 1e-10)
    large = [
        (op, dtype) for op, dtype, dims in moved if np.prod(dims) >= min(M * K, K * N, M * N) // 8 and dtype != "pred"
    ]
    gathered = {dtype for op, dtype in large if op == "all-gather"}
    assert not any(op in ("all-to-all", "collective-permute") for op, _ in large)
    assert gathered == ({"f8e4m3fn"} if strategy in ("fsdp", "fsdp of columns, and rows", "all data") else set())
    if strategy in ("fsdp", "fsdp of columns, and rows"):
        assert ("reduce-scatter", "f32") in large


def test_sum_is_scattered_to_a_result_that_is_split_over_its_mesh_axis(tmp_path):
    """Sequence parallelism: rows of the result over the axis that k was split over; bias and activation after it."""
    args = random(0, M, K), random(1, K, N), random(2, N)
    placed = jax.device_put(args, tuple(shardings((2, 4), (P(None, "b"), P("b"), P()))))
    dot = functools.partial(jaxgemm.fp8_dot, activation="gelu")
    lowered = jax.jit(dot, out_shardings=shardings((2, 4), P("b"))).lower(*placed)
    compiled, moved = collectives(lowered, tmp_path)
    assert_close(compiled(*placed), dot(*args), 1e-10)
    assert moved == [("reduce-scatter", "f32", (M // 4, N))]


def test_the_older_partitioner():
    args = random(0, 256, 256), random(1, 256, 512), random(2, 512)
    expected = jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*args)
    placed = jax.device_put(args, tuple(shardings((2, 4), (P("a"), P("a", "b"), P("b")))))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        got = jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*placed)
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    assert_all_close(got, expected, 1e-10)


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_arrays_that_lie_on_no_mesh_where_one_is_set(axis_type):
    args = random(0, 8, 256), random(1, 256, 16), random(2, 16)
    expected = jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*args)
    with jax.set_mesh(jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)):
        got = jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*args)
        jaxgemm.fp8_dot(*args)
    assert_all_close(got, expected, 1e-10)


ODD = (36, 200, 576)
"""m, n, k: each device's share would cut a block of scales, or be no multiple of 8."""


@pytest.mark.parametrize("shape", [(2, 4), (8, 1)])
def test_dense_of_sizes_whose_shares_are_no_whole_blocks(shape):
    m, n, k = ODD
    args = random(0, 4, m // 4, k), random(1, k, n), random(2, n)
    splits = [
        (P(None, None, "b"), P("a", "b"), P("a")),
        (P(None, None, ("a", "b")), P(("a", "b")), P()),
        (P("b"), P("b", "a"), P("b")),
    ]

    def all_splits(*args):
        placed = [jax.lax.with_sharding_constraint(args, tuple(shardings(shape, specs))) for specs in splits]
        return [value_and_gradients(jaxgemm.fp8_dot)(*p) for p in placed]

    expected = jax.jit(value_and_gradients(jaxgemm.fp8_dot))(*args)
    for got in jax.jit(all_splits)(*args):
        assert_all_close(got, expected, 1e-10)


def quantize_all(x):
    blocks = (ROW, SQUARE, (1, x.shape[-1]), x.shape[-2:])
    return (
        [jaxgemm.quantize(x, block) for block in blocks],
        [jaxgemm.quantize_transposed(x, block) for block in blocks],
        [jaxgemm.quantize_both(x, block, jnp.float8_e5m2)[:2] for block in blocks],
    )


@pytest.mark.parametrize(
    "shape, size, split",
    [
        ((2, 4), (512, 256), P("a", "b")),
        ((8, 1), (256, 1024), P("a")),
        ((4, 2), (2, 36, 200), P(None, "a", "b")),
    ],
)
def test_quantize_is_bitwise_equal(shape, size, split):
    x = random(0, *size)
    placed = jax.device_put(x, shardings(shape, split))
    for got, expected in zip(*(jax.tree.leaves(jax.jit(quantize_all)(x)) for x in (placed, x)), strict=True):
        np.testing.assert_array_equal(np.asarray(got).view(np.uint8), np.asarray(expected).view(np.uint8))


def test_quantize_moves_parts_where_its_split_would_cut_blocks(tmp_path):
    """64 rows a device hold half a block: the columns are split instead, and nothing is gathered."""
    x = random(0, 512, 1024)
    both = jax.jit(lambda x: jaxgemm.quantize_both(x, column_sum=True))
    placed = jax.device_put(x, shardings((8, 1), P("a")))
    compiled, moved = collectives(both.lower(placed), tmp_path)
    assert_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), compiled(placed)),
        jax.tree.map(lambda x: x.astype(jnp.float32), both(x)),
        1e-12,
    )
    assert ("all-gather", "f32", x.shape) not in moved


SIZES = jnp.array([100, 0, 300, 57])
GROUPS = {
    "grouped": (
        (lambda x, w, b: jaxgemm.grouped_fp8_dot(x, w, SIZES, b, activation="relu")),
        ((512, 512), (4, 512, 256), (4, 256)),
        [
            ((4, 2), (P("a"), P(), P())),
            ((2, 4), (P(None, "b"), P("a", "b"), P("a"))),
        ],
    ),
    "masked": (
        (lambda x, w, b: jaxgemm.masked_grouped_fp8_dot(x, w, SIZES, b, activation="relu")),
        ((4, 256, 512), (4, 512, 256), (4, 256)),
        [
            ((4, 2), (P("a", None, "b"), P("a", "b"), P("a"))),
            ((2, 4), (P(None, "b"), P(None, None, "b"), P())),
        ],
    ),
}


@pytest.mark.parametrize("kind, case", [(kind, case) for kind in GROUPS for case in range(len(GROUPS[kind][2]))])
def test_groups(kind, case):
    function, sizes, splits = GROUPS[kind]
    shape, specs = splits[case]
    args = [random(i, *size) for i, size in enumerate(sizes)]
    gradients = jax.jit(value_and_gradients(function))
    assert_all_close(gradients(*jax.device_put(args, shardings(shape, list(specs)))), gradients(*args), 1e-9)


def test_groups_of_experts_stay_where_they_are(tmp_path):
    """Expert parallel: nothing moves, in neither direction."""
    function, sizes, _ = GROUPS["masked"]
    args = jax.device_put([random(i, *size) for i, size in enumerate(sizes)], shardings((4, 2), P("a")))
    gradients = jax.jit(value_and_gradients(function))
    _, moved = collectives(gradients.lower(*args), tmp_path)
    assert {(op, dims) for op, _, dims in moved} == {("all-reduce", ())}


@pytest.mark.parametrize("accumulate", [False, True])
def test_contracted_groups_are_split_and_summed(accumulate, tmp_path):
    """A device's columns start within a group, hold whole groups, or none; the sum is left split over n."""
    sizes = jnp.array([100, 0, 140, 57, 3, 0])
    capacity = 8 * 128
    x, y = random(0, 64, capacity), random(1, 256, capacity)
    segments = jaxgemm.quantize(x), jaxgemm.quantize(y)
    lhs, rhs = (dataclasses.replace(q, segment_alignment=128) for q in segments)
    start = random(2, 6, 64, 256) if accumulate else None
    columns = P(None, ("a", "b")), P(("a", "b"))
    specs = [jax.tree.unflatten(jax.tree.structure(q), columns) for q in (lhs, rhs)]
    product = jax.jit(
        lambda lhs, rhs, start: jaxgemm.k_grouped_gemm(lhs, rhs, sizes, accumulate=start),
        out_shardings=shardings((2, 4), P(None, None, ("a", "b"))),
    )
    placed = jax.device_put((lhs, rhs), tuple(shardings((2, 4), specs)))
    compiled, moved = collectives(product.lower(*placed, start), tmp_path)
    assert_close(compiled(*placed, start), jaxgemm.k_grouped_gemm(lhs, rhs, sizes, accumulate=start), 1e-10)
    assert moved == [("reduce-scatter", "f32", (6, 64, 256 // 8))]


@pytest.mark.parametrize(
    "spec, sums", [(P("b", None, "a"), 1), (P("a", None, "b"), 1), (P(None, None, ("a", "b")), 1), (P(("a", "b")), 0)]
)
def test_masks_of_contracted_columns_are_split_and_summed(spec, sums, tmp_path):
    """A device's columns all count, end a mask, or are past it, where NaN does not matter; groups stay where they are."""
    counts = jnp.array([0, 1, 128, 300, 513, 1024, -3, 2000])
    columns, ends = jnp.arange(1024), -(-counts[:, None] // 128) * 128
    operands = []
    for i in range(2):
        q = jaxgemm.quantize(jnp.where((columns < counts[:, None])[:, None], random(i, 8, 64, 1024), 0))
        poisoned = jnp.where((columns >= ends)[:, None], jnp.array(jnp.nan, q.stored_values.dtype), q.stored_values)
        operands.append(dataclasses.replace(q, stored_values=poisoned))
    scales = P(spec[0], spec[2] if len(spec) > 2 else None)
    on = shardings((2, 4), dataclasses.replace(operands[0], stored_values=spec, stored_scales=scales))
    product = jax.jit(k_masked_gemm)
    compiled, moved = collectives(product.lower(*jax.device_put(operands, [on, on]), counts), tmp_path)
    assert [op for op, _, _ in moved] == ["all-reduce"] * sums
    assert_close(compiled(*jax.device_put(operands, [on, on]), counts), product(*operands, counts), 1e-10)


@pytest.mark.parametrize("lhs_block, rhs_block", [(ROW, ROW), (SQUARE, SQUARE), ((1, 512), (512, 512))])
def test_gemm_of_every_block_is_bitwise_equal(lhs_block, rhs_block):
    lhs, rhs = jaxgemm.quantize(random(0, 512, 512), lhs_block), jaxgemm.quantize(random(1, 512, 512), rhs_block)
    bias = random(2, 512)

    def rows_over(q, axis):
        scales = P(None, axis) if q.block_shape[0] == 1 else P(axis) if q.block_shape[0] == 128 else P()
        return jax.device_put(q, shardings((2, 4), dataclasses.replace(q, stored_values=P(axis), stored_scales=scales)))

    product = jax.jit(functools.partial(jaxgemm.gemm, activation="silu"))
    np.testing.assert_array_equal(product(rows_over(lhs, "a"), rows_over(rhs, "b"), bias), product(lhs, rhs, bias))


def test_batched_weights_are_split_over_their_batch():
    x, w = random(0, 8, 2, 16, 256), random(1, 8, 256, 128)
    numbers = (((3,), (1,)), ((0,), (0,)))
    product = value_and_gradients(lambda x, w: jaxgemm.fp8_dot_general(x, w, numbers), (0, 1))
    placed = jax.device_put((x, w), shardings((2, 4), P(("a", "b"))))
    assert_all_close(jax.jit(product)(*placed), jax.jit(product)(x, w), 1e-10)


def test_equal_shares_are_lowered_once():
    """The compiler asks for each call's share; a model has many that are equal, and a kernel takes long to lower."""
    x, *weights = random(0, 512, 256), *(random(i, 256, 256) for i in range(1, 4))
    place = NamedSharding(mesh((8, 1)), P("a"))

    def forward(x, weights):
        for w in weights:
            x = jaxgemm.fp8_dot(x, w)
        return x

    placed = jax.device_put((x, weights), place)
    partition._lowered.cache_clear()
    out = jax.jit(forward, in_shardings=(place, [place] * 3), out_shardings=place)(*placed)
    lowered = partition._lowered.cache_info()
    assert (lowered.misses, lowered.hits) == (3, 6)  # x or what follows, the weight, the product: once for each layer
    assert_all_close([out], [jax.jit(forward)(x, weights)], 1e-10)
