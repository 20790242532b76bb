"""What a configuration of the Hopper kernel is, which are valid for a problem, and how the kernel runs them.

Everything here is plain Python on static shapes: no device is asked, and nothing is run.
"""

import dataclasses
import math
from typing import Literal

from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem

SHARED_MEMORY_BYTES = 232448
"""Shared memory of a block on sm_90: 227 KiB (CUDA programming guide, table of technical specifications)."""

BUFFER_ALIGNMENT = 1024
"""Mosaic starts each buffer in shared memory at a multiple of this: the period of a 128-byte swizzle."""

SWIZZLE_BYTES = 128
"""A staged row of the output; what the TMA stores from shared memory starts at a multiple of this."""

MIN_STAGED_BYTES = 32
"""The narrowest swizzle of a staged row of the output; a row is a multiple of it."""

WAVE_ROWS = 64
MIN_SLICE = 8
"""Fewest columns of a wgmma accumulator."""

MAX_CLUSTER = 8
STAGED_BYTES = 32768
"""Most bytes of the output that a warpgroup stages before it stores them; half of them, if scales are multiplied by
the tensor core: there one more stage is worth more."""

ACCUMULATOR_REGISTERS = {1: 200, 2: 200, 3: 128}
"""Registers a thread for sums, one product and scales, by the number of compute warpgroups: the most without spills."""

MAX_EARLY_COLUMNS = 160
"""Most 1x128 scales of a tile's columns that are read before the product; more would not fit beside the sums."""

MAX_FACTOR_COLUMNS = 128
"""Most columns of a wave whose products of scales fit in registers, beside its sums and its product."""

MAX_MULTIPLIED_REGISTERS = 216
"""The most for sums, one product and the products of its scales: 128x144 and 256x104."""

MAX_SHORT_COLUMNS = 64
"""Most columns of a wave whose product is short: two k tiles are multiplied at once (`pairs_k_tiles`)."""

CLUSTERS_THAT_FIT = 0.8
"""Share of the clusters of more than two blocks, as many as there are multiprocessors for, that run at once."""

EVEN_WAVES_K = 4096
"""From this k on, no more pairs of blocks are launched than are needed to take no more waves (`clusters_launched`)."""

SCALE_PARTS = 4
"""Numbers that a scale of a column is given by, where the tensor core multiplies it."""

ScalesAreRead = Literal["before", "during", "after", "multiplied"]
"""When a k tile's scales are read, beside the product of a wave; "multiplied" by the tensor core: those of columns
not at all, those of rows before."""


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
        masked_store: whether an output whose rows are no multiple of 16 bytes is stored without TMA
            (`jaxgemm.kernels.masked_store`); else it is stored padded, and cut to size by a copy.
        multiply_scales: whether the tensor core multiplies the scales of rows with those of columns
            (`jaxgemm.kernels.scale_products`); only if both operands have 1x128 blocks.
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
    multiply_scales: bool = False

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
        'it needs 285768 bytes of shared memory, a block has 232448'
    """
    rows, columns, warpgroups = config.tile_rows, config.tile_columns, config.warpgroups
    shares = config.share > 1 and problem.kind == "k_masked"
    if problem.kind != "dense" and (shares or config.split_k > 1 or config.band_along_n):
        return f"{problem.kind} groups take no such clusters, and bands along m: {config}"
    if problem.kind == "grouped" and not config.swap_operands and columns * problem.out_dtype.itemsize % SWIZZLE_BYTES:
        return f"rows of a group's end are stored {SWIZZLE_BYTES} bytes at a time: {columns} columns are no multiple"
    if min(problem.m, problem.n, problem.k, problem.num_groups) < 1:
        return f"m, n, k and g must be positive, got {problem.m}, {problem.n}, {problem.k}, {problem.num_groups}"
    if any(shape not in ((1, SCALE_BLOCK), (SCALE_BLOCK, SCALE_BLOCK)) for shape in block_shapes(problem)):
        return f"blocks must be 1x128 or 128x128, got {block_shapes(problem)}"
    if warpgroups not in ACCUMULATOR_REGISTERS or config.stages < 2:
        return f"it needs 1 to 3 warpgroups and at least 2 stages, got {warpgroups} and {config.stages}"
    if rows % (WAVE_ROWS * warpgroups) or rows > 256:
        return f"the wgmma's M side, {rows}, must be a multiple of 64 x {warpgroups} warpgroups, up to 256"
    if columns % 8 or not 8 <= columns <= 256:
        return f"the wgmma's N side, {columns}, must be a multiple of 8, up to 256"
    if not config.swap_operands and columns * problem.out_dtype.itemsize % MIN_STAGED_BYTES:
        return (
            f"a row of {columns} columns of {problem.out_dtype} is not staged: no multiple of {MIN_STAGED_BYTES} bytes"
        )
    if config.multiply_scales and not _may_multiply_scales(problem, config):
        return "multiply_scales needs 1x128 scales of both operands, which are not swapped, and no groups of rows"
    most_registers = MAX_MULTIPLIED_REGISTERS if config.multiply_scales else ACCUMULATOR_REGISTERS[warpgroups]
    if _registers(problem, config) > most_registers:
        return f"{config.num_waves} waves of {columns} columns do not fit in registers"
    if config.split_k > 1 and not (config.swap_operands and config.num_waves == 1 and config.share == 1):
        return "split_k needs swapped operands, one wave a warpgroup and no sharing"
    if config.split_k > cdiv(problem.k, SCALE_BLOCK) or config.split_k * config.share > MAX_CLUSTER:
        return f"split_k={config.split_k} exceeds the k tiles, or a cluster of {MAX_CLUSTER}"
    if config.share > 1 and (config.swap_operands or (all_scales_per_row(problem) and not config.multiply_scales)):
        return "swapped operands, and scales of 1x128 blocks on both sides without multiply_scales, share no loads"
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
    numbers_a_scale = 1, SCALE_PARTS if config.multiply_scales else 1
    tiles = config.tile_m, config.tile_n
    for tile, shape, numbers in zip(tiles, block_shapes(problem), numbers_a_scale, strict=True):
        blocks = cdiv(SCALE_BLOCK - math.gcd(tile, SCALE_BLOCK) + tile, SCALE_BLOCK)
        by_row = 4 * config.stages * (align_up(tile, 32) if numbers == 1 else tile * numbers)
        by_block = 4 * config.warpgroups * blocks * align_up(k_tiles, 128)
        total += _aligned(config.stages * tile * SCALE_BLOCK) + _aligned(by_row if shape[0] == 1 else by_block)
    if config.split_k > 1:
        parts = config.split_k * WAVE_ROWS * split_columns(config.tile_columns, config.split_k)
        total += _aligned(4 * config.warpgroups * parts) + BUFFER_ALIGNMENT + 8
    if problem.has_bias:
        total += _aligned(4 * align_up(config.tile_n, 64)) + 16
    if stores_by_warp(config):
        total += 16 * config.warpgroups
    return total + 8 * config.stages + _aligned(8 * config.stages)


def stores_masked(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether the output is stored without TMA, which cannot address its rows."""
    return config.masked_store and problem.n * problem.out_dtype.itemsize % 16 != 0


def stores_by_warp(config: GemmConfig) -> bool:
    """Whether a warp stores what a compute warpgroup has staged, while that goes on with its next tile."""
    return not config.swap_operands


def staged_chunks(problem: GemmProblem, config: GemmConfig) -> int:
    """Chunks of the output that a warpgroup stages before it stores them: of all its waves if they fit, else of one.

    A chunk is 64 rows of at most 128 bytes. Waves that are staged together are waited for once.
    """
    chunk_bytes, of_wave = _chunks_of_wave(problem, config)
    most = max(1, STAGED_BYTES // (2 if config.multiply_scales else 1) // chunk_bytes)
    together, apart = (min(of_wave * waves, most) for waves in (config.num_waves, 1))
    rest = _bytes_before_staging(problem, config)
    fits = rest + _aligned(config.warpgroups * together * chunk_bytes) <= SHARED_MEMORY_BYTES
    return together if fits else apart


def clusters_at_once(config: GemmConfig, num_sms: int) -> int:
    """Clusters that run at once, whatever the chip: one of more than two blocks may leave some of its neighbours out.

    A cluster lies within one part of the chip, of 16 or 18 multiprocessors. Of four blocks 17 run at once on an H100,
    and 33 do not; of three, 33 do; of eight, 9 do and 17 do not.
    """
    size = config.share * config.split_k
    most = num_sms // size
    return max(1, most if size <= 2 else int(CLUSTERS_THAT_FIT * most))


def clusters_launched(problem: GemmProblem, config: GemmConfig, tiles: int, num_sms: int) -> int:
    """Clusters that walk the tiles: all that run at once, or as few as take no more waves.

    The rest would only keep others waiting for memory and take of the chip's power: without it, pairs of blocks of two
    warpgroups take 0 to 2 % less time in eleven of twelve dense products with k of 4096 and more, and 1 to 13 % more in
    three with k of 2048 and less (H100). Single blocks gain less than half a percent, or lose; three warpgroups were
    timed in one product alone, which gained as little. These launch all.

    Args:
        problem: what is computed.
        config: tiles.
        tiles: to walk, at most; those of one cluster count once.
        num_sms: streaming multiprocessors of the device.
    """
    at_once = clusters_at_once(config, num_sms)
    is_long = problem.kind == "dense" and problem.k >= EVEN_WAVES_K
    if is_long and config.share > 1 and config.warpgroups == 2:
        return cdiv(tiles, cdiv(tiles, at_once))
    return min(at_once, tiles)


def _chunks_of_wave(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Bytes of a chunk of the output, and how many a wave has; one that is stored transposed has a single one."""
    columns = config.tile_columns
    if config.split_k > 1:
        columns = split_columns(columns, config.split_k)
    row_bytes = columns * problem.out_dtype.itemsize
    chunk = row_bytes if config.swap_operands else math.gcd(SWIZZLE_BYTES, row_bytes)
    return WAVE_ROWS * chunk, row_bytes // chunk


def split_columns(tile_columns: int, split_k: int) -> int:
    """Columns of a tile that each block of a cluster adds up, where these share out k: eight at least."""
    return max(MIN_SLICE, cdiv(tile_columns, split_k * MIN_SLICE) * MIN_SLICE)


def _aligned(size: int) -> int:
    return align_up(size, BUFFER_ALIGNMENT)


def block_shapes(problem: GemmProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Scaling blocks of lhs and of rhs."""
    return problem.lhs_block_shape, problem.rhs_block_shape


def _registers(problem: GemmProblem, config: GemmConfig) -> int:
    """Registers a thread for the sums, one product and the scales of the columns."""
    columns = config.tile_columns
    block_shape = block_shapes(problem)[not config.swap_operands]
    if config.multiply_scales:
        return columns * (config.num_waves + 2) // 2
    scales = columns // 4 if block_shape[0] == 1 and columns <= MAX_EARLY_COLUMNS else 0
    return columns * (config.num_waves + 1) // 2 + scales


def all_scales_per_row(problem: GemmProblem) -> bool:
    """Whether both operands have 1x128 blocks."""
    return all(shape[0] == 1 for shape in block_shapes(problem))


def when_scales_are_read(problem: GemmProblem, config: GemmConfig) -> ScalesAreRead:
    """When the scales of a k tile are read: before its products, during each, or after it.

    With 1x128 blocks on both sides each warp reads a scale for every column, and multiplies each element twice. Two
    waves of rows share what they read, so it is read before both. One wave has registers for the products of scales,
    and makes them while the tensor core works; with turns that is 2 to 20 % faster (H200, 128x128 tiles). Too many
    scales would crowd out the sums, and are read for each wave when its product is done. Where the tensor core
    multiplies them with each other, no warp reads those of columns.
    """
    if config.multiply_scales:
        return "multiplied"
    one_wave = config.warpgroups > 1 and config.num_waves == 1 and config.tile_columns <= MAX_FACTOR_COLUMNS
    if all_scales_per_row(problem) and _every_warpgroup_multiplies(problem, config) and one_wave:
        return "during"
    scaled_per_row = block_shapes(problem)[not config.swap_operands][0] == 1
    return "after" if scaled_per_row and config.tile_columns > MAX_EARLY_COLUMNS else "before"


def takes_turns(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether compute warpgroups take turns at the tensor core, as is faster where the promotion is long.

    Measured on an H200 with 1x128 blocks on both sides: 128x128 (scales read during the product) 14 to 19 % faster
    with turns, 128x160 0 to 20 %, 256x96 5 to 14 %, 256x112 0 to 11 % in bfloat16 and 3 to 6 % slower in float32.
    With 128x128 blocks on one side the promotion is short, and turns cost 2 %. Where the tensor core multiplies the
    scales, 128x128 and 256x104 in turn are 2 to 5 % slower than those that wait ahead (H100).
    """
    if not all_scales_per_row(problem) or not _every_warpgroup_multiplies(problem, config) or config.warpgroups == 1:
        return False
    if config.multiply_scales:
        return False
    if config.num_waves > 1:
        return config.tile_columns <= 96 or problem.out_dtype.itemsize < 4
    return config.tile_columns > MAX_FACTOR_COLUMNS or when_scales_are_read(problem, config) == "during"


def waits_ahead(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether a warpgroup asks for the next k tile while it promotes this one.

    The answer takes some 50 cycles, which the promotion then hides: beside storing warps 4096x4096x7168 takes 173.5 us
    with it and 183.0 without (H100). With 1x128 blocks on both sides two of four tiles were 2 and 5 % slower with it,
    the others 0 and 1 % faster. Where the tensor core multiplies the scales, those of float32 are 0 to 4 % faster with
    it; 128x128 and 128x144 in bfloat16, which shared no loads, were 5 and 3 % slower, and with shared loads have only
    been timed with it.
    """
    return not all_scales_per_row(problem) or config.multiply_scales


def pairs_k_tiles(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether a warpgroup starts the products of two k tiles before it promotes the first.

    Between two products of few columns a warpgroup would wait for longer than the tensor core works. With weights read
    cold, 64x2112x7168 in tiles of 64x32 takes 10.2 us so and 11.0 otherwise, 128x7168x16384 in 128x64 45.0 and 45.9, 16
    swapped rows of 4096x7168 12.4 and 12.6 (H100). Tiles of 128x128 are as fast either way, 128 swapped rows slower.
    """
    return (
        config.num_waves == 1
        and config.tile_columns <= MAX_SHORT_COLUMNS
        and when_scales_are_read(problem, config) == "before"
        and not takes_turns(problem, config)
    )


def frees_early(problem: GemmProblem, config: GemmConfig) -> bool:
    """Whether a warp frees a stage when its last product is complete: it has read its scales before it began."""
    return when_scales_are_read(problem, config) in ("before", "multiplied")


def _may_multiply_scales(problem: GemmProblem, config: GemmConfig) -> bool:
    return all_scales_per_row(problem) and _every_warpgroup_multiplies(problem, config)


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
