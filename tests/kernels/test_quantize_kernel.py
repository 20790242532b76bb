"""The quantising kernels: bitwise right in the interpreter, and lowered for CUDA."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this jax has no interpreter of GPU kernels", allow_module_level=True)

from jaxgemm import layout, reference
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.kernels import hopper_quantize as kernels
from jaxgemm.numerics import reciprocal
from jaxgemm.problem import QuantizeProblem
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)
INPUT_DTYPES = [jnp.bfloat16, jnp.float16, jnp.float32]
ORIENTATIONS = {
    "natural": {},
    "transposed": {"natural": False, "transposed": True},
    "both": {"transposed": True},
}


def expected_outputs(x: jax.Array, problem: QuantizeProblem) -> list[np.ndarray]:
    """Quantises `[m, k]` in NumPy, the numerics written out: what the kernels must give, bit for bit."""
    x = np.asarray(x).astype(np.float32)
    outputs = []
    if problem.natural:
        outputs += _expected_orientation(x, problem)
    if problem.transposed:
        outputs += _expected_orientation(x.T, problem)
    return outputs


def _expected_orientation(x: np.ndarray, problem: QuantizeProblem) -> list[np.ndarray]:
    (rows, cols), (block_rows, block_cols) = x.shape, problem.block_shape
    row_blocks, col_blocks = layout.cdiv(rows, block_rows), layout.cdiv(cols, block_cols)
    padded = np.zeros((row_blocks * block_rows, col_blocks * block_cols), np.float32)
    padded[:rows, :cols] = x
    blocks = np.abs(padded).view(np.uint32).reshape(row_blocks, block_rows, col_blocks, block_cols)
    amax_bits = blocks.max((1, 3))
    limit = np.float32(float(jnp.finfo(problem.dtype).max))
    with np.errstate(all="ignore"):
        scales = np.maximum(amax_bits.view(np.float32) * np.float32(1 / limit), np.float32(2.0**-126))
        if problem.power_of_two:
            scales = ((scales.view(np.uint32) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
        scales = np.where(amax_bits == 0, np.float32(1), scales)
        scales = np.where(amax_bits >= 0x7F800000, np.float32(np.nan), scales)
        inverse = (np.float32(1) / scales).repeat(block_rows, 0).repeat(block_cols, 1)[:rows, :cols]
        values = np.clip(x * inverse, -limit, limit).astype(problem.dtype)
    stored_values = np.zeros((layout.align_up(rows, 8), layout.align_up(cols, 128)), problem.dtype)
    stored_values[:rows, :cols] = values
    if block_rows > 1:
        return [stored_values, scales]
    stored_scales = np.zeros((col_blocks, layout.align_up(rows, 4)), np.float32)
    stored_scales[:, :rows] = scales.T
    return [stored_values, stored_scales]


def assert_bitwise(actual: jax.Array, expected: np.ndarray) -> None:
    """Asserts equal bits, where NaN equals NaN."""
    actual = np.asarray(actual)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    bits = np.dtype(f"uint{8 * expected.itemsize}")
    is_nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(actual.astype(np.float32)), is_nan)
    np.testing.assert_array_equal(actual.view(bits)[~is_nan], expected.view(bits)[~is_nan])


def assert_nearly_bitwise(actual: jax.Array, expected: np.ndarray) -> None:
    """Asserts equality but for a few results that a sigmoid's last bit rounded to the next FP8 number."""
    actual, expected = np.asarray(actual).astype(np.float32), expected.astype(np.float32)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0.13, atol=2.0**-9)
    assert np.mean(actual != expected) < 2e-3


def run_interpreted(*inputs: jax.Array, problem: QuantizeProblem, num_sms: int = 2, **overrides) -> list[jax.Array]:
    config = dataclasses.replace(kernels.default_config(problem, inputs[0].dtype), **overrides)
    return kernels.hopper_quantize(*inputs, problem=problem, config=config, num_sms=num_sms, interpret=True)


def random_array(shape: tuple[int, ...], dtype=jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Draws numbers of very different magnitudes, within float16's range."""
    normal, exponents = np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(normal * np.exp2(np.round(3 * exponents)), dtype)


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("shape", [(7, 200), (130, 129)])
def test_bitwise_equal_to_the_numerics(block_shape, orientation, shape):
    problem = QuantizeProblem(block_shape, E4M3, **ORIENTATIONS[orientation])
    x = random_array(shape)
    for actual, expected in zip(run_interpreted(x, problem=problem), expected_outputs(x, problem), strict=True):
        assert_bitwise(actual, expected)


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
def test_one_element(block_shape):
    problem, x = QuantizeProblem(block_shape, E4M3, transposed=True), jnp.full((1, 1), -3, jnp.bfloat16)
    for actual, expected in zip(run_interpreted(x, problem=problem), expected_outputs(x, problem), strict=True):
        assert_bitwise(actual, expected)


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_every_input_dtype_and_power_of_two_scales(block_shape, dtype):
    problem = QuantizeProblem(block_shape, E5M2, power_of_two=True, transposed=True, column_sum=True)
    x = random_array((140, 132), dtype)
    *outputs, column_sum = run_interpreted(x, problem=problem)
    for actual, expected in zip(outputs, expected_outputs(x, problem), strict=True):
        assert_bitwise(actual, expected)
    np.testing.assert_allclose(column_sum, np.asarray(x).astype(np.float64).sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_zero_tiny_huge_infinite_and_nan_blocks(block_shape, dtype):
    x = np.array(random_array((250, 290), jnp.float32))
    x[130:, :128] = 0
    # As tiny as numbers get on a CPU: XLA flushes subnormal ones there.
    x[:128, 128:256] = np.copysign(np.random.default_rng(1).uniform(1.2e-38, 1e-36, (128, 128)), x[:128, 128:256])
    x[130:, 128:256] *= 1e34
    x[3, 5], x[200, 280] = np.nan, -np.inf
    x = jnp.asarray(x, dtype)
    problem = QuantizeProblem(block_shape, E4M3, transposed=True)
    for actual, expected in zip(run_interpreted(x, problem=problem), expected_outputs(x, problem), strict=True):
        assert_bitwise(actual, expected)


@pytest.mark.parametrize(
    "overrides",
    [
        {"stages": 2, "out_buffers": 1},
        {"tile_m": 256},
        {"tile_m": 64, "blocks_per_sm": 2},
    ],
)
def test_every_configuration_gives_the_same_bits(overrides):
    problem = QuantizeProblem(ROW_BLOCK, E4M3, transposed=overrides.get("tile_m", 128) == 128)
    x = random_array((2, 300, 136))
    outputs = run_interpreted(x, problem=problem, num_sms=1, **overrides)
    for group in range(2):
        for actual, expected in zip(outputs, expected_outputs(x[group], problem), strict=True):
            assert_bitwise(actual[group], expected)


def function_inputs(function: str, shape: tuple[int, int], dtype, joined: bool = False) -> list[jax.Array]:
    """Draws what a function takes: gate and up side by side in one array if they are joined."""
    keys = jax.random.split(jax.random.key(3), FUNCTIONS[function].num_inputs)
    inputs = [4 * jax.random.normal(key, shape, dtype) for key in keys]
    return [*inputs[:-2], jnp.concatenate(inputs[-2:], -1)] if joined else inputs


@pytest.mark.parametrize(
    "function, dtype, options",
    [
        ("relu", jnp.float32, {}),
        ("gelu", jnp.bfloat16, {"column_sum": True}),
        ("gelu_backward", jnp.float16, {"column_sum": True}),
        ("gelu_backward", jnp.bfloat16, {"hidden": True}),
        ("relu_gate", jnp.bfloat16, {}),
        ("relu_gate_backward", jnp.float16, {"hidden": True}),
        ("silu_gate", jnp.bfloat16, {"joined": True}),
        ("silu_gate_backward", jnp.bfloat16, {"column_sum": True}),
        ("silu_gate_backward", jnp.bfloat16, {"hidden": True, "joined": True, "column_sum": True}),
        ("silu_gate_backward", jnp.bfloat16, {"hidden": True, "joined": True, "column_sum": True, "natural": False}),
        ("relu_gate_backward", jnp.bfloat16, {"hidden": True, "natural": False}),
        ("relu_backward", jnp.bfloat16, {"transposed": False}),
    ],
)
def test_function_in_front_equals_quantising_its_results(function, dtype, options):
    """Bit by bit with relu, and but for a sigmoid's last bit otherwise."""
    problem = QuantizeProblem(ROW_BLOCK, E4M3, **{"transposed": True, **options}, function=function)
    inputs = function_inputs(function, (140, 256) if problem.joined else (140, 200), dtype, problem.joined)
    actual = iter(run_interpreted(*inputs, problem=problem))
    results = reference.apply_function(problem, *inputs)
    parts = problem.results([x.shape for x in inputs])
    for (part, shape), result in zip(parts, results, strict=True):
        assert result.shape == shape and result.dtype == dtype
        for expected in expected_outputs(result, part):
            (assert_bitwise if "relu" in function else assert_nearly_bitwise)(next(actual), expected)
        if part.column_sum:
            total = np.asarray(result).astype(np.float64).sum(0)
            np.testing.assert_allclose(next(actual), total, rtol=1e-4, atol=1e-2)
    assert next(actual, None) is None


@pytest.mark.parametrize(
    "function, dtype, columns, options, reason",
    [
        ("silu_gate", jnp.float32, 256, {}, "in float32 do not fit"),
        ("silu_gate", jnp.bfloat16, 100, {"joined": True}, "must be multiples of 128"),
        ("gelu_backward", jnp.bfloat16, 128, {"hidden": True, "transposed": False}, "quantised transposed"),
        ("gelu", jnp.bfloat16, 128, {"block_shape": SQUARE_BLOCK}, "blocks of (1, 128) alone"),
    ],
)
def test_what_no_kernel_can_fuse(function, dtype, columns, options, reason):
    problem = QuantizeProblem(
        **{"block_shape": ROW_BLOCK, "transposed": True, "function": function, **options}, dtype=E4M3
    )
    inputs = function_inputs(function, (8, columns), dtype, problem.joined)
    assert reason in kernels.why_not(problem, dtype, [x.shape for x in inputs])


@pytest.mark.parametrize("error", [-1, 0, 1])
def test_reciprocal_repairs_a_quotient_that_is_off_by_one(monkeypatch, error):
    scales = np.random.default_rng(0).integers(0x00800000, 0x7B000000, 1 << 18).astype(np.uint32)
    scales = np.concatenate([scales, np.arange(0x3F800001, 0x3F801000, dtype=np.uint32)]).view(np.float32)
    exact = np.float32(1) / scales
    approximate = (exact.view(np.int32) + error).view(np.float32)
    np.testing.assert_array_equal(reciprocal(jnp.asarray(scales), jnp.asarray(approximate)), exact)


@pytest.mark.parametrize("block_shape", [ROW_BLOCK, SQUARE_BLOCK])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
def test_default_configurations_lower_for_cuda(block_shape, orientation, dtype):
    problem = QuantizeProblem(block_shape, E4M3, **ORIENTATIONS[orientation])
    problem = dataclasses.replace(problem, column_sum=problem.transposed)
    config = kernels.default_config(problem, dtype)

    def quantize(x: jax.Array) -> list[jax.Array]:
        return kernels.hopper_quantize(x, problem=problem, config=config, num_sms=132)

    for shape in [(8192, 7168), (1001, 204)]:
        lowered = jax.jit(quantize).trace(jax.ShapeDtypeStruct(shape, dtype)).lower(lowering_platforms=("cuda",))
        assert "mosaic_gpu" in lowered.as_text()


def test_large_weights_in_both_orientations_take_three_stages():
    both = QuantizeProblem(SQUARE_BLOCK, E4M3, transposed=True)
    assert kernels.default_config(both, jnp.bfloat16, 4096 * 14336).stages == 3
    assert kernels.default_config(both, jnp.bfloat16, 7168 * 2048).stages == 4
    rows = QuantizeProblem(ROW_BLOCK, E4M3, transposed=True)
    assert kernels.default_config(rows, jnp.bfloat16, 8192 * 14336).stages == 4


@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_default_configurations_with_a_function_lower_for_cuda(function):
    options = {"joined": function.endswith("_gate"), "hidden": FUNCTIONS[function].has_hidden}
    problem = QuantizeProblem(ROW_BLOCK, E4M3, transposed=True, column_sum=True, function=function, **options)
    config = kernels.default_config(problem, jnp.bfloat16)

    def quantize(*inputs: jax.Array) -> list[jax.Array]:
        return kernels.hopper_quantize(*inputs, problem=problem, config=config, num_sms=132)

    inputs = [jax.ShapeDtypeStruct((8192, 14336), jnp.bfloat16)] * (FUNCTIONS[function].num_inputs - problem.joined)
    lowered = jax.jit(quantize).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def test_other_blocks_are_refused():
    assert "(1, 64)" in kernels.why_not(QuantizeProblem((1, 64), E4M3), jnp.bfloat16, [(8, 8)])
