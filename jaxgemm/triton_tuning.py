"""How the Triton kernel is laid out: `TritonConfig`, the predicate of valid ones, the choice for a problem and a chip.

Chips are named by their CUDA compute capability as an integer: 89 for 8.9. No device is asked, and nothing is run.
"""

import dataclasses
from collections.abc import Iterator

from jaxgemm.layout import SCALE_BLOCK, cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

LEAST_CAPABILITY = 80
"""Ampere: the first chip with asynchronous copies into shared memory, which the pipelined loop is made of."""

FP8_CAPABILITY = 89
"""Ada: the first chip whose tensor cores multiply FP8; before it, operands are widened to float16."""

SHARED_MEMORY_BYTES = {80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448}
"""Shared memory of a block by capability (CUDA programming guide, table of technical specifications)."""

LEAST_SHARED_MEMORY_BYTES = 101376
"""What every chip from 8.0 on has, those not listed above too."""

SUMS_BESIDE_COLUMN_SCALES = {False: 64 * 128, True: 64 * 64}
"""Most sums of a tile where rhs has 1x128 blocks, by whether operands are widened: larger ones spilled registers."""

WARPGROUP_MAJORS = (9, 10)
"""Major capabilities whose tensor cores multiply for four warps at once, in tiles of at least 64 rows."""


@dataclasses.dataclass(frozen=True)
class TritonConfig:
    """How the Triton kernel computes a problem.

    Attributes:
        tile_m: rows of the output in a tile.
        tile_n: columns of the output in a tile.
        num_warps: warps of a program, which share the tile.
        num_stages: k tiles of the software pipeline.
        widen: whether operands are widened to float16 in registers, for chips that cannot multiply FP8.
        band: rows of tiles in a band that is walked together, to reuse the L2 cache.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    widen: bool = False
    band: int = 8


TILES = (
    TritonConfig(128, 128, num_warps=8, num_stages=4),
    TritonConfig(64, 128, num_warps=4, num_stages=3),
    TritonConfig(128, 64, num_warps=4, num_stages=3),
    TritonConfig(64, 64, num_warps=4, num_stages=4),
    TritonConfig(64, 32, num_warps=4, num_stages=6),
    TritonConfig(32, 64, num_warps=4, num_stages=6),
    TritonConfig(16, 64, num_warps=4, num_stages=6),
    TritonConfig(16, 32, num_warps=4, num_stages=6),
)
"""What is chosen from: by what the compiler makes of them. On an H200, 4096^3 takes 159 us with 128x128, 155 with
64x128, 162 with 128x64 and 206 with 64x64 (`benchmarks/results/triton-h200.json`); the others have not been measured.

128x128 on eight warps keeps 64 sums and 64 partial products a thread, the most that leave room for addresses without
spills, and asks least of the L2 cache. Four stages of it fill 128 KiB, one program a multiprocessor. The smaller tiles
let two or three programs share a multiprocessor, so that one promotes its sums while another multiplies. The smallest
are for few rows, where only reading the weights counts: they keep some 30 to 70 KiB of loads in flight.
"""

LOAD_WEIGHT = 66
"""Cost of loading one row of a k tile, in multiply-adds of an output element: 128 bytes at 85 GB/s a multiprocessor,
over the Hopper kernel's 2.29e-5 us an element (`jaxgemm.tuning`)."""


def why_invalid(problem: GemmProblem, config: TritonConfig, capability: int) -> str | None:
    """Returns why the Triton kernel cannot run a problem with a configuration on a chip, or None if it can.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> e4m3, bf16 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16)
        >>> problem = GemmProblem("dense", 4096, 4096, 7168, e4m3, e4m3, (1, 128), (128, 128), bf16)
        >>> why_invalid(problem, TritonConfig(128, 128, num_warps=8, num_stages=4), 90)
        >>> why_invalid(problem, TritonConfig(128, 128, num_warps=8, num_stages=5), 89)
        'it needs 132096 bytes of shared memory, a block has 101376'
    """
    if problem.kind != "dense":
        return f"it multiplies dense operands alone, and this problem is {problem.kind}"
    for block_shape in (problem.lhs_block_shape, problem.rhs_block_shape):
        if block_shape not in (ROW_BLOCK, SQUARE_BLOCK):
            return f"blocks must be (1, 128) or (128, 128), and are {block_shape}"
    if min(problem.m, problem.n, problem.k) < 1:
        return f"m, n and k must be positive, got {problem.m}, {problem.n}, {problem.k}"
    if capability < LEAST_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, got {capability / 10}"
    if config.widen != (capability < FP8_CAPABILITY):
        return f"operands are widened where capability is below 8.9, got widen={config.widen} for {capability / 10}"
    least_rows = 64 if _multiplies_by_warpgroup(capability) else 16
    for name, tile, least in (("tile_m", config.tile_m, least_rows), ("tile_n", config.tile_n, 16)):
        if tile & (tile - 1) or not least <= tile <= SCALE_BLOCK:
            return f"{name} must be a power of two from {least} to {SCALE_BLOCK}, got {tile}"
    if config.num_warps not in (4, 8) or config.num_stages < 2 or config.band < 1:
        return f"it takes 4 or 8 warps, at least 2 stages and a band of at least 1, got {config}"
    if config.tile_m * config.tile_n > 64 * SCALE_BLOCK and config.num_warps < 8:
        return f"the sums of a {config.tile_m}x{config.tile_n} tile do not fit in the registers of 4 warps"
    if problem.rhs_block_shape == ROW_BLOCK and config.tile_m * config.tile_n > SUMS_BESIDE_COLUMN_SCALES[config.widen]:
        return f"the columns' scales do not fit in registers beside the sums of {config.tile_m}x{config.tile_n}"
    used, available = shared_memory_bytes(config, capability), available_shared_memory(capability)
    if used > available:
        return f"it needs {used} bytes of shared memory, a block has {available}"
    return None


def shared_memory_bytes(config: TritonConfig, capability: int) -> int:
    """Most shared memory that Triton gives a program: its stages, and room to hand scales from warp to warp.

    Where a warp multiplies what it has read into registers, the pipeline holds one k tile less.
    """
    buffers = config.num_stages - (not _multiplies_by_warpgroup(capability))
    return (config.tile_m + config.tile_n) * (buffers * SCALE_BLOCK + 4)


def available_shared_memory(capability: int) -> int:
    """Shared memory that a block may have on a chip."""
    return SHARED_MEMORY_BYTES.get(capability, LEAST_SHARED_MEMORY_BYTES)


def candidates(problem: GemmProblem, capability: int) -> Iterator[TritonConfig]:
    """Every configuration to choose from for a problem on a chip; all are valid."""
    for tile in TILES:
        config = dataclasses.replace(tile, widen=capability < FP8_CAPABILITY)
        if why_invalid(problem, config, capability) is None:
            yield config


def choose_config(problem: GemmProblem, capability: int, num_sms: int) -> TritonConfig:
    """Returns the configuration for a problem: the one whose waves multiply and load least.

    Args:
        problem: dense, with m, n and k positive.
        capability: of the chip.
        num_sms: streaming multiprocessors of the device.

    Raises:
        ValueError: if none is valid; `why_invalid` says why.
    """
    configs = list(candidates(problem, capability))
    if not configs:
        raise ValueError(f"no configuration of the Triton kernel serves {problem} on capability {capability}")

    def cost(config: TritonConfig) -> int:
        tiles = cdiv(problem.m, config.tile_m) * cdiv(problem.n, config.tile_n)
        loads = LOAD_WEIGHT * (config.tile_m + config.tile_n)
        return cdiv(tiles, num_sms) * (config.tile_m * config.tile_n + loads)

    return min(configs, key=cost)


def _multiplies_by_warpgroup(capability: int) -> bool:
    return capability // 10 in WARPGROUP_MAJORS
