"""`bench gemm`: products of operands that are FP8 already."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm.bench import accuracy
from jaxgemm.bench.measure import Call
from jaxgemm.bench.peers import GEMM_PEERS, GemmOperands, prepare_peers
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes
from jaxgemm.bench.suites import GemmCase, deepgemm_ratio
from jaxgemm.bench.torch_peers import TorchResult

PEERS = tuple(GEMM_PEERS)
WITH_BIAS = f"{OWN}+bias"


def run_case(case: GemmCase, setup: Setup) -> list[Row]:
    """Measures one product beside its peers, and checks each result against the oracle."""
    operands = make_operands(case, setup)
    weight_bytes = stored_bytes(operands.scaled_rhs[0])
    cold = len(operands.rhs) > 1
    bias = normal(2, case.n, dtype=jnp.float32) if setup.bias else None
    calls = {OWN: product_call(operands, None, setup)}
    if bias is not None:
        calls[WITH_BIAS] = product_call(operands, bias, setup)
    peers, missing = prepare_peers(setup.peers, operands, setup.timer)
    row = Row(
        case.name,
        dict(group=case.group, kind=case.kind, m=case.m, n=case.n, k=case.k, cold=cold, weights=len(operands.rhs)),
        flops=2.0 * case.m * case.n * case.k,
        bytes=float(
            stored_bytes(operands.scaled_lhs) + weight_bytes + case.m * case.n * jnp.dtype(operands.out_dtype).itemsize
        ),
    )
    row.measured(setup, {**calls, **peers}, missing)
    scaled = operands.scaled_lhs, operands.scaled_rhs[0]
    row.checks["difference"] = accuracy.dense_difference(calls[OWN].first(), *scaled)
    if bias is not None:
        row.checks["difference with bias"] = accuracy.dense_difference(calls[WITH_BIAS].first(), *scaled, bias)
    if "torch-blockwise" in row.times:  # shows that both read the same operands in the same layout
        result: TorchResult = peers["torch-blockwise"].first()
        row.checks["torch-blockwise difference"] = accuracy.dense_difference(result.numpy(), *scaled)
    beside = deepgemm_ratio(case)
    if beside is not None:
        row.checks["DeepGEMM x tensorwise (H100)"] = beside
    return [row]


def make_operands(case: GemmCase, setup: Setup) -> GemmOperands:
    """Returns random operands, several weights if they shall be cold."""
    copies = setup.weight_copies(case.n * case.k, case.is_small)
    rhs_block = (1, 128) if case.kind == "wgrad" else (128, 128)
    # NOTE: quantised in plain JAX, so that the product is measured on a device where the quantising kernels fail.
    quantize_lhs, quantize_rhs = (
        jax.jit(functools.partial(jaxgemm.quantize, block_shape=block, implementation="xla"))
        for block in ((1, 128), rhs_block)
    )
    lhs = normal(0, case.m, case.k)
    rhs = tuple(normal(10 + i, case.n, case.k) for i in range(copies))
    out_dtype = jnp.float32 if case.kind == "wgrad" else jnp.bfloat16
    return GemmOperands(lhs, rhs, quantize_lhs(lhs), tuple(quantize_rhs(x) for x in rhs), out_dtype)


def product_call(operands: GemmOperands, bias: jax.Array | None, setup: Setup) -> Call:
    """Returns this library's product."""

    def product(lhs: Any, rhs: Any, bias: Any) -> jax.Array:
        return jaxgemm.gemm(
            lhs, rhs, bias, preferred_element_type=operands.out_dtype, implementation=setup.implementation
        )

    return Call.jitted(product, *([operands.scaled_lhs, rhs, bias] for rhs in operands.scaled_rhs))
