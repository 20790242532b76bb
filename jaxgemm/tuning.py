"""Tiles for the kernels: what a configuration is, which are valid, and which one serves a problem.

Everything here is plain Python on static shapes: no device is asked, and nothing is run.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem

SHARED_MEMORY_BYTES = 232448
"""Shared memory of a block on sm_90: 227 KiB (CUDA programming guide, table of technical specifications)."""

BUFFER_ALIGNMENT = 1024
"""Mosaic starts each buffer in shared memory at a multiple of this: the period of a 128-byte swizzle."""

SWIZZLE_BYTES = 128
"""A staged row of the output; what the TMA stores from shared memory starts at a multiple of this."""

WAVE_ROWS = 64
MAX_CLUSTER = 8
STAGED_BYTES = 32768
"""Most bytes of the output that a warpgroup stages before it stores them."""

ACCUMULATOR_REGISTERS = {1: 200, 2: 200, 3: 128}
"""Registers a thread for sums, one product and scales, by the number of compute warpgroups: the most without spills."""

MAX_EARLY_COLUMNS = 160
"""Most 1x128 scales of a tile's columns that are read before the product; more would not fit beside the sums."""

MAX_FACTOR_COLUMNS = 128
"""Most columns of a wave whose products of scales fit in registers, beside its sums and its product."""

ScalesAreRead = Literal["before", "during", "after"]
"""When a k tile's scales are read, beside the product of a wave."""


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """How the Hopper kernel computes a problem.

    Attributes:
        tile_m: rows of the output in a tile.
        tile_n: columns of the output in a tile.
        stages: k tiles in flight in shared memory.
        warpgroups: compute warpgroups; they share the tile's rows (its columns, if swapped).
        swap_operands: whether rhs is the M side of wgmma and lhs its N side: for few rows of lhs.
        share: blocks of a cluster that take neighbouring tiles and share the loads of the wgmma's M side.
        split_k: blocks of a cluster that sum parts of k of the same tile; only if swapped.
        band: width of a band of tiles walked together, to reuse the L2 cache.
        band_along_n: whether bands are so many tiles of n wide, not of m.
        masked_store: whether an output whose rows are no multiple of 16 bytes is stored element by element; else it is
            stored padded, and cut to size by a copy.
    """

    tile_m: int
    tile_n: int
    stages: int
    warpgroups: int = 2
    swap_operands: bool = False
    share: int = 1
    split_k: int = 1
    band: int = 8
    band_along_n: bool = False
    masked_store: bool = False

    @property
    def tile_rows(self) -> int:
        """Rows of the tile as wgmma sees it: its M side."""
        return self.tile_n if self.swap_operands else self.tile_m

    @property
    def tile_columns(self) -> int:
        """Columns of the tile as wgmma sees it: its N side."""
        return self.tile_m if self.swap_operands else self.tile_n

    @property
    def num_waves(self) -> int:
        """Waves of 64 rows that each compute warpgroup sums."""
        return self.tile_rows // (WAVE_ROWS * self.warpgroups)


def why_invalid(problem: GemmProblem, config: GemmConfig) -> str | None:
    """Returns why the Hopper kernel cannot run a problem with a configuration, or None if it can.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> from jaxgemm.problem import GemmProblem
        >>> e4m3, bf16 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16)
        >>> problem = GemmProblem("dense", 4096, 4096, 7168, e4m3, e4m3, (1, 128), (128, 128), bf16)
        >>> why_invalid(problem, GemmConfig(tile_m=256, tile_n=128, stages=3))
        >>> why_invalid(problem, GemmConfig(tile_m=256, tile_n=128, stages=5))
        'it needs 284752 bytes of shared memory, a block has 232448'
    """
    rows, columns, warpgroups = config.tile_rows, config.tile_columns, config.warpgroups
    if problem.kind != "dense" and (config.share > 1 or config.split_k > 1 or config.band_along_n):
        return f"{problem.kind} groups take no clusters and bands along m: share, split_k and band_along_n must be off"
    if problem.kind == "grouped" and not config.swap_operands and columns * problem.out_dtype.itemsize % SWIZZLE_BYTES:
        return f"rows of a group's end are stored {SWIZZLE_BYTES} bytes at a time: {columns} columns are no multiple"
    if min(problem.m, problem.n, problem.k, problem.num_groups) < 1:
        return f"m, n, k and g must be positive, got {problem.m}, {problem.n}, {problem.k}, {problem.num_groups}"
    if any(shape not in ((1, SCALE_BLOCK), (SCALE_BLOCK, SCALE_BLOCK)) for shape in _block_shapes(problem)):
        return f"blocks must be 1x128 or 128x128, got {_block_shapes(problem)}"
    if warpgroups not in ACCUMULATOR_REGISTERS or config.stages < 2:
        return f"it needs 1 to 3 warpgroups and at least 2 stages, got {warpgroups} and {config.stages}"
    if rows % (WAVE_ROWS * warpgroups) or rows > 256:
        return f"the wgmma's M side, {rows}, must be a multiple of 64 x {warpgroups} warpgroups, up to 256"
    if columns % 8 or not 8 <= columns <= 256:
        return f"the wgmma's N side, {columns}, must be a multiple of 8, up to 256"
    if _registers(problem, config) > ACCUMULATOR_REGISTERS[warpgroups]:
        return f"{config.num_waves} waves of {columns} columns do not fit in registers"
    if config.split_k > 1 and not (config.swap_operands and config.num_waves == 1 and config.share == 1):
        return "split_k needs swapped operands, one wave a warpgroup and no sharing"
    if config.split_k > cdiv(problem.k, SCALE_BLOCK) or config.split_k * config.share > MAX_CLUSTER:
        return f"split_k={config.split_k} exceeds the k tiles, or a cluster of {MAX_CLUSTER}"
    if config.share > 1 and (config.swap_operands or _all_scales_per_row(problem)):
        return "swapped operands, and two that are scaled by 1x128 blocks, cannot share loads"
    used = shared_memory_bytes(problem, config)
    if used > SHARED_MEMORY_BYTES:
        return f"it needs {used} bytes of shared memory, a block has {SHARED_MEMORY_BYTES}"
    return None


def shared_memory_bytes(problem: GemmProblem, config: GemmConfig) -> int:
    """Shared memory of a block: every buffer aligned, eight bytes a barrier."""
    chunk_bytes, _ = _chunks_of_wave(problem, config)
    staged = config.warpgroups * staged_chunks(problem, config) * chunk_bytes
    return _bytes_before_staging(problem, config) + _aligned(staged)


def _bytes_before_staging(problem: GemmProblem, config: GemmConfig) -> int:
    """Shared memory of a block apart from where it stages the output."""
    k_tiles = cdiv(problem.k, SCALE_BLOCK)
    total = 0
    for tile, shape in zip((config.tile_m, config.tile_n), _block_shapes(problem), strict=True):
        blocks = cdiv(SCALE_BLOCK - math.gcd(tile, SCALE_BLOCK) + tile, SCALE_BLOCK)
        by_row = 4 * config.stages * align_up(tile, 32)
        by_block = 4 * config.warpgroups * blocks * align_up(k_tiles, 128)
        total += _aligned(config.stages * tile * SCALE_BLOCK) + _aligned(by_row if shape[0] == 1 else by_block)
    if config.split_k > 1:
        total += _aligned(4 * config.warpgroups * WAVE_ROWS * partial_pitch(config.tile_columns)) + 16
    if problem.has_bias:
        total += _aligned(4 * align_up(config.tile_n, 64)) + 16
    return total + 16 * config.stages


def staged_chunks(problem: GemmProblem, config: GemmConfig) -> int:
    """Chunks of the output that a warpgroup stages before it stores them: of all its waves if they fit, else of one.

    A chunk is 64 rows of at most 128 bytes. Waves that are staged together are waited for once.
    """
    chunk_bytes, of_wave = _chunks_of_wave(problem, config)
    most = max(1, STAGED_BYTES // chunk_bytes)
    together, apart = (min(of_wave * waves, most) for waves in (config.num_waves, 1))
    rest = _bytes_before_staging(problem, config)
    fits = rest + _aligned(config.warpgroups * together * chunk_bytes) <= SHARED_MEMORY_BYTES
    return together if fits else apart


def _chunks_of_wave(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Bytes of a chunk of the output, and how many a wave has; one that is stored transposed has a single one."""
    columns = config.tile_columns
    if config.split_k > 1:
        columns = max(8, cdiv(columns, config.split_k * 8) * 8)
    row_bytes = columns * problem.out_dtype.itemsize
    chunk = row_bytes if config.swap_operands else math.gcd(SWIZZLE_BYTES, row_bytes)
    return WAVE_ROWS * chunk, row_bytes // chunk


def partial_pitch(columns: int) -> int:
    """Floats from one row of partial sums to the next: 8 beyond a multiple of 32, so that no two banks collide."""
    return align_up(columns - 8, 32) + 8


def _aligned(size: int) -> int:
    return align_up(size, BUFFER_ALIGNMENT)


def _block_shapes(problem: GemmProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    return problem.lhs_block_shape, problem.rhs_block_shape


def _registers(problem: GemmProblem, config: GemmConfig) -> int:
    """Registers a thread for the sums, one product and the scales of the columns."""
    columns = config.tile_columns
    block_shape = _block_shapes(problem)[not config.swap_operands]
    scales = columns // 4 if block_shape[0] == 1 and columns <= MAX_EARLY_COLUMNS else 0
    return columns * (config.num_waves + 1) // 2 + scales


def _all_scales_per_row(problem: GemmProblem) -> bool:
    return all(shape[0] == 1 for shape in _block_shapes(problem))


def when_scales_are_read(problem: GemmProblem, config: GemmConfig) -> ScalesAreRead:
    """When the scales of a k tile are read: before its products, during each, or after it.

    With 1x128 blocks on both sides each warp reads a scale for every column, and multiplies each element twice. Two
    waves of rows share what they read, so it is read before both. One wave has registers for the products of scales,
    and makes them while the tensor core works; with turns that is 6 to 27 % faster (H200, 128x128 tiles). Too many
    scales would crowd out the sums, and are read for each wave when its product is done.
    """
    one_wave = config.warpgroups > 1 and config.num_waves == 1 and config.tile_columns <= MAX_FACTOR_COLUMNS
    if _all_scales_per_row(problem) and _every_warpgroup_multiplies(problem, config) and one_wave:
        return "during"
    scaled_per_row = _block_shapes(problem)[not config.swap_operands][0] == 1
    return "after" if scaled_per_row and config.tile_columns > MAX_EARLY_COLUMNS else "before"


def takes_turns(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether compute warpgroups take turns at the tensor core, as is faster where the promotion is long.

    Measured on an H200 with 1x128 blocks on both sides: 128x128 (scales read during the product) 13 to 19 % faster
    with turns, 128x160 0 to 20 %, 256x96 5 to 14 %, 256x112 0 to 11 % in bfloat16 and 3 to 6 % slower in float32.
    With 128x128 blocks on one side the promotion is short, and turns cost 2 %.
    """
    if not _all_scales_per_row(problem) or not _every_warpgroup_multiplies(problem, config) or config.warpgroups == 1:
        return False
    if config.num_waves > 1:
        return config.tile_columns <= 96 or problem.out_dtype.itemsize < 4
    return config.tile_columns > MAX_FACTOR_COLUMNS or when_scales_are_read(problem, config) == "during"


def _every_warpgroup_multiplies(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether all take part in every k tile: not those whose rows lie past the end of a group, which wait for no turn.

    Swapped operands, of few rows, are left out too: nothing was measured of them.
    """
    return problem.kind not in ("grouped", "masked") and not config.swap_operands


def with_most_stages(problem: GemmProblem, config: GemmConfig, limit: int) -> GemmConfig | None:
    """The configuration with as many stages as fit, up to a limit; None if fewer than two fit."""
    for stages in range(limit, 1, -1):
        candidate = dataclasses.replace(config, stages=stages)
        if why_invalid(problem, candidate) is None:
            return candidate
    return None


def candidates(problem: GemmProblem) -> Iterator[GemmConfig]:
    """Every configuration worth considering for a problem; all are valid."""
    shapes = []
    extent = expected_extent(problem)
    if extent.m <= 128 and problem.kind not in ("k_grouped", "k_masked"):
        tile_m = align_up(extent.m, 8) if problem.kind == "dense" else _tile_of_groups(problem, extent)
        for tile_n, warpgroups in ((64, 1), (128, 2), (192, 3)):
            for split_k in (1, 2) if problem.kind == "dense" else (1,):
                shapes.append(GemmConfig(tile_m, tile_n, 2, warpgroups, swap_operands=True, split_k=split_k))
    widths_of_high, widths = _tile_widths(problem)
    for tile_m, warpgroups in ((256, 2), (192, 3), (128, 2), (64, 1)):
        for tile_n in widths_of_high if tile_m > 128 else widths:
            shapes.append(GemmConfig(tile_m, tile_n, 2, warpgroups))
    for shape in shapes:
        config = with_most_stages(problem, shape, 24 if shape.swap_operands else 8)
        if config is not None:
            yield config


class Extent(NamedTuple):
    """Sizes of the products that a problem is made of, as far as they are known before it runs."""

    products: int
    m: int
    k: int


def expected_extent(problem: GemmProblem) -> Extent:
    """What to expect of group sizes: `expected_m` if it was given, else equal shares, or full masks."""
    groups = problem.num_groups
    if problem.kind == "grouped":
        return Extent(groups, cdiv(problem.m, groups), problem.k)
    if problem.kind == "masked":
        expected = problem.m if problem.expected_m is None else min(problem.expected_m, problem.m)
        return Extent(groups, max(expected, 1), problem.k)
    if problem.kind == "k_grouped":
        return Extent(groups, problem.m, cdiv(problem.k, groups))
    return Extent(groups if problem.kind == "k_masked" else 1, problem.m, problem.k)


def _tile_of_groups(problem: GemmProblem, extent: Extent) -> int:
    """Rows of a narrow tile for groups: half as many again as expected, so that few of them need two tiles."""
    return min(align_up(extent.m + extent.m // 2, 16), align_up(problem.m, 8), 128)


def _tile_widths(problem: GemmProblem) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Columns of tiles of more than 128 rows, and of others; what was slower in every measurement is left out."""
    narrow = (32, 64, 96, 128)
    if not _all_scales_per_row(problem):
        return (128,), (*narrow, 160, 192)
    return (96, 112), (*narrow, 160) if problem.out_dtype.itemsize < 4 else narrow


MAC_MICROSECONDS = 2.29e-5
"""Time of a k tile on one SM for each element of the output tile; H200, tiles from 128x192 to 256x128."""

TILE_MICROSECONDS = 1.0
"""Time of a tile outside its main loop; the intercept of the same measurements."""

GROUP_TILE_MICROSECONDS = {1: 2.2, 2: 3.7}
"""The same for groups, by the waves of a warpgroup: contiguous and k-grouped products, H200."""

LATENCY_MICROSECONDS = 0.2
"""Least time of a k tile: wait, multiply, promote; one warpgroup alone takes longer (`_latency`)."""

SM_BYTES_PER_MICROSECOND = 90e3
"""What one SM takes in from the L2 cache: 128x64 tiles of 128 rows, H200."""

MEMORY_BYTES_PER_MICROSECOND = 3.6e6
"""What weights are read at: device memory, between an H100 and an H200."""

SPLIT_MICROSECONDS = (0.5, 0.01)
"""Time to exchange partial sums in a cluster: of any tile, and for each of its columns."""


GROUP_SPREAD = (0.7, 0.85, 1.0, 1.15, 1.3)
"""Sizes that groups are taken to have, in shares of the expected one: the range of DeepGEMM's tests."""


def predicted_microseconds(problem: GemmProblem, config: GemmConfig, num_sms: int) -> float:
    """A model of the kernel's time: the slowest of tensor cores, latency, L2 and memory, wave by wave."""
    extent = expected_extent(problem)
    spread = GROUP_SPREAD if problem.kind == "grouped" or problem.expected_m is not None else (1.0,)
    row_tiles = statistics.mean(cdiv(math.ceil(extent.m * share), config.tile_m) for share in spread)
    tiles = math.ceil(extent.products * row_tiles) * cdiv(problem.n, config.tile_n)
    clusters = max(1, num_sms // (config.split_k * config.share))
    waves = cdiv(cdiv(tiles, config.share), clusters)
    k_tiles = cdiv(cdiv(extent.k, SCALE_BLOCK), config.split_k)
    per_row = _all_scales_per_row(problem)
    narrow = 1 + max(0, (96 if per_row else 128) - config.tile_columns) / 256
    few_waves = config.num_waves * config.warpgroups <= 2 and config.tile_columns <= 128
    shallow = (1.05 if per_row else 1.1) if few_waves and problem.kind != "k_grouped" else 1.0
    macs = config.tile_rows * max(config.tile_columns, 16)  # a k tile's, in units of its depth
    chunks = config.tile_columns // math.gcd(config.tile_columns, SCALE_BLOCK)
    promote = _promotion_of_rows(problem, config) if per_row else 1 + 0.02 * (chunks - 1)
    promote *= 1.5 if config.swap_operands and config.tile_columns > 64 else 1.0  # measured at 128 rows, 7168x16384
    multiply = k_tiles * macs * MAC_MICROSECONDS * narrow * shallow * promote
    ingest = k_tiles * (config.tile_m + config.tile_n) * SCALE_BLOCK / SM_BYTES_PER_MICROSECOND
    busy = waves * max(multiply, ingest, k_tiles * _latency(problem, config))
    memory = extent.products * (extent.m + problem.n) * extent.k / MEMORY_BYTES_PER_MICROSECOND
    tile = _microseconds_beside_main_loop(problem, config)
    split = SPLIT_MICROSECONDS[0] + SPLIT_MICROSECONDS[1] * config.tile_columns if config.split_k > 1 else 0.0
    return max(busy, memory) + waves * tile + split


def _promotion_of_rows(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a k tile beside one whose promotion is short, if both operands have 1x128 scales.

    Measured on an H200: 256x96 and 256x112 in bfloat16 1.27 to 1.30, 256x112 in float32 1.33, 128x160 1.30, 128x128
    1.37 (with `shallow`), 192x96 1.49.
    """
    if config.num_waves > 1:
        return 1.28 if takes_turns(problem, config) else 1.33
    return 1.3 if config.warpgroups < 3 else 1.5


def _microseconds_beside_main_loop(problem: GemmProblem, config: GemmConfig) -> float:
    """Time of a tile outside its main loop; 1.9 us for 256x112 in float32, which is staged in pieces."""
    if problem.kind != "dense":
        return GROUP_TILE_MICROSECONDS[min(config.num_waves, 2)]
    return TILE_MICROSECONDS * (1.9 if config.num_waves > 1 and problem.out_dtype.itemsize == 4 else 1.0)


def _latency(problem: GemmProblem, config: GemmConfig) -> float:
    """Least microseconds of a k tile: if one warpgroup multiplies and promotes in turn, by the columns of its wave.

    Fitted to products of 1 to 128 rows on an H200.
    """
    if config.warpgroups > 1:
        return LATENCY_MICROSECONDS
    scaled_per_row = _block_shapes(problem)[not config.swap_operands][0] == 1
    first, each = (0.155, 0.0015) if scaled_per_row else (0.1, 0.0014)
    return config.num_waves * max(0.17, first + each * config.tile_columns)


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
    """Whether an output with odd rows is stored from registers; 2 % faster at 4097x4100x7100, in bfloat16.

    It has run on a GPU for two-byte outputs that one block sums; others keep to the padded copy until it has for them.
    """
    return problem.out_dtype.itemsize == 2 and config.split_k == 1 and problem.n * 2 % 16 != 0
