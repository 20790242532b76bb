"""What public functions call when the Triton kernel is named, seen without a GPU, by lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import E5M2, ROW, SQUARE, operands, random

import jaxgemm
from jaxgemm import dispatch

pytestmark = pytest.mark.skipif("dispatch.why_triton_is_missing()", reason="jax-triton or JAX's CUDA plugin is missing")

CALL = "custom_call @triton_kernel_call"


def lowered(function, *args):
    function = functools.partial(function, implementation="triton")
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def chip(monkeypatch):
    return lambda capability: monkeypatch.setattr(dispatch, "cuda_capability", lambda: capability)


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0", None])
@pytest.mark.parametrize(
    "rhs_block, rhs_dtype, bias, activation", [(SQUARE, E5M2, True, "gelu"), (ROW, E5M2, False, None)]
)
def test_a_product_is_one_call(chip, capability, rhs_block, rhs_dtype, bias, activation):
    """For any chip, on a machine that has none; the operands go in as they are stored, the result comes out as is."""
    chip(capability)
    lhs, rhs = operands(37, 53, 300, rhs_block=rhs_block, rhs_dtype=rhs_dtype)
    bias = random(2, 53, dtype=jnp.bfloat16) if bias else None
    text = lowered(functools.partial(jaxgemm.gemm, activation=activation), lhs, rhs, bias)
    [call] = [line for line in text.splitlines() if CALL in line]
    types = "xui8>" if capability == "8.0" else "xf8E4M3FN>"
    assert f"tensor<40x384{types}" in call and call.rstrip().endswith("-> tensor<37x53xbf16>")
    assert not [
        word for word in ("dot_general", "stablehlo.pad", "stablehlo.slice", "stablehlo.transpose") if word in text
    ]


def test_training_multiplies_in_all_three_products():
    """What quantises is not named by "triton": it is the best there is."""
    x, w, bias = random(0, 300, 576), random(1, 576, 200), random(2, 200)

    def gradients(*args, implementation):
        dot = functools.partial(jaxgemm.fp8_dot, implementation=implementation)
        return jax.grad(lambda *args: (dot(*args) ** 2).sum(), (0, 1, 2))(*args)

    text = lowered(gradients, x, w, bias)
    assert text.count(CALL) == 3 and "dot_general" not in text


def test_a_batch_that_shares_weights_is_one_product():
    x, w = random(0, 3, 20, 256), random(1, 256, 64)
    text = lowered(lambda x, w, **options: jax.vmap(lambda x: jaxgemm.fp8_dot(x, w, **options))(x), x, w)
    assert text.count(CALL) == 1


def test_groups_are_refused():
    x, w = random(0, 30, 256), random(1, 3, 256, 64)
    with pytest.raises(NotImplementedError, match="it multiplies dense operands alone, and these are grouped"):
        lowered(jaxgemm.grouped_fp8_dot, x, w, np.array([10, 10, 10]))
