import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import E4M3, ROW, SQUARE, dequantized, random

import jaxgemm
from jaxgemm import ScaledArray, quantize

BLOCKS = [ROW, SQUARE, (1, 70), (37, 70)]


def assert_same(a, b):
    assert (a.shape, a.dtype, a.block_shape) == (b.shape, b.dtype, b.block_shape)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).astype(np.float32), np.asarray(y).astype(np.float32))


@pytest.mark.parametrize("block", BLOCKS)
def test_passes_through_transformations(block):
    q = quantize(random(0, 37, 70), block)
    assert_same(jax.jit(lambda q: q)(q), q)
    assert_same(jax.device_put(q), q)
    assert_same(jax.tree.map(lambda x: x, q), q)
    shape = jax.eval_shape(lambda: q)
    assert (shape.shape, shape.dtype, shape.values.shape, shape.scales.shape) == (
        (37, 70), E4M3, (37, 70), q.scales.shape,
    )  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_vmap_adds_and_scan_takes_the_leading_axis(block):
    x = random(1, 3, 37, 70)
    stacked = jax.vmap(lambda x: quantize(x, block))(x)
    assert stacked.shape == (3, 37, 70)
    assert stacked.values.shape == (3, 37, 70)
    assert_same(stacked, quantize(x, block))

    def step(total, q):
        assert q.shape == (37, 70)
        return total + jaxgemm.dequantize(q).sum(), q

    total, again = jax.lax.scan(step, jnp.zeros(()), stacked)
    assert_same(again, stacked)
    np.testing.assert_allclose(total, dequantized(stacked).sum(), rtol=1e-4)


def test_survives_a_checkpoint(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    q = {"layer": quantize(random(2, 37, 70), SQUARE)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", q)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: q))
    assert_same(restored["layer"], q["layer"])


def test_repr_says_shape_dtype_and_block():
    q = quantize(jnp.ones((7, 9)))
    assert repr(q) == "ScaledArray(shape=(7, 9), dtype=float8_e4m3fn, block_shape=(1, 128))"
    assert "None" in repr(jax.tree.map(lambda _: None, q, is_leaf=lambda x: x is None))


@pytest.mark.parametrize("shape", [(256, 384), (200, 300), (7, 7), (2, 130, 5)])
def test_from_parts_takes_a_published_checkpoint(shape):
    """DeepSeek-V3 ships `weight` e4m3 [n, k] and `weight_scale_inv` float32 [ceil(n/128), ceil(k/128)]."""
    weight = jax.random.normal(jax.random.key(0), shape).astype(E4M3)
    blocks = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale_inv = jnp.abs(jax.random.normal(jax.random.key(1), blocks)) + 0.1
    q = ScaledArray.from_parts(weight, scale_inv, SQUARE)
    full = np.asarray(scale_inv).repeat(128, -2).repeat(128, -1)[..., : shape[-2], : shape[-1]]
    expected = np.asarray(weight).astype(np.float32) * full
    np.testing.assert_array_equal(jaxgemm.dequantize(q), expected)
    np.testing.assert_array_equal(q.scales, scale_inv)
    assert_same(ScaledArray.from_parts(np.asarray(weight), np.asarray(scale_inv)), q)


def test_from_parts_inverts_reading_the_parts():
    for block in BLOCKS:
        q = quantize(random(3, 37, 70), block)
        assert_same(ScaledArray.from_parts(q.values, q.scales, block), q)


def test_aligned_parts_are_not_copied():
    values, scales = jnp.ones((256, 256), E4M3), jnp.ones((2, 2))
    jaxpr = jax.make_jaxpr(lambda v, s: ScaledArray.from_parts(v, s, SQUARE))(values, scales)
    assert not jaxpr.eqns


def test_square_blocks_transpose_exactly():
    x = random(4, 200, 300)
    q = quantize(x, SQUARE)
    assert_same(q.T, quantize(x.T, SQUARE))
    assert_same(q.T.T, q)
    assert_same(quantize(x, (200, 300)).T, quantize(x.T, (300, 200)))


@pytest.mark.parametrize("n", [128, 200])
def test_row_blocks_do_not_transpose(n):
    with pytest.raises(ValueError, match=r"only an array with square blocks .* block_shape is \(1, 128\)"):
        _ = quantize(random(5, n, n), ROW).T


@pytest.mark.parametrize(
    "error, parts, message",
    [
        (ValueError, ((7, 7), (8, 1), ROW), r"scales must be \[m, ceil\(k/128\)\] = \[7, 1\], got \[8, 1\]"),
        (ValueError, ((7, 7), (1, 7), ROW), r"scales must be \[m, ceil\(k/128\)\] = \[7, 1\], got \[1, 7\]"),
        (
            ValueError,
            ((200, 300), (3, 2), SQUARE),
            r"\[ceil\(m/128\), ceil\(k/128\)\] = \[2, 3\], got \[3, 2\]",
        ),
        (ValueError, ((2, 7, 7), (7, 1), ROW), r"= \[2, 7, 1\], got \[7, 1\]"),
        (ValueError, ((7,), (7, 1), ROW), r"values must be \[..., rows, cols\], got shape \[7\]"),
        (ValueError, ((7, 7), (7, 1), (1, 64)), r"block_shape must be .* got \(1, 64\)"),
    ],
)
def test_from_parts_refuses_shapes_that_do_not_fit(error, parts, message):
    values, scales, block = parts
    with pytest.raises(error, match=message):
        ScaledArray.from_parts(jnp.ones(values, E4M3), jnp.ones(scales), block)


def test_from_parts_refuses_other_dtypes():
    with pytest.raises(TypeError, match="values must be float8_e4m3fn or float8_e5m2, got int8"):
        ScaledArray.from_parts(jnp.ones((7, 7), jnp.int8), jnp.ones((7, 1)), ROW)
    with pytest.raises(TypeError, match="scales must be float32, got bfloat16"):
        ScaledArray.from_parts(jnp.ones((7, 7), E4M3), jnp.ones((7, 1), jnp.bfloat16), ROW)


def test_a_program_of_scaled_arrays_can_be_exported():
    x, weight = random(0, 4, 200), quantize(random(1, 33, 200), SQUARE)
    exported = jax.export.export(jax.jit(lambda x, w: (jaxgemm.fp8_dot(x, w), quantize(x))))(x, weight)
    out, q = jax.export.deserialize(exported.serialize()).call(x, weight)
    np.testing.assert_array_equal(out, jaxgemm.fp8_dot(x, weight))
    assert isinstance(q, ScaledArray) and q.shape == (4, 200) and q.block_shape == ROW


def test_what_was_not_computed_can_be_transposed_and_compared():
    abstract = jax.eval_shape(lambda x: quantize(x, SQUARE), random(0, 200, 300))
    assert (abstract.T.shape, abstract.T.block_shape) == ((300, 200), SQUARE)
    one, other = quantize(random(0, 4, 8)), quantize(random(0, 4, 8))
    assert one == one and one != other  # the same object or not: of arrays there is no one answer


@pytest.mark.parametrize("shape, block", [((5, 0), (1, 0)), ((0, 5), (0, 5)), ((0, 0), (0, 0)), ((0, 5), (1, 5))])
def test_one_scale_a_row_or_in_all_of_an_empty_array(shape, block):
    q = quantize(jnp.ones(shape), block)
    assert q.shape == shape and jaxgemm.dequantize(q).shape == shape
    assert jaxgemm.quantize_transposed(jnp.ones(shape), block).shape == shape[::-1]
