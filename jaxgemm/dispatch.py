"""Which implementation serves a problem on a platform, and why not the others.

This is the only module that asks which devices there are. A new chip is a new kernel file and one row here.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxgemm import reference, tiles, triton_tuning
from jaxgemm.layout import SCALE_BLOCK
from jaxgemm.problem import GemmProblem, QuantizeProblem, RowSums
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

Problem = GemmProblem | QuantizeProblem

OLDEST_JAX_OF_KERNELS = (0, 11, 1)
"""The Pallas of older ones has no kernels like these; that of 0.11.0 lowers no index of a block within a warp."""

HOPPER_CAPABILITY = "9.0"
HOPPER_SM_COUNT = 132
"""Streaming multiprocessors of an H100 or H200 SXM: what a program lowered without a GPU at hand is laid out for."""

PREFERENCE = ("mosaic", "triton", "xla")
"""What `implementation=None` tries, best first."""

logger = logging.getLogger(__name__)


def choose(problem: Problem, platform: str, implementation: str | None) -> str:
    """Returns the implementation that serves `problem` on `platform`.

    On a GPU, each reason for not taking the best one is logged as a warning, once.

    Args:
        problem: what to compute.
        platform: "cpu", "cuda", ... as JAX lowers for.
        implementation: a name, or None for the best one.

    Raises:
        NotImplementedError: if the named implementation cannot serve the problem; the message says why.
    """
    if implementation is not None:
        reason = why_not(implementation, problem, platform)
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} cannot serve this call: {reason}")
        return implementation
    for name in PREFERENCE:
        reason = why_not(name, problem, platform)
        if reason is None:
            return name
        if platform == "cuda":
            _warn_once(f"a {_kind(problem)} problem is not served by {name!r}: {reason} (jaxgemm.explain says where)")
    raise AssertionError("'xla' serves everything")


def why_not(implementation: str, problem: Problem, platform: str) -> str | None:
    """Returns why an implementation cannot serve a problem on a platform, or None if it can."""
    if implementation == "xla":
        return None
    if implementation == "mosaic":
        return _why_not_hopper(platform) or _why_not_mosaic(problem)
    return _why_not_triton(problem, platform) or why_triton_is_missing()


def run_gemm(problem: GemmProblem, platform: str, implementation: str | None, *operands: Any) -> jax.Array:
    """Computes a product of stored operands with the implementation chosen for the platform.

    Args:
        problem: what to compute.
        platform: what is lowered for.
        implementation: a name, or None.
        *operands: lhs values and scales, rhs values and scales, then bias or accumulate if the problem has one, then
            the sizes if it has groups.
    """
    chosen = choose(problem, platform, implementation)
    if not has_work(problem):  # whoever was chosen
        chosen = "xla"
    runners: dict[str, Callable[..., jax.Array]] = {"mosaic": _run_mosaic, "triton": _run_triton, "xla": _run_xla}
    return runners[chosen](problem, *operands)


def has_work(problem: GemmProblem) -> bool:
    """Returns whether there is anything to multiply."""
    return 0 not in (problem.m, problem.n, problem.k, problem.num_groups)


def run_quantize(
    problem: QuantizeProblem, platform: str, implementation: str | None, *inputs: jax.Array
) -> list[jax.Array]:
    """Quantises with the implementation chosen for the platform.

    A kernel that cannot take a function's inputs (float32 tiles of two do not fit) quantises what XLA makes of them.
    """
    chosen = choose(problem, platform, implementation)
    if chosen == "xla" or any(x.size == 0 for x in inputs):
        return reference.quantize(problem, *inputs)
    from jaxgemm.kernels import hopper_quantize as kernels  # loads Pallas, as below

    arrays, sizes = problem.split_inputs(inputs)
    shapes, dtype = [x.shape for x in arrays], arrays[0].dtype
    if problem.function is None or kernels.why_not(problem, dtype, shapes) is None:
        config = kernels.default_config(problem, dtype, arrays[0].size)
        with _kernel_modes():
            return kernels.hopper_quantize(*inputs, problem=problem, config=config, num_sms=sm_count())
    results = zip(reference.apply_function(problem, *arrays), problem.results(shapes), strict=True)
    passes = [(x, dataclasses.replace(plain, rows=problem.rows)) for x, (plain, _) in results]
    rest = () if sizes is None else (sizes,)
    return [y for x, plain in passes for y in run_quantize(plain, platform, chosen, x, *rest)]


def run_row_sums(problem: RowSums, platform: str, implementation: str | None, *operands: jax.Array) -> list[jax.Array]:
    """Sums over rows on a device that has all of them: those that were given, behind lhs, rhs and sizes."""
    del problem, platform, implementation
    return list(operands[3:])


def choose_config(problem: GemmProblem) -> tiles.Choice:
    """Returns the tile that a product gets on this device, and where that was learnt.

    Raises:
        ValueError: if no tile is valid.
    """
    return tiles.choose(as_computed(problem), sm_count(), device_kind())


def choose_triton_config(problem: GemmProblem) -> triton_tuning.TritonConfig:
    """Returns the tile that a dense product gets on this device if the Triton kernel computes it."""
    return triton_tuning.choose_config(problem, _capability_number(), sm_count())


def as_computed(problem: GemmProblem) -> GemmProblem:
    """Returns what the kernel computes: what is added to a given array is summed in float32, and rounded after that."""
    return dataclasses.replace(problem, out_dtype=np.dtype(np.float32)) if problem.accumulate else problem


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
        "k_masked": reference.k_masked_gemm,
    }
    return products[problem.kind](problem, lhs, rhs, addend, *rest)


def _run_mosaic(problem: GemmProblem, *operands: Any) -> jax.Array:
    from jaxgemm.kernels.hopper_gemm import hopper_gemm  # loads Pallas, which importing jaxgemm must not

    *stored, sizes = operands if problem.kind != "dense" else (*operands, None)
    num_sms = sm_count()
    bias = stored.pop() if problem.has_bias else None
    accumulate = stored.pop() if problem.accumulate else None
    computed, config = as_computed(problem), choose_config(problem).config
    run: Any = functools.partial(hopper_gemm, problem=computed, config=config, num_sms=num_sms)
    with _kernel_modes():
        return run(*stored, bias, sizes, accumulate).astype(problem.out_dtype)


def _run_triton(problem: GemmProblem, *operands: Any) -> jax.Array:
    from jaxgemm.kernels.triton_gemm import triton_gemm  # loads Triton, which importing jaxgemm must not

    lhs_values, lhs_scales, rhs_values, rhs_scales, *rest = operands
    bias = rest[0] if problem.has_bias else None
    config, capability = choose_triton_config(problem), _capability_number()
    with _kernel_modes():
        return triton_gemm(
            lhs_values, lhs_scales, rhs_values, rhs_scales, bias, problem=problem, config=config, capability=capability
        )


@contextlib.contextmanager
def _kernel_modes() -> Iterator[None]:
    """The modes that kernels are written for, whatever those of the program that calls them."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):  # they count in 32 bits
        yield


def _why_not_hopper(platform: str) -> str | None:
    """Why kernels for Hopper cannot run where a program is lowered for; None if they can."""
    if platform != "cuda":
        return f"it needs a Hopper GPU, and this program is lowered for {platform}"
    if jax.__version_info__ < OLDEST_JAX_OF_KERNELS:
        oldest = ".".join(map(str, OLDEST_JAX_OF_KERNELS))
        return f"it needs jax >= {oldest} (Python >= 3.12), and this is jax {jax.__version__}"
    capability = cuda_capability()
    if capability not in (HOPPER_CAPABILITY, None):  # None: lowered for CUDA where no GPU is at hand
        return f"it needs a Hopper GPU (compute capability 9.0), and this one has {capability}"
    return None


def _why_not_mosaic(problem: Problem) -> str | None:
    """Which problems have no Hopper kernel."""
    if isinstance(problem, QuantizeProblem):
        if problem.block_shape not in (ROW_BLOCK, SQUARE_BLOCK):
            return f"blocks must be (1, 128) or (128, 128), and are {problem.block_shape}"
        return "columns are summed where they are scaled" if problem.column_sum and not problem.transposed else None
    if problem.kind == "k_grouped" and problem.segment_alignment != SCALE_BLOCK:
        return "each group's columns must start at a multiple of 128, as jaxgemm.quantize_grouped lays them out"
    if problem.kind != "dense" and problem.lhs_block_shape != ROW_BLOCK:
        return f"groups of rows need an lhs of blocks (1, 128), and it has {problem.lhs_block_shape}"
    return _why_not_blocks(problem)


def _why_not_triton(problem: Problem, platform: str) -> str | None:
    """Which problems the Triton kernel does not serve, and which devices."""
    if platform != "cuda":
        return f"it needs an NVIDIA GPU, and this program is lowered for {platform}"
    if isinstance(problem, QuantizeProblem):
        return "it multiplies, and does not quantise"
    if problem.kind != "dense":
        return f"it multiplies dense operands alone, and these are {problem.kind}"
    if _capability_number() < triton_tuning.LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or newer, and this one has {cuda_capability()}"
    return _why_not_blocks(problem)


def _why_not_blocks(problem: GemmProblem) -> str | None:
    """Which blocks no kernel takes."""
    for name, block_shape in (("lhs", problem.lhs_block_shape), ("rhs", problem.rhs_block_shape)):
        if block_shape not in (ROW_BLOCK, SQUARE_BLOCK):
            return f"{name} must have blocks of (1, 128) or (128, 128), and has {block_shape}"
    return None


@functools.cache
def why_triton_is_missing() -> str | None:
    """Returns what the Triton kernel lacks of this installation, or None if it is all there."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"it needs {' and '.join(missing)}, not installed here: pip install 'jaxgemm[cuda]'"
    if not hasattr(importlib.import_module("jaxlib.gpu_triton"), "TritonKernel"):
        return "it needs JAX's CUDA plugin, not installed here: pip install 'jaxgemm[cuda]'"
    try:
        importlib.import_module("jax_triton")
    except Exception as error:  # it leans on private names of jax and triton, and may fail in any way at other versions
        return f"jax_triton is installed, and cannot be imported beside this jax and triton: {error!r}"
    return None


def _capability_number() -> int:
    """The compute capability as Triton counts it, 89 for 8.9; a Hopper's where there is no GPU."""
    major, minor = (cuda_capability() or HOPPER_CAPABILITY).split(".")
    return 10 * int(major) + int(minor)


@functools.cache
def cuda_capability() -> str | None:
    """Returns the compute capability of the first CUDA device, "9.0" for Hopper; None where there is none."""
    device = _cuda_device()
    return None if device is None else device.compute_capability


@functools.cache
def sm_count() -> int:
    """Returns the streaming multiprocessors of the first CUDA device, or a Hopper's where there is none."""
    device = _cuda_device()
    return HOPPER_SM_COUNT if device is None else device.core_count


@functools.cache
def device_kind() -> str | None:
    """Returns what JAX calls the first CUDA device ("NVIDIA H200"); None where there is none."""
    device = _cuda_device()
    return None if device is None else device.device_kind


def _cuda_device() -> Any:
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _kind(problem: Problem) -> str:
    return "quantizing" if isinstance(problem, QuantizeProblem) else problem.kind
