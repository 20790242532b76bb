"""How far a result is from the float32 product of the dequantised operands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxgemm

SAMPLED_ROWS = 256
"""Rows of a result that are compared: enough to touch every tile column and, in large products, every tile row."""

jit_oracle = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})
"""Compiles an oracle. It runs once and is not timed, so XLA need not try out algorithms for it, for 8 s a shape."""


def difference(actual: Any, expected: Any) -> float:
    """Returns `1 - 2<x, y> / (<x, x> + <y, y>)` in float64: 0 if equal, NaN if one holds NaN."""
    x, y = (np.asarray(array).astype(np.float64) for array in (actual, expected))
    total = float((x * x).sum() + (y * y).sum())
    return 0.0 if total == 0 else 1 - 2 * float((x * y).sum()) / total


def sampled_rows(rows: int, seed: int = 0) -> np.ndarray:
    """Returns at most `SAMPLED_ROWS` distinct rows in order, the first and the last among them."""
    if rows <= SAMPLED_ROWS:
        return np.arange(rows)
    inner = np.random.default_rng(seed).choice(np.arange(1, rows - 1), SAMPLED_ROWS - 2, replace=False)
    return np.concatenate([[0], np.sort(inner), [rows - 1]])


def padded_rows(rows: int) -> np.ndarray:
    """Returns `sampled_rows`, the last one repeated: of one shape, so that groups of all sizes share a program."""
    sampled = sampled_rows(rows)
    return np.pad(sampled, (0, SAMPLED_ROWS - sampled.size), mode="edge")


def dense_difference(
    out: jax.Array, lhs: jaxgemm.ScaledArray, rhs: jaxgemm.ScaledArray, bias: jax.Array | None = None
) -> float:
    """Returns the difference of a product `[m, n]` from the oracle, over sampled rows."""
    rows = sampled_rows(out.shape[0])
    expected = oracle_rows(lhs, rhs, rows)
    if bias is not None:
        expected = expected + np.asarray(bias, np.float32)
    return difference(out[rows], expected)


@jit_oracle
def oracle_rows(lhs: jaxgemm.ScaledArray, rhs: jaxgemm.ScaledArray, rows: Any) -> jax.Array:
    """Returns rows of the float32 product of the dequantised operands, `[m, k] x [n, k] -> [len(rows), n]`."""
    return nt_product(jaxgemm.dequantize(lhs)[rows], jaxgemm.dequantize(rhs))


def nt_product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns `lhs @ rhs.T` in float32 with the highest precision there is."""
    return jnp.einsum("mk,nk->mn", lhs, rhs, precision="highest", preferred_element_type=jnp.float32)
