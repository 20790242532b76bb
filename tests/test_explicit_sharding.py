"""The public functions on meshes of explicit axes, where the type of an array says how it is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import SQUARE, assert_close, random

import jaxgemm

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

SIZES = jnp.array([100, 0, 30, 57])
NUMBERS = (((2,), (1,)), ((), ()))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)


def place(mesh, args, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]


def spec_of(x):
    return jax.typeof(x).sharding.spec


@pytest.mark.parametrize(
    "dot, shapes, specs, out_spec",
    [
        (jaxgemm.fp8_dot, ((4, 64, 256), (256, 512), (512,)), (P("a"), P(None, "b"), P("b")), P("a", None, "b")),
        (jaxgemm.fp8_dot, ((4, 9, 256), (256, 200), (200,)), (P("a", None, "b"), P("b", "a"), P()), P("a", None, None)),
        (
            lambda x, w, bias: jaxgemm.grouped_fp8_dot(x, w, SIZES, bias),
            ((256, 256), (4, 256, 512), (4, 512)),
            (P("a"), P(None, None, "b"), P()),
            P("a", "b"),
        ),
        (
            lambda x, w, bias: jaxgemm.masked_grouped_fp8_dot(x, w, SIZES, bias),
            ((4, 128, 256), (4, 256, 512), (4, 512)),
            (P("b"), P("b"), P("b")),
            P("b", None, None),
        ),
        (
            lambda x, w, bias: jaxgemm.fp8_dot_general(x, w, NUMBERS) + bias,
            ((4, 64, 256), (512, 256), (512,)),
            (P("b"), P("a"), P("a")),
            P("b", None, "a"),
        ),
    ],
    ids=["dense", "dense of sizes that do not divide", "grouped", "masked", "dot_general"],
)
def test_results_are_split_as_operands_and_gradients_as_primals(mesh, dot, shapes, specs, out_spec):
    args = [random(i, *shape) for i, shape in enumerate(shapes)]
    placed = place(mesh, args, specs)
    seen = []

    def loss(*args):
        out = dot(*args)
        seen.append(spec_of(out))
        return jnp.sum(out * 2.0)

    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed)
    assert seen == [out_spec]
    assert [spec_of(g) for g in gradients] == [spec_of(x) for x in placed]
    expected = jax.jit(jax.grad(lambda *args: jnp.sum(dot(*args) * 2.0), (0, 1, 2)))(*args)
    for a, b in zip(gradients, expected, strict=True):
        assert_close(np.asarray(a), np.asarray(b), 1e-9)


def test_quantised_operands(mesh):
    x, w = random(0, 256, 512), random(1, 512, 1024)
    placed_x, placed_w = place(mesh, (x, w), (P("a"), P(None, "b")))
    lhs, rhs = jaxgemm.quantize(placed_x), jaxgemm.quantize_transposed(placed_w, SQUARE)
    assert [spec_of(leaf) for leaf in jax.tree.leaves((lhs, rhs))] == [
        P("a", None),
        P(None, "a"),
        P("b", None),
        P("b", None),
    ]
    assert spec_of(lhs.values) == spec_of(lhs.scales) == spec_of(jaxgemm.dequantize(lhs)) == P("a", None)
    out = jaxgemm.gemm(lhs, rhs)
    assert spec_of(out) == P("a", "b")
    alone = jaxgemm.gemm(jaxgemm.quantize(x), jaxgemm.quantize_transposed(w, SQUARE))
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(alone, np.float32))
    grouped = jax.jit(jaxgemm.k_grouped_gemm)(
        jaxgemm.quantize_grouped(placed_x, SIZES), jaxgemm.quantize_grouped(placed_x, SIZES), SIZES
    )
    assert_close(grouped, jaxgemm.k_grouped_gemm(*[jaxgemm.quantize_grouped(x, SIZES)] * 2, SIZES), 1e-10)


def test_where_shard_map_makes_one_axis_manual_and_leaves_the_other_explicit(mesh):
    x, w = random(0, 256, 128), random(1, 128, 64)
    with jax.set_mesh(mesh):
        local = jax.shard_map(jaxgemm.fp8_dot, in_specs=(P("a"), P()), out_specs=P("a"), axis_names={"a"})
        out = jax.jit(local)(*place(mesh, (x, w), (P("a"), P(None, "b"))))
        assert spec_of(out) == P("a", "b")
    assert_close(out, jaxgemm.fp8_dot(x, w))


@pytest.mark.parametrize("where", ["inside", "of a checkpoint"])
def test_gradients_where_shard_map_leaves_one_axis_explicit(mesh, where):
    """JAX cannot hand residuals of a function in automatic mode out of such a `shard_map`: docs/sharding.md."""
    x, w = random(0, 256, 128), random(1, 128, 64)
    specs = {"in_specs": (P("a"), P()), "axis_names": {"a"}}

    def gradients(function):
        return jax.grad(lambda x, w: (function(x, w) * 2).sum(), (0, 1))

    if where == "inside":
        local = jax.shard_map(gradients(jaxgemm.fp8_dot), out_specs=(P("a"), P()), **specs)
    else:
        local = gradients(jax.shard_map(jax.checkpoint(jaxgemm.fp8_dot), out_specs=P("a"), **specs))
    with jax.set_mesh(mesh):
        got = jax.jit(local)(*place(mesh, (x, w), (P("a"), P(None, "b"))))
    for a, b in zip(got, gradients(jaxgemm.fp8_dot)(x, w), strict=True):
        assert_close(a, b, 1e-9)


@pytest.mark.parametrize("block", [(1, 128), SQUARE], ids=str)
def test_the_parts_of_an_array_whose_split_axis_is_padded(mesh, block):
    x = random(0, 6, 300)  # stored as eight rows
    expected = jaxgemm.quantize(x, block)
    with jax.set_mesh(mesh):
        q = jaxgemm.quantize(*place(mesh, (x,), (P("a"),)), block)
        assert spec_of(q.values) == P("a", None) and q.values.shape == (6, 300)
        np.testing.assert_array_equal(q.values, expected.values)
        np.testing.assert_array_equal(q.scales, expected.scales)
        if block == SQUARE:
            np.testing.assert_array_equal(q.T.values, expected.T.values)
