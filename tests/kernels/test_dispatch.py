"""What public functions call on a GPU, seen without one, by lowering for CUDA."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import pytest
from support import SQUARE, operands, random

import jaxgemm
from jaxgemm import dispatch
from jaxgemm.quantize import quantize_function

if jax.__version_info__ < (0, 11):
    pytest.skip("this jax does not have the Pallas that the kernels are written for", allow_module_level=True)

GEMM_KERNEL, QUANTIZE_KERNEL = "fp8_gemm_sm90_mosaic_gpu", "fp8_quantize_mosaic_gpu"


def lowered(function, *args):
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_training_multiplies_in_fp8_in_all_three_products():
    """fprop, dgrad and wgrad are kernel calls, each operand is quantised in one, and no product is left to XLA."""
    x, w, bias = random(0, 300, 576), random(1, 576, 200), random(2, 200)
    gradients = jax.grad(lambda *args: (jaxgemm.fp8_dot(*args) ** 2).sum(), (0, 1, 2))
    text = lowered(gradients, x, w, bias)
    assert (text.count(GEMM_KERNEL), text.count(QUANTIZE_KERNEL)) == (3, 3)
    assert "dot_general" not in text


def test_forward_alone_is_one_product():
    text = lowered(functools.partial(jaxgemm.fp8_dot, activation="gelu"), random(0, 7, 7), random(1, 7, 7))
    assert (text.count(GEMM_KERNEL), text.count(QUANTIZE_KERNEL)) == (1, 2)


def test_operands_that_are_aligned_are_not_copied():
    """Between the caller's FP8 arrays and the kernel nothing is padded, sliced or transposed, nor behind it."""
    lhs, rhs = operands(256, 512, 1024)
    text = lowered(jaxgemm.gemm, lhs, rhs)
    assert text.count(GEMM_KERNEL) == 1
    moving = [line for line in text.splitlines() if re.search(r"stablehlo\.(pad|slice|transpose|concatenate)", line)]
    assert not [line for line in moving if "f8E4M3FN" in line or "bf16" in line]


def test_what_mosaic_cannot_do_is_refused_with_the_reason():
    lhs, rhs = operands(16, 16, 256, lhs_block=SQUARE)
    with pytest.raises(NotImplementedError, match=r"lhs must have blocks of \(1, 128\), and has \(128, 128\)"):
        lowered(functools.partial(jaxgemm.gemm, implementation="mosaic"), lhs, rhs)


def test_falling_back_on_a_gpu_is_logged_once(caplog):
    dispatch._warn_once.cache_clear()
    lhs, rhs = operands(16, 16, 256, lhs_block=SQUARE)
    with caplog.at_level(logging.WARNING, "jaxgemm"):
        for n in (16, 8):
            text = lowered(jaxgemm.gemm, lhs, jaxgemm.quantize(random(0, n, 256), SQUARE))
            assert GEMM_KERNEL not in text
    messages = [r.message for r in caplog.records if "dense" in r.message]
    assert len(messages) == 1 and "lhs must have blocks of (1, 128)" in messages[0]


def test_weight_gradients_are_rounded_by_the_kernel():
    """They are summed in float32 inside and leave in the weight's dtype: no pass over float32 gradients."""
    x, w = random(0, 256, 512, dtype=jnp.bfloat16), random(1, 512, 384, dtype=jnp.bfloat16)
    text = lowered(jax.grad(lambda w: jaxgemm.fp8_dot(x, w).astype(jnp.float32).sum()), w)
    assert "tensor<512x384xf32>" not in text


@pytest.mark.parametrize("dtype, kernels", [(jnp.bfloat16, 1), (jnp.float32, 2)])
def test_functions_are_fused_where_they_fit(dtype, kernels):
    """Three tiles of float32 do not fit in shared memory: XLA takes the function, and a kernel each result."""
    inputs = [random(i, 256, 384, dtype=dtype) for i in range(3)]
    function = functools.partial(quantize_function, "silu_gate_backward", implementation="mosaic")
    text = lowered(function, *inputs)
    assert len(re.findall("fp8_quantize_(?:silu_gate_backward_)?mosaic_gpu", text)) == kernels
    assert text.count("fp8_quantize_silu_gate_backward_mosaic_gpu") == (dtype == jnp.bfloat16)
    assert ("stablehlo.exponential" in text) == (dtype == jnp.float32)
