"""Which tile of the Hopper kernel a model takes to be the fastest for a problem.

Everything here is plain Python on static shapes: no device is asked, and nothing is run.
"""

import dataclasses
import functools
import math
import statistics

from jaxgemm.gemm_config import (
    GemmConfig,
    all_scales_per_row,
    block_shapes,
    clusters_at_once,
    pairs_k_tiles,
    takes_turns,
)
from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tile_candidates import FEW_ROWS, candidates, expected_extent, is_of_later_loop, reads_weights_once

MAC_MICROSECONDS = 2.14e-5
"""Time of a k tile on one SM for each element of the output tile; H100, dense, tiles 192x128 and 128x192. Groups of
rows with k of 2048 and 3072 take as long in high tiles that share loads."""

TILE_MICROSECONDS = {1: 0.9, 2: 1.3}
"""Time of a tile outside its main loop, by the waves of a warpgroup; the intercept of the same measurements."""

SWAPPED_WARPGROUP_MICROSECONDS = 0.3
"""What each warpgroup beyond the first adds to a tile of few rows: 4096x7168 with 128 weight rows a block takes 0.6 to
1.6 us more than with 64 (H100)."""

OLDER_MAC_MICROSECONDS = 2.29e-5
"""The same of an earlier main loop on an H200, by which groups of few rows and 1x128 blocks on both sides were
measured."""

GROUP_TILE_MICROSECONDS = {1: 1.1, 2: 1.6}
"""As TILE_MICROSECONDS for groups of many rows: contiguous products, H100."""

OLDER_GROUP_TILE_MICROSECONDS = {1: 2.2, 2: 3.7}
"""The same of the earlier main loop on an H200."""

MULTIPLIED_MAC_MICROSECONDS = {1: 3.02e-5, 2: 2.76e-5}
"""As MAC_MICROSECONDS where the tensor core multiplies the scales, by the waves of a warpgroup: 128x128 and 256x104;
H100, float32."""

MULTIPLIED_TILE_MICROSECONDS = {1: 0.9, 2: 2.2}
"""As TILE_MICROSECONDS, of the same measurements."""

SPLIT_SCALES_MICROSECONDS = 2.0
"""Time of the kernel that splits scales for it: 1.7 to 2.4 us for 0.3 to 1 MB of them; H100."""


MISSING_ROW_MICROSECONDS = 0.0025
"""What each row of a tile past the end of lhs, beyond 16 of them, adds to a k tile: the TMA fills them with zeros.
16, 32, 48 and 64x4096x4096 took 11.6, 10.3, 9.1 and 9.1 us in tiles of 64x32 while those were loaded (H100)."""


LATENCY_MICROSECONDS = 0.2
"""Least time of a k tile: wait, multiply, promote; one warpgroup alone takes longer (`_latency`)."""

SM_BYTES_PER_MICROSECOND = 100e3
"""What one SM takes in from the L2 cache: 128 rows in tiles of 128x64 on an H200 (90), and 128x96 beside it, H100."""

MEMORY_BYTES_PER_MICROSECOND = 3.6e6
"""What weights are read at: device memory, between an H100 and an H200."""

SPLIT_MICROSECONDS = (0.1, 0.0143)
"""Time to exchange partial sums in a cluster: of any tile, and for each of its columns; H100, 8 to 64 columns."""


GROUP_SPREAD = (0.7, 0.85, 1.0, 1.15, 1.3)
"""Sizes that groups are taken to have, in shares of the expected one: the range of DeepGEMM's tests."""


def predicted_microseconds(problem: GemmProblem, config: GemmConfig, num_sms: int) -> float:
    """A model of the kernel's time: the slowest of tensor cores, latency, L2 and memory, wave by wave."""
    extent = expected_extent(problem)
    spread = GROUP_SPREAD if problem.kind == "grouped" or problem.expected_m is not None else (1.0,)
    row_tiles = statistics.mean(cdiv(math.ceil(extent.m * share), config.tile_m) for share in spread)
    clusters = math.ceil(extent.products * row_tiles) * cdiv(cdiv(problem.n, config.tile_n), config.share)
    waves = cdiv(clusters, clusters_at_once(config, num_sms))
    k_tiles = cdiv(cdiv(extent.k, SCALE_BLOCK), config.split_k)
    multiply = config.tile_rows * max(config.tile_columns, 16) * _mac_microseconds(problem, config)
    ingest = (config.tile_m + config.tile_n) * SCALE_BLOCK / SM_BYTES_PER_MICROSECOND
    k_tile = max(multiply, ingest, _latency(problem, config))
    k_tile += _missing_rows(problem, config) * MISSING_ROW_MICROSECONDS
    k_tile *= _of_a_long_walk(problem, config, waves)
    tile = _microseconds_beside_main_loop(problem, config)
    before = SPLIT_SCALES_MICROSECONDS if config.multiply_scales else 0.0
    memory = extent.products * (extent.m + problem.n) * extent.k / MEMORY_BYTES_PER_MICROSECOND
    if problem.kind in ("grouped", "masked") and is_of_later_loop(problem):
        return math.hypot(waves * k_tiles * k_tile, memory) + waves * tile
    if problem.kind != "dense":
        return before + max(waves * k_tiles * k_tile, memory) + waves * tile
    split = SPLIT_MICROSECONDS[0] + SPLIT_MICROSECONDS[1] * config.tile_columns if config.split_k > 1 else 0.0
    after_last_bytes = 2 * k_tile + tile
    longest = max(waves * (k_tiles * k_tile + tile), memory + after_last_bytes) + waves * split
    return before + longest * _of_idle_blocks(problem, config, clusters * config.share, num_sms)


def _missing_rows(problem: GemmProblem, config: GemmConfig) -> int:
    """Rows past the end of lhs, beyond 16, that the last tile of few rows loads as zeros; a single tile loads none."""
    if problem.kind != "dense" or config.swap_operands or not config.tile_m < problem.m <= FEW_ROWS:
        return 0
    return max(0, align_up(problem.m, config.tile_m) - problem.m - 16)


def _of_idle_blocks(problem: GemmProblem, config: GemmConfig, tiles: int, num_sms: int) -> float:
    """Few rows: what it costs that multiprocessors are left over, of which others could have asked for weights."""
    if problem.m > FEW_ROWS:
        return 1.0
    blocks = min(tiles, clusters_at_once(config, num_sms)) * config.split_k
    return 1.0 + 0.02 * (1.0 - min(blocks, num_sms) / num_sms)


def _of_a_long_walk(problem: GemmProblem, config: GemmConfig, waves: int) -> float:
    """Time of a k tile where many waves of long k follow each other, beside one of few: operands come from afar again.

    Beyond eight waves 256x128 takes 0 to 3 % more than the model says, 192x128 in bands along n 1 to 5 %, along m 4 to
    8 %, and 128x192, which shares no loads, 0 to 5 % (H100; main-loop-trials, even-waves and edges-h100.json).
    """
    if not is_of_later_loop(problem):
        return 1.0
    if problem.kind != "dense":
        return _of_a_long_walk_of_groups(problem, config, waves)
    if problem.k < 4096 or waves <= 8 or config.tile_m > 192:
        return 1.0
    return 1.02 if config.tile_m <= 128 else 1.0 if config.band_along_n else 1.04


def _of_a_long_walk_of_groups(problem: GemmProblem, config: GemmConfig, waves: int) -> float:
    """The same for groups of many rows, each with weights of its own.

    Beyond eight waves with k of 4096 and more, 256x128 with shared loads takes 7 % more to 1 % less than the model
    says, without 0 to 8 % more, 192x128 1 to 13 and 14 to 30 %, 128x192 8 to 16 %; where k is less, -3 to 3 %, and
    128x192 5 to 7 %. Of groups that read their weights once, with 192 rows each, tiles of 128 rows take 4 to 10 % less,
    256x128 2 % less to 3 % more, 192x128 25 % more (H100, group-shares-h100.json).
    """
    if reads_weights_once(problem):
        return {256: 1.06, 192: 1.25}.get(config.tile_m, 1.0)
    if waves <= 8:
        return 1.0
    is_long = problem.k >= 4096
    if config.tile_m <= 128:
        return 1.12 if is_long else 1.06
    with_share, alone = {256: (1.03, 1.05), 192: (1.06, 1.15)}[config.tile_m]
    return 1.0 if not is_long else alone if config.share == 1 else with_share


def _mac_microseconds(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a k tile for each element of the tile, where the tensor core and the promotion take it."""
    if config.multiply_scales:
        each = MULTIPLIED_MAC_MICROSECONDS[min(config.num_waves, 2)]
        if config.num_waves == 1:
            return each
        # 256x80 takes 3 % more of it, high tiles in bfloat16 3 % less.
        return each * (1 + (104 - config.tile_columns) / 800) * (0.97 if problem.out_dtype.itemsize < 4 else 1.0)
    per_row = all_scales_per_row(problem)
    narrow = 1 + max(0, (96 if per_row else 128) - config.tile_columns) / 256
    chunks = config.tile_columns // math.gcd(config.tile_columns, SCALE_BLOCK)
    is_later = is_of_later_loop(problem)
    promote = _promotion_of_rows(problem, config) if per_row else 1 + (0.01 if is_later else 0.02) * (chunks - 1)
    promote *= 1.5 if config.swap_operands and config.tile_columns > 64 else 1.0  # measured at 128 rows, 7168x16384
    shared = 1.0 if config.share == 1 else 0.98 if config.warpgroups == 3 else 0.995
    each = MAC_MICROSECONDS if is_later else OLDER_MAC_MICROSECONDS
    return each * narrow * _shallow(problem, config) * promote * shared


def _shallow(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a k tile of two waves in all, which read more for each product, beside one of three or four.

    That of 128x192 is as long as that of 192x128 (H100, 20 dense products, edges-h100.json).
    """
    few_waves = config.num_waves * config.warpgroups <= 2
    if all_scales_per_row(problem):
        return 1.05 if few_waves and config.tile_columns <= 128 and problem.kind != "k_grouped" else 1.0
    if not is_of_later_loop(problem):
        return 1.1 if few_waves and config.tile_columns <= 128 else 1.0
    if few_waves and config.tile_columns < 192:
        return 1.12
    return 1.0 if few_waves and problem.kind != "dense" else 1.03  # groups were not timed again


def _promotion_of_rows(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a k tile beside one whose promotion is short, if both operands have 1x128 scales.

    Measured on an H200: 256x96 and 256x112 in bfloat16 1.27 to 1.30, 256x112 in float32 1.33, 128x160 1.30, 128x128
    1.37 (with `_shallow`), 192x96 1.49.
    """
    if config.num_waves > 1:
        return 1.28 if takes_turns(problem, config) else 1.33
    if config.warpgroups < 3:
        return 1.3 if problem.out_dtype.itemsize == 4 else 1.28
    return 1.5


def _microseconds_beside_main_loop(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a tile outside its main loop; 1.9 us for 256x112 in float32, which is staged in pieces."""
    waves = min(config.num_waves, 2)
    if problem.kind in ("grouped", "masked"):
        return (GROUP_TILE_MICROSECONDS if is_of_later_loop(problem) else OLDER_GROUP_TILE_MICROSECONDS)[waves]
    if config.multiply_scales:
        return MULTIPLIED_TILE_MICROSECONDS[waves]
    if all_scales_per_row(problem):
        return 1.9 if waves > 1 and problem.out_dtype.itemsize == 4 else 1.0
    transposed = SWAPPED_WARPGROUP_MICROSECONDS * (config.warpgroups - 1) if config.swap_operands else 0.0
    return TILE_MICROSECONDS[waves] + transposed


def _latency(problem: GemmProblem, config: GemmConfig) -> float:
    """Least microseconds of a k tile: if one warpgroup multiplies and promotes in turn, by the columns of its wave.

    Fitted to products of 1 to 128 rows on an H200; many scales a k tile, to 96 and 128 swapped rows on an H100.
    """
    reads_many = problem.kind == "dense" and config.swap_operands and not pairs_k_tiles(problem, config)
    if config.warpgroups > 1 and not reads_many:
        return LATENCY_MICROSECONDS
    scaled_per_row = block_shapes(problem)[not config.swap_operands][0] == 1
    first, each = (0.155, 0.0015) if scaled_per_row else (0.1, 0.0014)
    return config.num_waves * max(0.17, first + each * config.tile_columns) * (1.4 if reads_many else 1.0)


@functools.lru_cache(maxsize=1024)
def choose_config(problem: GemmProblem, num_sms: int) -> GemmConfig:
    """Returns the best configuration for a problem by the model; `jaxgemm.tiles` asks what was measured first.

    Args:
        problem: with m, n, k and the number of groups positive.
        num_sms: streaming multiprocessors of the device.

    Raises:
        ValueError: if no configuration is valid.
    """
    ranked = sorted(candidates(problem), key=lambda config: predicted_microseconds(problem, config, num_sms))
    if not ranked:
        raise ValueError(f"no configuration of the Hopper kernel serves {problem}")
    return dataclasses.replace(ranked[0], masked_store=_stores_masked(problem, ranked[0]))


def _stores_masked(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether an output with odd rows is stored without TMA: wherever a GPU has done so.

    By storing warps, that is for all dtypes; high tiles whose scales the tensor core multiplies have all registers in
    use, and would spill some. Tiles that are computed transposed have stored two bytes an element so, of products that
    one block sums; others keep to the padded copy.
    """
    if problem.n * problem.out_dtype.itemsize % 16 == 0:
        return False
    if config.swap_operands:
        return problem.out_dtype.itemsize == 2 and config.split_k == 1
    return not (config.multiply_scales and config.num_waves > 1)
