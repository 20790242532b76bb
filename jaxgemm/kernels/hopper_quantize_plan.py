"""What is static about a launch of the quantising kernels, and how they are laid out."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm import layout
from jaxgemm.elementwise import FUNCTIONS
from jaxgemm.problem import QuantizeProblem
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

BLOCK = layout.SCALE_BLOCK
SLAB_ROWS = 64
"""Output rows of one warpgroup: the height of its register layout."""

SWIZZLE_BYTES = 128
SHARED_MEMORY_BYTES = 232448
"""Shared memory of a thread block on Hopper (CUDA C++ programming guide, compute capability 9.0)."""
LARGE_SQUARE_ELEMENTS = 1 << 25
"""From how many elements on square blocks in both orientations take three stages: at 4096x14336 that was 6 % faster
than four, at 7168x2048 and 2048x7168 4 to 5 % slower (H200)."""

BARRIER_BYTES = 1024
"""Ample for the barriers and the alignment of what lies in shared memory."""


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """How a quantising kernel is laid out. Hashable.

    Attributes:
        tile_m: input rows of a tile, a multiple of 64; 128 unless rows alone are scaled, as they lie.
        stages: tiles in flight from global memory, at least 2.
        out_buffers: slabs a warpgroup has in flight to global memory.
        blocks_per_sm: persistent thread blocks on one multiprocessor.
    """

    tile_m: int = 128
    stages: int = 3
    out_buffers: int = 2
    blocks_per_sm: int = 1


def default_config(problem: QuantizeProblem, in_dtype: np.dtype, elements: int = 0) -> QuantizeConfig:
    """Returns the layout with the most stages, up to four, and then output buffers that fit.

    Args:
        problem: the pass.
        in_dtype: of the inputs.
        elements: of one input, if known.
    """
    num_inputs = FUNCTIONS[problem.function].num_inputs if problem.function else 1
    slabs = (problem.natural + problem.transposed) * (BLOCK // SLAB_ROWS)
    is_square = problem.block_shape == SQUARE_BLOCK
    stage_bytes = num_inputs * BLOCK * BLOCK * np.dtype(in_dtype).itemsize + 4 * BLOCK * is_square
    slab_bytes = SLAB_ROWS * (BLOCK + 4 * (not is_square) + 4 * problem.column_sum)
    is_large = is_square and problem.natural and problem.transposed and elements >= LARGE_SQUARE_ELEMENTS
    for stages, out_buffers in ((4, 2), (3, 2), (3, 1), (2, 2), (2, 1)):
        used = stages * stage_bytes + slabs * out_buffers * slab_bytes + BARRIER_BYTES
        if used <= SHARED_MEMORY_BYTES and not (is_large and stages > 3):
            return QuantizeConfig(BLOCK, stages, out_buffers)
    raise AssertionError(f"{problem} does not fit in shared memory")


def why_not(problem: QuantizeProblem, in_dtype: np.dtype, shapes: Sequence[tuple[int, ...]]) -> str | None:
    """Returns why these kernels cannot serve a problem with inputs of these shapes, or None if they can."""
    if problem.block_shape not in (ROW_BLOCK, SQUARE_BLOCK):
        return f"block_shape {problem.block_shape} is neither (1, 128) nor (128, 128)"
    if np.dtype(in_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"dtype {np.dtype(in_dtype)} is neither bfloat16, float16 nor float32"
    function = problem.function
    if function is None:
        return None
    if problem.block_shape != ROW_BLOCK:
        return f"{function} is fused with blocks of (1, 128) alone"
    if FUNCTIONS[function].num_inputs > 1 and np.dtype(in_dtype) == jnp.float32:
        return f"two tiles of the inputs of {function} in float32 do not fit in shared memory"
    if problem.joined and problem.columns(shapes) % BLOCK:
        return "gate and up are joined in the middle of a tile: their columns must be multiples of 128"
    if problem.hidden and not problem.transposed:
        return "the hidden activations are quantised transposed, where nothing else is"
    return None


def row_table(problem: QuantizeProblem, tile_m: int, rows: int, sizes: jax.Array) -> jax.Array:
    """Lays out the tiles of rows: int32 `[2 * tiles]`, from where in the input each comes, and how many rows count.

    A tile of which no row counts comes from past the end of the input, where the TMA reads nothing and gives zeros.

    Args:
        problem: "masked" or "segments".
        tile_m: rows of a tile; 128 for "segments".
        rows: of the input.
        sizes: int32, as `QuantizeProblem.rows` says.
    """
    if problem.rows == "segments":
        offsets = layout.group_offsets(sizes, rows)
        group, within = segment_of_tile(offsets, layout.aligned_capacity(rows, problem.num_groups), tile_m)
        source, count = offsets[group] + within, jnp.clip(jnp.diff(offsets)[group] - within, 0, tile_m)
    else:
        source = jnp.arange(0, rows, tile_m)
        count = jnp.clip(sizes.reshape(-1, 1) - source, 0, tile_m)
        source = jnp.broadcast_to(source, count.shape)
    return jnp.stack([jnp.where(count > 0, source, rows), count]).astype(jnp.int32).reshape(-1)


def segment_of_tile(offsets: jax.Array, capacity: int, tile_m: int) -> tuple[jax.Array, jax.Array]:
    """Returns the group whose segment each tile of rows lies in, and how many of the segment's rows come before it.

    Args:
        offsets: int32 `[g + 1]`, from `layout.group_offsets`.
        capacity: rows of all segments.
        tile_m: rows of a tile; segments start at multiples of it.

    Returns:
        int32 `[ceil(capacity / tile_m)]` each. Tiles past the last segment count to it, past its end.
    """
    starts = layout.aligned_group_offsets(jnp.diff(offsets))
    first = jnp.arange(0, capacity, tile_m, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(starts[1:] <= first[:, None], 1), offsets.shape[0] - 2)
    return group, first - starts[group]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything static about one launch."""

    problem: QuantizeProblem
    config: QuantizeConfig
    groups: int
    m: int
    k: int
    in_dtype: np.dtype
    num_sms: int

    @property
    def has_table(self) -> bool:
        """Whether a table says from where each tile's rows come, and how many of them count."""
        return self.problem.rows != "all"

    @property
    def results(self) -> list[tuple[QuantizeProblem, tuple[int, ...]]]:
        """The arrays to quantise, each with its pass and its shape."""
        shapes = [(self.m, self.k)] * self.num_inputs
        if self.problem.joined:
            shapes[-2:] = [(self.m, 2 * self.k)]
        return dataclasses.replace(self.problem, rows="all").results(shapes)

    @property
    def num_arrays(self) -> int:
        """Arrays to fetch tiles from."""
        return self.num_inputs - self.problem.joined

    @property
    def num_inputs(self) -> int:
        """Tiles to fetch."""
        return FUNCTIONS[self.problem.function].num_inputs if self.problem.function else 1

    @property
    def num_natural(self) -> int:
        """Tiles to quantise, but for one that is quantised transposed alone."""
        return FUNCTIONS[self.problem.function].num_outputs if self.problem.function else 1

    @property
    def num_outputs(self) -> int:
        """Tiles to quantise."""
        return self.num_natural + self.problem.hidden

    @property
    def sources(self) -> list[tuple[int, int]]:
        """For each tile to fetch, its array and the array's first column of it."""
        arrays = [(index, 0) for index in range(self.num_arrays)]
        return [*arrays, (self.num_arrays - 1, self.k)] if self.problem.joined else arrays

    @property
    def targets(self) -> list[tuple[int, int]]:
        """For each tile to quantise, its array and the array's first column of it."""
        if not self.problem.joined:
            return [(index, 0) for index in range(self.num_outputs)]
        return [(0, index * self.k) for index in range(self.num_natural)] + [(1, 0)] * self.problem.hidden

    @property
    def tiles_m(self) -> int:
        return layout.cdiv(self.m, self.config.tile_m)

    @property
    def tiles_k(self) -> int:
        return layout.cdiv(self.k, BLOCK)

    @property
    def num_tiles(self) -> int:
        return self.groups * self.tiles_m * self.tiles_k

    @property
    def num_blocks(self) -> int:
        return min(self.num_tiles, self.num_sms * self.config.blocks_per_sm)

    @property
    def natural_slabs(self) -> int:
        return self.config.tile_m // SLAB_ROWS if self.problem.natural else 0

    @property
    def num_warpgroups(self) -> int:
        return self.natural_slabs + (BLOCK // SLAB_ROWS if self.problem.transposed else 0)

    @property
    def is_square(self) -> bool:
        return self.problem.block_shape == SQUARE_BLOCK

    @property
    def is_swizzled(self) -> bool:
        return self.in_dtype.itemsize == 2

    @property
    def chunk_columns(self) -> int:
        """Columns of one TMA transfer: a swizzled row, or all where the input is too wide to swizzle."""
        return SWIZZLE_BYTES // 2 if self.is_swizzled else BLOCK
