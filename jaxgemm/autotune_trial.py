"""One product with one configuration, made up from its description: random operands, the call, the comparison."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm import dispatch, layout, reference, tiles
from jaxgemm.bench.measure import Call
from jaxgemm.gemm_config import GemmConfig
from jaxgemm.problem import GemmProblem, QuantizeProblem
from jaxgemm.tile_candidates import expected_extent

SMALL_ROWS = 128
"""Up to so many rows of lhs a weight is read once and the product does little else: it is measured cold."""

MOST_WEIGHTS = 256
"""Weights so small that it takes more of them to fill a cache stay in it in any program, and are measured warm."""

BOUND = 1e-5
"""Largest difference from the oracle, of any tile of 128x128, that rounding can explain."""

EPILOGUE_SEED = 1 << 30

Operands = list[Any]
"""The arrays that `dispatch.run_gemm` takes after the problem."""


def operand_sets(problem: GemmProblem, cold_bytes: float = 2e8) -> list[Operands]:
    """Returns random operands; for few rows, as many weights in turn as a cache cannot hold.

    Groups are equal, or differ by one row (128 columns, where they are aligned). Of a masked group `expected_m` rows
    are valid, if that is given, else all.
    """
    lhs_groups, rhs_groups = (
        (problem.num_groups,) if has_groups else () for has_groups in problem.operands_have_groups
    )
    weight_bytes = problem.n * problem.k * math.prod(rhs_groups)
    is_small = problem.kind not in ("k_grouped", "k_masked") and expected_extent(problem).m <= SMALL_ROWS
    copies = 1 + math.ceil(cold_bytes / weight_bytes) if is_small else 1
    copies = copies if copies <= MOST_WEIGHTS else 1
    lhs = stored_operand(0, (*lhs_groups, problem.m, problem.k), problem.lhs_block_shape, problem.lhs_dtype)
    rest = _epilogue_operands(problem)
    shape = (*rhs_groups, problem.n, problem.k)
    weights = [stored_operand(1 + i, shape, problem.rhs_block_shape, problem.rhs_dtype) for i in range(copies)]
    return [[*lhs, *weight, *rest] for weight in weights]


def group_sizes(problem: GemmProblem) -> np.ndarray | None:
    """Returns int32 sizes: rows (for "k_grouped" columns) split evenly, or what is expected of a mask; None if dense.

    Example:
        >>> e4m3, f32 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float32)
        >>> group_sizes(GemmProblem("grouped", 10, 8, 8, e4m3, e4m3, (1, 128), (1, 128), f32, num_groups=4)).tolist()
        [3, 3, 2, 2]
    """
    if problem.kind == "dense":
        return None
    if problem.kind == "masked":
        return np.full(problem.num_groups, expected_extent(problem).m, np.int32)
    if problem.kind == "k_masked":
        return np.full(problem.num_groups, problem.k, np.int32)
    step = problem.segment_alignment if problem.kind == "k_grouped" else 1
    shares = (problem.k if problem.kind == "k_grouped" else problem.m) // step
    even = np.full(problem.num_groups, shares // problem.num_groups, np.int32)
    even[: shares % problem.num_groups] += 1
    return even * np.int32(step)


def stored_operand(seed: int, shape: tuple[int, ...], block_shape: tuple[int, int], dtype: Any) -> list[jax.Array]:
    """Returns values and scales, as they are stored, of random normal numbers `[rows, cols]` or `[g, rows, cols]`.

    They are quantised in plain JAX, one group at a time: the kernels are not to be trusted yet, and all groups in
    float32 would take four times the memory of the operand.
    """
    return _stored_operand(jax.random.key(seed), shape, QuantizeProblem(block_shape, np.dtype(dtype)))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _stored_operand(key: jax.Array, shape: tuple[int, ...], problem: QuantizeProblem) -> list[jax.Array]:
    def matrix(key: jax.Array) -> list[jax.Array]:
        return reference.quantize(problem, jax.random.normal(key, shape[-2:]))

    return matrix(key) if len(shape) == 2 else jax.lax.map(matrix, jax.random.split(key, shape[0]))


def _epilogue_operands(problem: GemmProblem) -> Operands:
    """Bias or accumulator, then sizes: what follows values and scales."""
    operands: Operands = []
    if problem.has_bias:
        groups = () if problem.kind == "dense" else (problem.num_groups,)
        operands.append(jax.random.normal(jax.random.key(EPILOGUE_SEED), (*groups, problem.n), jnp.float32))
    if problem.accumulate:
        operands.append(jax.random.normal(jax.random.key(EPILOGUE_SEED), problem.out_shape, jnp.float32))
    sizes = group_sizes(problem)
    return operands if sizes is None else [*operands, jnp.asarray(sizes)]


def compile_config(problem: GemmProblem, config: GemmConfig, sets: Sequence[Operands]) -> Call:
    """Compiles the Hopper kernel with a configuration, whatever would be chosen."""

    def product(*operands: Any) -> jax.Array:
        return dispatch.run_gemm(problem, "cuda", "mosaic", *operands)

    with tiles.forced(config):
        return Call.jitted(product, *sets)


def oracle(problem: GemmProblem, operands: Operands) -> jax.Array:
    """Returns the float32 product of the dequantised operands, in the result's dtype."""
    return _oracle(problem, *operands)


@functools.partial(jax.jit, static_argnums=0)
def _oracle(problem: GemmProblem, *operands: Any) -> jax.Array:
    return dispatch.run_gemm(problem, "default", "xla", *operands)


def difference(problem: GemmProblem, actual: Any, expected: Any) -> float:
    """Returns the largest `1 - 2<x, y> / (<x, x> + <y, y>)` of any tile of 128x128; infinite where one has a NaN.

    Rows that the problem leaves unspecified are not looked at. In this form, `|x - y|^2 / (|x|^2 + |y|^2)`, it does
    not cancel and float32 will do.
    """
    if problem.kind == "masked":
        actual, expected = (x[:, : expected_extent(problem).m] for x in (actual, expected))
    return float(_difference(actual, expected))


@jax.jit
def _difference(actual: jax.Array, expected: jax.Array) -> jax.Array:
    tile = layout.SCALE_BLOCK

    def tile_sums(x: jax.Array) -> jax.Array:
        rows, columns = (layout.cdiv(size, tile) for size in x.shape[-2:])
        padded = layout.pad_trailing(x, (rows * tile, columns * tile))
        return padded.reshape(math.prod(x.shape[:-2]), rows, tile, columns, tile).sum((2, 4))

    x, y = (array.astype(jnp.float32) for array in (actual, expected))
    apart, total = tile_sums((x - y) ** 2), tile_sums(x * x + y * y)
    worst = jnp.where(total == 0, jnp.float32(0), apart / jnp.where(total == 0, jnp.float32(1), total)).max(initial=0)
    return jnp.where(jnp.isnan(apart).any() | jnp.isnan(total).any(), jnp.float32(jnp.inf), worst)
