"""What public functions call on a GPU, seen without one, by lowering for CUDA."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import SQUARE, operands, random

import jaxgemm
from jaxgemm import dispatch, partition
from jaxgemm.problem import GemmProblem, stored_operands
from jaxgemm.quantize import quantize_function

if jax.__version_info__ < dispatch.OLDEST_JAX_OF_KERNELS:
    pytest.skip("this jax does not have the Pallas that the kernels are written for", allow_module_level=True)


def kernels(text, name):
    """What comes behind this name in the names of the kernels that are called."""
    return [label.strip("_") for label in re.findall(rf"{name}(\w*?)_?mosaic_gpu", text)]


def products(text):
    return len(kernels(text, "fp8_gemm_sm90"))


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_training_multiplies_in_fp8_in_all_three_products():
    """fprop, dgrad and wgrad are kernel calls, each operand is quantised in one, and no product is left to XLA."""
    x, w, bias = random(0, 300, 576), random(1, 576, 200), random(2, 200)
    gradients = jax.grad(lambda *args: (jaxgemm.fp8_dot(*args) ** 2).sum(), (0, 1, 2))
    text = lowered(gradients, x, w, bias)
    # What a profile shows: of a kernel in a CUDA graph it knows the name alone.
    assert kernels(text, "fp8_gemm_sm90") == ["fprop", "dgrad", "wgrad"]
    assert kernels(text, "fp8_quantize") == ["fprop", "fprop", "dout"]
    assert "dot_general" not in text


def test_forward_alone_is_one_product():
    text = lowered(functools.partial(jaxgemm.fp8_dot, activation="gelu"), random(0, 7, 7), random(1, 7, 7))
    assert (products(text), len(kernels(text, "fp8_quantize"))) == (1, 2)


def copies(text):
    """Lines that pad, slice, transpose or join arrays of the operands' dtypes."""
    moving = [line for line in text.splitlines() if re.search(r"stablehlo\.(pad|slice|transpose|concatenate)", line)]
    return [line for line in moving if "f8E4M3FN" in line or "bf16" in line]


def test_operands_that_are_aligned_are_not_copied():
    """Between the caller's FP8 arrays and the kernel nothing is padded, sliced or transposed, nor behind it."""
    lhs, rhs = operands(256, 512, 1024)
    text = lowered(jaxgemm.gemm, lhs, rhs)
    assert products(text) == 1
    assert not copies(text)


def test_what_mosaic_cannot_do_is_refused_with_the_reason():
    lhs, rhs = operands(16, 16, 256, lhs_block=(1, 256))
    message = r"lhs must have blocks of \(1, 128\) or \(128, 128\), and has \(1, 256\)"
    with pytest.raises(NotImplementedError, match=message):
        lowered(functools.partial(jaxgemm.gemm, implementation="mosaic"), lhs, rhs)


def test_falling_back_on_a_gpu_is_logged_once(caplog):
    dispatch._warn_once.cache_clear()
    lhs, rhs = operands(16, 16, 256, lhs_block=(1, 256))
    with caplog.at_level(logging.WARNING, "jaxgemm"):
        for n in (16, 8):
            text = lowered(jaxgemm.gemm, lhs, jaxgemm.quantize(random(0, n, 256), SQUARE))
            assert not products(text)
    messages = [r.message for r in caplog.records if "a dense problem is not served by 'mosaic'" in r.message]
    assert len(messages) == 1 and "lhs must have blocks of (1, 128) or (128, 128)" in messages[0]


def test_weight_gradients_are_rounded_by_the_kernel():
    """They are summed in float32 inside and leave in the weight's dtype: no pass over float32 gradients."""
    x, w = random(0, 256, 512, dtype=jnp.bfloat16), random(1, 512, 384, dtype=jnp.bfloat16)
    text = lowered(jax.grad(lambda w: jaxgemm.fp8_dot(x, w).astype(jnp.float32).sum()), w)
    assert "tensor<512x384xf32>" not in text


def test_groups_train_on_the_kernels():
    x, w, sizes = random(0, 300, 256), random(1, 3, 256, 200), jnp.array([100, 0, 150])
    dot = jaxgemm.grouped_fp8_dot
    text = lowered(jax.grad(lambda x, w, b: (dot(x, w, sizes, b) ** 2).sum(), (0, 1, 2)), x, w, random(2, 3, 200))
    assert products(text) == 3 and "dot_general" not in text


def test_masked_groups_train_on_the_kernels():
    x, w, sizes = random(0, 3, 40, 256), random(1, 3, 256, 200), jnp.array([40, 0, 15])
    dot = jaxgemm.masked_grouped_fp8_dot
    text = lowered(jax.grad(lambda x, w: (dot(x, w, sizes) ** 2).sum(), (0, 1)), x, w)
    assert products(text) == 3 and "dot_general" not in text


@pytest.mark.parametrize(
    "n, dtype, adds_itself", [(48, jnp.float32, True), (46, jnp.float32, False), (48, jnp.bfloat16, True)]
)
def test_weight_gradients_of_groups_add_to_an_array(n, dtype, adds_itself):
    """The kernel adds to a donated array in place; an output that it must pad is added by XLA."""
    sizes, total = jnp.array([100, 0, 150]), jnp.zeros((3, 64, n))
    lhs, rhs = (jaxgemm.quantize_grouped(random(i, 300, rows), sizes) for i, rows in enumerate((64, n)))
    product = functools.partial(jaxgemm.k_grouped_gemm, implementation="mosaic", preferred_element_type=dtype)

    def add(lhs, rhs, sizes, total):
        return product(lhs, rhs, sizes, accumulate=total)

    traced = jax.jit(add, donate_argnums=3).trace(lhs, rhs, sizes, total)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "fp8_gemm_sm90" in line and "custom_call" in line]
    assert products(text) == 1
    assert ("output_operand_alias" in call) == adds_itself


def test_segments_that_are_not_aligned_are_refused():
    lhs, rhs = operands(16, 24, 256, rhs_block=(1, 128))
    with pytest.raises(NotImplementedError, match="must start at a multiple of 128"):
        lowered(functools.partial(jaxgemm.k_grouped_gemm, implementation="mosaic"), lhs, rhs, jnp.array([3, 100]))


@pytest.mark.parametrize("x64", [False, True])
def test_kernels_count_in_32_bits_whatever_the_mode(x64):
    """They are traced in 32-bit mode: Pallas refuses to mix the two."""
    with jax.enable_x64(x64):
        x, w = random(0, 3, 40, 256, dtype=jnp.float32), random(1, 3, 256, 200, dtype=jnp.float32)
        sizes = jnp.array([40, 0, 15])
        loss = lambda x, w: (jaxgemm.masked_grouped_fp8_dot(x, w, sizes) ** 2).sum()  # noqa: E731
        text = lowered(jax.grad(lambda x, w: loss(x, w) + jaxgemm.fp8_dot(x[0], w[0]).sum(), (0, 1)), x, w)
    assert products(text) >= 5 and "fp8_quantize" in text and "dot_general" not in text


def test_kernels_serve_programs_that_promote_no_ranks():
    x, w, bias, sizes = random(0, 3, 40, 256), random(1, 3, 256, 200), random(2, 3, 200), jnp.array([40, 0, 15])

    def loss(x, w, bias):
        masked = jaxgemm.masked_grouped_fp8_dot(x, w, sizes, bias)
        grouped = jaxgemm.grouped_fp8_dot(x[0], w, sizes, bias, activation="silu")
        return masked.sum() + grouped.sum() + jaxgemm.fp8_dot(x[0], w[0], bias[0]).sum()

    with jax.numpy_rank_promotion("raise"):
        text = lowered(jax.value_and_grad(loss, (0, 1, 2)), x, w, bias)
    assert products(text) == 9 and "dot_general" not in text


@pytest.mark.parametrize("dtype, passes", [(jnp.bfloat16, ["silu_gate_backward"]), (jnp.float32, ["", ""])])
def test_functions_are_fused_where_they_fit(dtype, passes):
    """Three tiles of float32 do not fit in shared memory: XLA takes the function, and a kernel each result."""
    inputs = [random(i, 256, 384, dtype=dtype) for i in range(3)]
    function = functools.partial(quantize_function, "silu_gate_backward", implementation="mosaic")
    text = lowered(function, *inputs)
    assert kernels(text, "fp8_quantize") == passes
    assert ("stablehlo.exponential" in text) == (dtype == jnp.float32)


MLP_PASSES = ["", "", "", "", "silu_gate_", "silu_gate_backward_"]
"""Quantising kernels of a gated MLP's training step: x, dout, w_up, w_down; then the hidden layer, both ways."""


@pytest.mark.parametrize(
    "joined, h, products, passes",
    [
        (True, 384, 6, MLP_PASSES),
        (False, 384, 9, ["", *MLP_PASSES]),  # w_gate by itself
        (
            True,
            200,
            6,
            [""] * 7,
        ),  # halves that meet inside a block: XLA puts them together, twice with the hidden layer
    ],
)
def test_an_mlp_trains_in_kernels_alone(joined, h, products, passes):
    """Every product is an FP8 kernel, each array is quantised once, and no hidden activations are stored."""
    k, n = 256, 128
    up = random(1, k, 2, h, dtype=jnp.bfloat16)
    weights = (up, random(2, h, n, dtype=jnp.bfloat16), *(() if joined else (up[:, 0],)))
    weights = weights if joined else (up[:, 1], *weights[1:])

    def loss(x, weights):
        return (jaxgemm.fp8_mlp(x, *weights, implementation="mosaic").astype(jnp.float32) ** 2).sum()

    text = lowered(jax.grad(loss, (0, 1)), random(0, 192, k, dtype=jnp.bfloat16), weights)
    found = ["".join(re.findall("silu_gate_(?:backward_)?", label + "_")) for label in kernels(text, "fp8_quantize")]
    assert len(kernels(text, "fp8_gemm_sm90")) == products
    assert sorted(found) == sorted(passes)
    assert "dot_general" not in text
    fused = "silu_gate_" in passes
    # Beside the kernels, XLA adds up, rounds and squares; exponentials would be activations taken outside of them.
    assert ("stablehlo.exponential" in text) != fused
    assert bool(copies(text)) != fused


def test_the_gradient_of_an_activation_costs_no_pass_of_its_own():
    x, w, bias = random(0, 256, 384), random(1, 384, 256), random(2, 256)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    for activation in ("relu", "gelu", "silu"):
        dot = functools.partial(jaxgemm.fp8_dot, activation=activation)
        text = lowered(lambda x, w, b, dout, dot=dot: jax.vjp(dot, x, w, b)[1](dout), x, w, bias, x[:, :256])
        assert products(text) == 3
        assert kernels(text, "fp8_quantize") == ["fprop", "fprop", f"{activation}_backward_dout"]


@pytest.mark.parametrize("kind", ["dense", "grouped", "masked", "k_grouped", "k_masked"])
def test_a_devices_share_of_a_product_is_lowered_once(kind):
    """On several devices, a program calls what was lowered for an equal share before."""
    over_k = kind.startswith("k_")
    e4m3, blocks = np.dtype(jnp.float8_e4m3fn), ((1, 128), (1, 128) if over_k else SQUARE)
    more = dict(num_groups=1 if kind == "dense" else 3, segment_alignment=128 if kind == "k_grouped" else 1)
    accumulate = kind == "k_grouped"
    out_dtype = np.dtype(np.float32) if over_k else np.dtype(jnp.bfloat16)
    problem = GemmProblem(kind, 256, 264, 640, e4m3, e4m3, *blocks, out_dtype, accumulate=accumulate, **more)
    rest = [jax.ShapeDtypeStruct(problem.out_shape, out_dtype)] if accumulate else []
    sizes = [] if kind == "dense" else [jax.ShapeDtypeStruct((3,), jnp.int32)]
    operands = [*stored_operands(problem), *rest, *sizes]

    def three_layers(*operands):
        run = functools.partial(partition._run_once_lowered, dispatch.run_gemm, problem, "cuda", None)
        return [run(*operands) for _ in range(3)]

    partition._lowered.cache_clear()
    text = lowered(three_layers, *operands)
    assert (partition._lowered.cache_info().misses, partition._lowered.cache_info().hits) == (1, 2)
    assert products(text) >= 1 and "dot_general" not in text
