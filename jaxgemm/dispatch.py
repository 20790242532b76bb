"""Which implementation serves a problem on a platform, and why not the others.

This is the only module that asks which devices there are. A new chip is a new kernel file and one row here.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxgemm import reference
from jaxgemm.problem import GemmProblem, QuantizeProblem

Problem = GemmProblem | QuantizeProblem

HOPPER_CAPABILITY = "9.0"
HOPPER_SM_COUNT = 132
"""Streaming multiprocessors of an H100 or H200 SXM: what a program lowered without a GPU at hand is laid out for."""

_interpret = False


@contextlib.contextmanager
def interpret_kernels() -> Iterator[None]:
    """Runs the GPU kernels in Pallas' interpreter on the CPU, inside this context: for tests, slow.

    Applies to whatever is lowered inside; clear JAX's caches (`jax.clear_caches`) when reusing functions outside.
    """
    global _interpret
    previous, _interpret = _interpret, True
    try:
        yield
    finally:
        _interpret = previous


def choose(problem: Problem, platform: str, implementation: str | None) -> str:
    """Returns the implementation that serves `problem` on `platform`.

    Args:
        problem: what to compute.
        platform: "cpu", "cuda", ... as JAX lowers for.
        implementation: a name, or None for the best one.

    Raises:
        NotImplementedError: if the named implementation cannot serve the problem; the message says why.
    """
    if implementation is None:
        return next(name for name in ("mosaic", "xla") if why_not(name, problem, platform) is None)
    reason = why_not(implementation, problem, platform)
    if reason is not None:
        raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {reason}")
    return implementation


def why_not(implementation: str, problem: Problem, platform: str) -> str | None:
    """Returns why an implementation cannot serve a problem on a platform, or None if it can."""
    if implementation == "xla":
        return None
    return f"{implementation!r} has no kernel for this"


def run_gemm(problem: GemmProblem, platform: str, implementation: str | None, *operands: Any) -> jax.Array:
    """Computes a product of stored operands with the implementation chosen for the platform.

    Args:
        problem: what to compute.
        platform: what is lowered for.
        implementation: a name, or None.
        *operands: lhs values and scales, rhs values and scales, then bias or accumulate if the problem has one, then
            the sizes if it has groups.
    """
    choose(problem, platform, implementation)
    return _run_xla(problem, *operands)


def run_quantize(problem: QuantizeProblem, platform: str, implementation: str | None, x: jax.Array) -> list[jax.Array]:
    """Quantises with the implementation chosen for the platform."""
    choose(problem, platform, implementation)
    return reference.quantize(x, problem)


def _run_xla(problem: GemmProblem, *operands: Any) -> jax.Array:
    lhs_values, lhs_scales, rhs_values, rhs_scales, *rest = operands
    lhs = reference.dequantize(lhs_values, lhs_scales, problem.m, problem.k, problem.lhs_block_shape)
    rhs = reference.dequantize(rhs_values, rhs_scales, problem.n, problem.k, problem.rhs_block_shape)
    addend = rest.pop(0) if problem.has_bias or problem.accumulate else None
    products: dict[str, Callable[..., jax.Array]] = {
        "dense": reference.gemm,
        "grouped": reference.grouped_gemm,
        "masked": reference.masked_grouped_gemm,
        "k_grouped": reference.k_grouped_gemm,
    }
    return products[problem.kind](problem, lhs, rhs, addend, *rest)


@functools.cache
def cuda_capability() -> str | None:
    """Returns the compute capability of the first CUDA device, "9.0" for Hopper; None where there is none."""
    try:
        return jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None
