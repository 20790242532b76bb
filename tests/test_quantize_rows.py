"""Quantising arrays of which only some rows count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import SQUARE, random

import jaxgemm
from jaxgemm.quantize import quantize_function, quantize_segments

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
ROWS = jnp.array([5, 0, 40])


def zeroed(x, rows):
    """The definition: rows that do not count are zeros."""
    return jnp.where((jnp.arange(x.shape[-2]) < jnp.asarray(rows)[..., None])[..., None], x, 0)


def poisoned(x, rows):
    return x + jnp.where(zeroed(jnp.ones_like(x), rows) == 1, 0, jnp.nan)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("block", [(1, 128), SQUARE, (1, 200)], ids=str)
def test_rows_that_do_not_count_are_zeros(block):
    x = random(0, 3, 40, 200)
    bad = poisoned(x, ROWS)
    for quantize in (jaxgemm.quantize, jaxgemm.quantize_transposed, jaxgemm.quantize_both):
        assert_same(quantize(bad, block, valid_rows=ROWS), quantize(zeroed(x, ROWS), block))


def test_column_sums_leave_them_out():
    x = random(1, 3, 40, 200)
    *_, total = jaxgemm.quantize_both(poisoned(x, ROWS), column_sum=True, valid_rows=ROWS)
    expected = zeroed(x, ROWS).sum(-2)  # in another order, where terms may cancel
    np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-6 * np.abs(x).sum(-2).max())


def test_a_function_in_front_leaves_them_out():
    gate, up = random(2, 3, 40, 200), random(3, 3, 40, 200)
    actual = quantize_function("silu_gate", gate, poisoned(up, ROWS), valid_rows=ROWS)
    assert_same(actual, quantize_function("silu_gate", zeroed(gate, ROWS), zeroed(up, ROWS)))


def test_counts_of_any_integer_and_beyond_the_rows():
    x = random(4, 20, 130)
    for rows in (np.int64(7), jnp.uint8(7), 7):
        assert_same(jaxgemm.quantize(x, valid_rows=rows), jaxgemm.quantize(zeroed(x, 7)))
    assert_same(jaxgemm.quantize(x, valid_rows=99), jaxgemm.quantize(x))
    assert_same(jaxgemm.quantize(x, valid_rows=-1), jaxgemm.quantize(jnp.zeros_like(x)))


def test_vmap_over_arrays_and_counts():
    x = random(5, 3, 40, 200)
    mapped = jax.vmap(lambda x, rows: jaxgemm.quantize_both(x, valid_rows=rows)[:2])(x, ROWS)
    assert_same(mapped, jaxgemm.quantize_both(x, valid_rows=ROWS)[:2])
    one_array = jax.vmap(lambda rows: jaxgemm.quantize(x[0], valid_rows=rows))(ROWS)
    assert_same(one_array, jaxgemm.quantize(jnp.broadcast_to(x[0], x.shape), valid_rows=ROWS))


def test_vmap_over_segments():
    x, sizes = random(6, 3, 300, 40), jnp.array([[300, 0], [1, 128], [0, 7]])
    mapped = jax.vmap(jaxgemm.quantize_grouped)(x, sizes)
    for i in range(3):
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], mapped), jaxgemm.quantize_grouped(x[i], sizes[i]))


def test_sums_of_groups():
    x, sizes = random(7, 300, 40), jnp.array([129, 0, 1, 100])
    _, total = quantize_segments(x.at[230:].set(jnp.nan), sizes, jnp.float8_e4m3fn, column_sum=True)
    expected = [x[:129].sum(0), jnp.zeros(40), x[129], x[130:230].sum(0)]
    np.testing.assert_allclose(total, jnp.stack(expected), rtol=1e-5, atol=1e-5)


@eight_devices
@pytest.mark.parametrize("spec", [P("a"), P(None, "a"), P("b", None, "a")], ids=str)
def test_sharded(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    x, rows = random(8, 4, 1024, 512), jnp.array([1, 300, 1024, 513])
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    quantize = jax.jit(lambda x, rows: jaxgemm.quantize_both(x, column_sum=True, valid_rows=rows))
    (natural, transposed, total), expected = quantize(placed, rows), quantize(x, rows)
    assert_same((natural, transposed), expected[:2])
    np.testing.assert_allclose(total, expected[2], rtol=1e-4, atol=1e-4)


@eight_devices
def test_segments_of_sharded_columns():
    mesh = jax.make_mesh((8,), ("a",))
    x, sizes = random(9, 300, 1024), jnp.array([100, 0, 150])
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
    quantize = jax.jit(jaxgemm.quantize_grouped)
    assert_same(quantize(placed, sizes), quantize(x, sizes))
    assert "all-gather" not in quantize.lower(placed, sizes).compile().as_text()


@pytest.mark.parametrize(
    "rows, error, message",
    [
        (jnp.ones(3), TypeError, "valid_rows must be an integer array, got float32"),
        (jnp.array([1, 2]), ValueError, r"valid_rows must be \[...\] = \[3\], got shape \[2\]"),
    ],
)
def test_errors(rows, error, message):
    with pytest.raises(error, match=message):
        jaxgemm.quantize(jnp.ones((3, 4, 5)), valid_rows=rows)
