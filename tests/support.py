"""What the tests share: random operands, oracles and the measures that compare with them.

The oracle of a product is the float64 product of the *dequantised* operands: it leaves only the rounding of the sums,
so a scale that is wrong in one block of one tile stands out.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

import jaxgemm
from jaxgemm import dispatch

TIGHT = 1e-5
"""Bound against the oracle, on every tile."""

LOOSE = 1e-3
"""Bound against the unquantised product: what DeepGEMM's own tests ask."""

SAME = 1e-9 if jax.default_backend() == "cpu" else 1e-4
"""Bound between two ways to compute the same, on every tile.

On a GPU they may get other kernels. These sum FP8 products in another order, or with fewer bits (the tensor core's own
sums), and where a result is quantised again, a rounding apart can become one of FP8: 1/16 of a value.
"""

REQUANTISED = max(TIGHT, SAME)
"""Bound against the oracle where results of kernels are quantised and multiplied again."""

TILE = 128

ROW, SQUARE = (1, 128), (128, 128)
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def random(seed, *shape, dtype=jnp.float32, scale=1.0):
    """Normal numbers whose magnitude varies from row to row and column to column, as scales deserve."""
    key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(key[0], shape)
    spread = jnp.exp(jax.random.normal(key[1], (*shape[:-1], 1)))
    return (x * spread * scale).reshape(shape).astype(dtype)


def difference(actual, expected):
    """`1 - 2<x, y> / (<x, x> + <y, y>)`: 0 if equal, NaN if one holds NaN where the other does not."""
    x, y = (np.asarray(a, np.float64) for a in (actual, expected))
    assert x.shape == y.shape, (x.shape, y.shape)
    total = (x * x).sum() + (y * y).sum()
    return 0.0 if total == 0 else 1 - 2 * (x * y).sum() / total


def tile_difference(actual, expected):
    """The largest `difference` of any 128x128 tile of the last two axes."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert x.shape == y.shape, (x.shape, y.shape)
    x, y = (a.reshape(-1, *a.shape[-2:]) if a.ndim > 1 else a[None, None] for a in (x, y))
    rows, cols = x.shape[-2:]
    return max(
        (
            difference(x[g, i : i + TILE, j : j + TILE], y[g, i : i + TILE, j : j + TILE])
            for g in range(x.shape[0])
            for i in range(0, rows, TILE)
            for j in range(0, cols, TILE)
        ),
        default=0.0,
    )


def assert_close(actual, expected, bound=TIGHT):
    """Fails unless the two agree on every tile to `bound`; bfloat16 results round by up to 2^-9, squared here."""
    assert tile_difference(actual, expected) <= bound
    assert np.array_equal(np.isnan(np.asarray(actual, np.float64)), np.isnan(np.asarray(expected, np.float64)))


def dequantized(q):
    """The float64 array that a `ScaledArray` stands for, by plain numpy: no code of the library but its parts."""
    values, scales = np.asarray(q.values).astype(np.float64), np.asarray(q.scales).astype(np.float64)
    full = scales.repeat(q.block_shape[0], -2).repeat(q.block_shape[1], -1)
    return values * full[..., : q.rows, : q.cols]


def oracle(lhs, rhs, bias=None, activation=None):
    """The float64 product of two `ScaledArray`s, with epilogue."""
    out = dequantized(lhs) @ np.swapaxes(dequantized(rhs), -1, -2)
    if bias is not None:
        out = out + np.asarray(bias, np.float64)
    return activate(out, activation)


def activate(x, activation):
    """The activations in numpy."""
    x = np.asarray(x, np.float64)
    return {
        None: lambda: x,
        "relu": lambda: np.maximum(x, 0),
        "gelu": lambda: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "silu": lambda: x * 0.5 * (1 + np.tanh(x / 2)),
    }[activation]()


def operands(m, n, k, *, lhs_block=ROW, rhs_block=SQUARE, lhs_dtype=E4M3, rhs_dtype=E4M3, groups=(), seed=0):
    """Random quantised operands of a product, `lhs [m, k]` and `rhs [*groups, n, k]`."""
    lhs = jaxgemm.quantize(random(seed, m, k), lhs_block, lhs_dtype)
    rhs = jaxgemm.quantize(random(seed + 1, *groups, n, k), rhs_block, rhs_dtype)
    return lhs, rhs


def group_rows(sizes, limit):
    """The `(group, start, end)` of each group, by the documented rule for bad sizes."""
    start = 0
    for group, size in enumerate(sizes):
        end = min(start + max(int(size), 0), limit)
        yield group, start, end
        start = end


def collectives(lowered, tmp_path):
    """What the partitioner put in, as `(operation, dtype, shape)`; a CPU's compiler turns FP8 into float16 later on."""
    compiled = lowered.compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning"})
    (path,) = tmp_path.glob("*after_spmd-partitioning*.txt")
    pattern = r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
    found = re.findall(pattern, path.read_text())
    return compiled, [(op, dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape, op in found]


def available_implementations(kind="dense"):
    """Names of the implementations that products of a kind have on this machine."""
    names = ["xla"]
    if jax.default_backend() == "gpu":
        if dispatch.cuda_capability() == dispatch.HOPPER_CAPABILITY:
            names.append("mosaic")
        if kind == "dense" and dispatch.why_triton_is_missing() is None:
            names.append("triton")
    return names
