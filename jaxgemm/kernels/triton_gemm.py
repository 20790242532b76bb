"""FP8 matrix products in Triton: `out = act(sum_k lhs_scale * rhs_scale * (lhs @ rhs.T) + bias)`, for many chips.

One program computes one tile of the output. Its loop, over k tiles of 128:

    copy      | k3 | k4 | k5 | ...        asynchronous copies fill the stages of shared memory
    multiply  | k0 | k1 | k2 | ...        tensor cores, each k tile into a fresh accumulator
    promote   |    | k0 | k1 | ...        sums += scales * partial product, in float32

A fresh accumulator for each k tile is what makes the promotion honest: the FP8 tensor cores keep fewer than 24 bits of
a running sum, so no more than 128 products may run up in one (DeepSeek-V3 report, section 3.3.2).

Chips without FP8 tensor cores (before capability 8.9) read the same bytes and widen them to float16 in registers, which
holds every e4m3 and e5m2 number exactly; e4m3 keeps a factor of 2^-8 that its scales take back.

Operands are read as they are stored: values padded with zeros to 128 along k, so that no load along k is masked. Rows
past the end are not read: the last row is read again in their stead, and their results are not stored.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.triton_tuning import TritonConfig

K_TILE = tl.constexpr(SCALE_BLOCK)


@triton.jit
def fp8_gemm_triton(
    lhs_values,
    lhs_scales,
    rhs_values,
    rhs_scales,
    bias,
    out,
    m: tl.constexpr,
    n: tl.constexpr,
    k_tiles: tl.constexpr,
    lhs_pitch: tl.constexpr,
    rhs_pitch: tl.constexpr,
    has_bias: tl.constexpr,
    activation: tl.constexpr,
    widen: tl.constexpr,
    lhs_is_e5m2: tl.constexpr,
    rhs_is_e5m2: tl.constexpr,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    band: tl.constexpr,
):
    """The kernel. Its first six arguments are pointers; a pitch is None where scales are of 128x128 blocks."""
    # Find this program's tile: bands of rows of tiles, each walked column by column.
    tiles_m: tl.constexpr = (m + tile_m - 1) // tile_m
    tiles_n: tl.constexpr = (n + tile_n - 1) // tile_n
    program = tl.program_id(0)
    first_of_band = program // (band * tiles_n) * band
    height = tl.minimum(tiles_m - first_of_band, band)
    within_band = program % (band * tiles_n)
    row_start = (first_of_band + within_band % height) * tile_m
    column_start = within_band // height * tile_n

    # Point at the first k tile of both operands.
    # NOTE: only a tile's start needs 64 bits; what is added to it within a tile fits in 32.
    k: tl.constexpr = k_tiles * K_TILE
    depth = tl.arange(0, K_TILE)
    rows = tl.minimum(tl.arange(0, tile_m), m - 1 - row_start)
    columns = tl.minimum(tl.arange(0, tile_n), n - 1 - column_start)
    lhs_tile = lhs_values + row_start.to(tl.int64) * k + (rows[:, None] * k + depth[None, :])
    rhs_tile = rhs_values + column_start.to(tl.int64) * k + (columns[None, :] * k + depth[:, None])

    # NOTE: scales are loaded one k tile ahead. Loaded where they are used, they would hold the product up.
    lhs_scale = load_scale(lhs_scales, row_start, rows, 0, k_tiles, lhs_pitch)
    rhs_scale = load_scale(rhs_scales, column_start, columns, 0, k_tiles, rhs_pitch)
    sums = tl.zeros((tile_m, tile_n), tl.float32)
    for k_tile in range(k_tiles):
        following = tl.minimum(k_tile + 1, k_tiles - 1)
        following_lhs_scale = load_scale(lhs_scales, row_start, rows, following, k_tiles, lhs_pitch)
        following_rhs_scale = load_scale(rhs_scales, column_start, columns, following, k_tiles, rhs_pitch)
        lhs, rhs = tl.load(lhs_tile), tl.load(rhs_tile)
        if widen:
            product = tl.dot(to_float16(lhs, lhs_is_e5m2), to_float16(rhs, rhs_is_e5m2))
            lhs_scale *= (1.0 if lhs_is_e5m2 else 256.0) * (1.0 if rhs_is_e5m2 else 256.0)
        else:
            product = tl.dot(lhs, rhs)
        sums = promote(sums, product, lhs_scale, rhs_scale, lhs_pitch is not None, rhs_pitch is not None)
        lhs_scale, rhs_scale = following_lhs_scale, following_rhs_scale
        lhs_tile += K_TILE
        rhs_tile += K_TILE

    # Finish in float32, and store what lies inside of the output.
    if has_bias:
        sums += tl.load(bias + column_start + columns).to(tl.float32)[None, :]
    sums = activate(sums, activation)
    out_rows, out_columns = tl.arange(0, tile_m)[:, None], tl.arange(0, tile_n)[None, :]
    out_tile = out + row_start.to(tl.int64) * n + column_start + (out_rows * n + out_columns)
    inside = (out_rows < m - row_start) & (out_columns < n - column_start)
    tl.store(out_tile, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_scale(scales, start, rows, k_tile, k_tiles: tl.constexpr, pitch: tl.constexpr):
    """A k tile's scales of an operand: one for each row from `start` on, or a scalar where blocks are 128x128."""
    # NOTE: an early return does not do here: Triton types what stands behind it too.
    if pitch is not None:
        return tl.load(scales + k_tile * pitch + start + rows)
    else:
        return tl.load(scales + start // K_TILE * k_tiles + k_tile)


@triton.jit
def promote(sums, product, lhs_scale, rhs_scale, lhs_by_row: tl.constexpr, rhs_by_row: tl.constexpr):
    """The sums and a partial product times its scales; a scalar is multiplied with the other side's first.

    NOTE: the multiply-add is written as one, since the compiler does not always make one of two.
    """
    if lhs_by_row and rhs_by_row:
        return tl.fma(product * lhs_scale[:, None], rhs_scale[None, :], sums)
    elif lhs_by_row:
        return tl.fma(product, (lhs_scale * rhs_scale)[:, None], sums)
    elif rhs_by_row:
        return tl.fma(product, (lhs_scale * rhs_scale)[None, :], sums)
    else:
        return tl.fma(product, lhs_scale * rhs_scale, sums)


@triton.jit
def to_float16(bits, is_e5m2: tl.constexpr):
    """The bytes of FP8 numbers as float16: e5m2 exactly, e4m3 (which has half its exponents) times 2^-8."""
    bits = bits.to(tl.uint16)
    if is_e5m2:
        return (bits << 8).to(tl.float16, bitcast=True)
    else:
        magnitude = bits & 0x7F
        widened = tl.where(magnitude == 0x7F, 0x7E00, magnitude << 7)  # 0x7F is e4m3's NaN
        return (((bits & 0x80) << 8) | widened).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def activate(x, activation: tl.constexpr):
    """Applies "relu", "gelu" (tanh form) or "silu" to float32 values; NaN stays NaN."""
    if activation == "relu":
        return tl.where(x < 0, 0.0, x)
    elif activation == "gelu":  # 0.5 * (1 + tanh(u)) is the sigmoid of 2u
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif activation == "silu":
        return x / (1.0 + tl.exp(-x))
    else:
        return x


def triton_gemm(
    lhs_values: jax.Array,
    lhs_scales: jax.Array,
    rhs_values: jax.Array,
    rhs_scales: jax.Array,
    bias: jax.Array | None,
    *,
    problem: GemmProblem,
    config: TritonConfig,
    capability: int,
) -> jax.Array:
    """The dense product of stored operands.

    Args:
        lhs_values: FP8 `[align_up(m, 8), align_up(k, 128)]`, zero-padded.
        lhs_scales: float32, 1x128 blocks: `[ceil(k/128), align_up(m, 4)]`; 128x128: `[ceil(m/128), ceil(k/128)]`.
        rhs_values: FP8 `[align_up(n, 8), align_up(k, 128)]`, zero-padded.
        rhs_scales: float32, as for lhs, of n.
        bias: float `[n]` or None.
        problem: what is computed.
        config: tiles; valid for the problem and the chip.
        capability: compute capability to compile for, 89 for 8.9.

    Returns:
        `[m, n]` of `problem.out_dtype`.
    """
    import jax_triton  # what compiles and launches; a test of the kernel alone does without

    if config.widen:
        lhs_values, rhs_values = (jax.lax.bitcast_convert_type(x, jnp.uint8) for x in (lhs_values, rhs_values))
    operands = [lhs_values, lhs_scales, rhs_values, rhs_scales]
    operands.append(lhs_scales if bias is None else bias)  # a pointer that is not read stands for no bias
    out = jax.ShapeDtypeStruct(problem.out_shape, problem.out_dtype)
    # NOTE: asked for, since Triton 3.9 warns that its default will change; the activations gain by it.
    if jax_triton.__version_info__ >= (0, 4):
        version_keywords: dict[str, Any] = dict(out_type=out, backend_options={"enable_fp_fusion": True})
    else:
        version_keywords = dict(out_shape=out, enable_fp_fusion=True)
    return jax_triton.triton_call(
        *operands,
        kernel=fp8_gemm_triton,
        grid=grid(problem, config),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        compute_capability=capability,
        name="_".join(part for part in ("fp8_gemm_triton", problem.label) if part),
        **version_keywords,
        **constants(problem, config),
    )


def grid(problem: GemmProblem, config: TritonConfig) -> tuple[int]:
    """The number of programs: one a tile."""
    return (cdiv(problem.m, config.tile_m) * cdiv(problem.n, config.tile_n),)


def constants(problem: GemmProblem, config: TritonConfig) -> dict[str, Any]:
    """The kernel's arguments that are known when it is compiled."""
    return dict(
        m=problem.m,
        n=problem.n,
        k_tiles=cdiv(problem.k, SCALE_BLOCK),
        lhs_pitch=align_up(problem.m, 4) if problem.lhs_block_shape[0] == 1 else None,
        rhs_pitch=align_up(problem.n, 4) if problem.rhs_block_shape[0] == 1 else None,
        has_bias=problem.has_bias,
        activation=problem.activation,
        widen=config.widen,
        lhs_is_e5m2=problem.lhs_dtype == jnp.float8_e5m2,
        rhs_is_e5m2=problem.rhs_dtype == jnp.float8_e5m2,
        tile_m=config.tile_m,
        tile_n=config.tile_n,
        band=config.band,
    )
