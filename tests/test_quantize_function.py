"""Quantising with an elementwise function in front equals quantising the function's results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import E5M2, random

import jaxgemm
from jaxgemm import reference
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.quantize import quantize_function

eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def draw(function, *shape, dtype=jnp.float32, joined=False):
    inputs = [random(i, *shape, dtype=dtype) for i in range(FUNCTIONS[function].num_inputs)]
    return [*inputs[:-2], jnp.concatenate(inputs[-2:], -1)] if joined else inputs


def composed(function, *inputs, joined=False, hidden=False, **keywords):
    """The same in steps: the function, its results stored, each of them quantised."""
    dtype = inputs[0].dtype
    if joined:
        inputs = [*inputs[:-1], *jnp.split(inputs[-1], 2, -1)]
    arrays = [x.astype(dtype) for x in FUNCTIONS[function].apply(*(x.astype(jnp.float32) for x in inputs))]
    count = FUNCTIONS[function].num_outputs
    results = [jnp.concatenate(arrays[:count], -1)] if joined else arrays[:count]
    quantised = [jaxgemm.quantize_both(x, **keywords) for x in results]
    if hidden:
        keywords.pop("column_sum", None)
        quantised.append((None, jaxgemm.quantize_transposed(arrays[-1], **keywords), None))
    return quantised


def assert_equal_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


CASES = [
    ("relu", {}),
    ("gelu_gate", {}),
    ("silu_gate", {"joined": True}),
    ("gelu_backward", {"hidden": True, "column_sum": True}),
    ("silu_gate_backward", {"hidden": True, "column_sum": True}),
    ("silu_gate_backward", {"hidden": True, "joined": True, "column_sum": True}),
]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("function, options", CASES)
def test_equals_the_same_in_steps(function, options, dtype):
    """Also for 13 and 77 columns, where joined halves meet inside a block."""
    inputs = draw(function, 13, 77, dtype=dtype, joined=options.get("joined", False))
    keywords = {**options, "dtype": E5M2, "power_of_two": True}
    fused = jax.jit(functools.partial(quantize_function, function, **keywords))(*inputs)
    in_steps = jax.jit(functools.partial(composed, function, **keywords))
    assert_equal_bits(fused, in_steps(*inputs))


def test_rounding_is_that_of_a_stored_array():
    """float16 has subnormal numbers and an end; both as numpy rounds."""
    x = jnp.array([1e-5, 3e-6, 5.97e-8, 2.9e-8, 7e-5, 65519.0, 65520.0, 7e4, -1.0, jnp.nan], jnp.float32)
    with np.errstate(over="ignore"):
        expected = np.asarray(x).astype(np.float16)
    np.testing.assert_array_equal(reference._round(x, np.dtype(np.float16)), expected)
    in_bfloat16 = reference._round(x, jnp.dtype(jnp.bfloat16))
    np.testing.assert_array_equal(in_bfloat16.astype(jnp.float32), x.astype(jnp.bfloat16).astype(jnp.float32))


def test_vmap_over_some_inputs():
    gate, up = random(0, 5, 3, 40), random(1, 5, 40)
    mapped = jax.vmap(functools.partial(quantize_function, "silu_gate"), (1, None))(gate, up)
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        assert_equal_bits(one, quantize_function("silu_gate", gate[:, i], up))


@eight_devices
@pytest.mark.parametrize("split", [P("a", "b"), P(("a", "b"))])
def test_on_a_mesh_it_is_bitwise_equal(split):
    inputs = draw("silu_gate_backward", 1024, 512)
    function = jax.jit(functools.partial(quantize_function, "silu_gate_backward", hidden=True, column_sum=True))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    got = function(*jax.device_put(inputs, NamedSharding(mesh, split)))
    expected = function(*inputs)
    for (*quantised, total), (*expected_quantised, expected_total) in zip(got, expected, strict=True):
        assert_equal_bits(quantised, expected_quantised)
        if total is not None:
            np.testing.assert_allclose(total, expected_total, rtol=1e-4, atol=1e-2)


@eight_devices
def test_joined_columns_stay_whole_and_rows_do_not():
    (gate_up,) = draw("silu_gate", 1024, 256, joined=True)
    function = jax.jit(functools.partial(quantize_function, "silu_gate", joined=True))
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(gate_up, NamedSharding(mesh, P("a")))
    assert "all-gather" not in function.lower(placed).compile().as_text()
    assert_equal_bits(function(placed), function(gate_up))


@eight_devices
def test_in_explicit_mode_results_are_split_as_inputs():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    gate, up = (jax.device_put(x, NamedSharding(mesh, P("a", "b"))) for x in draw("silu_gate", 256, 512))
    [(natural, transposed, _)] = quantize_function("silu_gate", gate, up)
    specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves((natural, transposed))]
    assert specs == [P("a", "b"), P("b", "a"), P("b", "a"), P("a", "b")]


x = jnp.ones((4, 6))


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda: quantize_function("swish", x), "function must be one of .* got 'swish'"),
        (ValueError, lambda: quantize_function("silu_gate", x), "inputs of 'silu_gate' must be 2 arrays, got 1"),
        (ValueError, lambda: quantize_function("silu_gate", x, x[:, :3]), "must fit together, got shapes"),
        (ValueError, lambda: quantize_function("silu_gate", x[:, :5], joined=True), "must fit together"),
        (ValueError, lambda: quantize_function("silu_gate_backward", x, x, joined=True), "must fit together"),
        (ValueError, lambda: quantize_function("gelu", x, joined=True), "has no gate"),
        (ValueError, lambda: quantize_function("gelu", x, hidden=True), "is no backward function"),
        (TypeError, lambda: quantize_function("gelu", x.astype(int)), "inputs.dtype must be bfloat16"),
        (TypeError, lambda: quantize_function("silu_gate", x, x.astype(jnp.bfloat16)), "inputs must have one dtype"),
    ],
)
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call()
