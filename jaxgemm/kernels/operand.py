"""One side of a product: its tile, and its values and scales in global and shared memory."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.gemm_config import SCALE_PARTS
from jaxgemm.kernels.wave import OPERAND_TRANSFORMS, TILE_K, load
from jaxgemm.layout import align_up, cdiv

SCALE_BLOCK_ROWS = 128
SLAB_ALIGNMENT = 32


class Edge(NamedTuple):
    """What is loaded of a tile that reaches past the end of its operand, in place of `Operand.loaded`.

    NOTE: the TMA fills rows that are not there with zeros, and takes more time for one than for a row that is: with it
    4104x4104x7168 took 206 us in tiles of 192x128, without 188 (H100).

    Attributes:
        start: the first row where such a tile starts; those past the end, of a block without a partner, load it too.
        rows: how many rows: at least those that there are.
    """

    start: int
    rows: int


@dataclasses.dataclass(frozen=True)
class Operand:
    """One side of the product.

    Attributes:
        tile: rows of it in a tile.
        loaded: those that are loaded, fewer if it has no more; what lies in the place of the others is never stored.
        scale_per_row: True if scaled by 1x128 blocks, False if by 128x128.
        num_scale_blocks: rows of the stored 128x128 scales of a group; unused if scale_per_row.
        k_tiles: k tiles, and columns of the stored 128x128 scales.
        dtype: FP8.
        multicast: whether the blocks of a cluster share its loads.
        num_groups: size of its leading axis; 0 if it has none.
        splits_scales: whether its 1x128 scales come in parts (`jaxgemm.kernels.scale_products`).
        edge: of its last tiles; None if all are whole, or start anywhere.
    """

    tile: int
    loaded: int
    scale_per_row: bool
    num_scale_blocks: int
    k_tiles: int
    dtype: Any
    multicast: bool = False
    num_groups: int = 0
    splits_scales: bool = False
    edge: Edge | None = None

    @property
    def slab(self) -> int:
        """1x128 scales held in shared memory for one k tile; a TMA copy brings multiples of 128 bytes."""
        return self.tile if self.splits_scales else align_up(self.tile, SLAB_ALIGNMENT)

    @property
    def blocks_per_tile(self) -> int:
        """128x128 blocks that a tile can touch along its rows."""
        furthest_start = SCALE_BLOCK_ROWS - math.gcd(self.tile, SCALE_BLOCK_ROWS)
        return cdiv(furthest_start + self.tile, SCALE_BLOCK_ROWS)

    @property
    def scale_row(self) -> int:
        """128x128 scales that a warpgroup loads at once: those of every k tile, and a few more."""
        return align_up(self.k_tiles, 128)

    @property
    def keeps_block_scales(self) -> bool:
        """Whether 128x128 scales are loaded a row at a time: if there are that many; else one by one, as needed."""
        stored = max(1, self.num_groups) * self.num_scale_blocks * self.k_tiles
        return not self.scale_per_row and stored >= self.scale_row

    def scale_block(self, group: Any, block: Any) -> jax.Array:
        """The row of the stored 128x128 scales for this block of a group's rows; the last one, past its end."""
        within = lax.min(block, jnp.int32(self.num_scale_blocks - 1))
        return group * self.num_scale_blocks + within if self.num_groups else within

    @property
    def num_copies(self) -> int:
        """TMA copies that bring one k tile of it."""
        return 1 + self.scale_per_row


class OperandRefs(NamedTuple):
    """References to one operand: stored values and scales in GMEM, and their stages in SMEM."""

    values_gmem: Any
    scales_gmem: Any
    values_smem: Any
    scales_smem: Any


def operand_buffers(operand: Operand, stages: int, num_warpgroups: int) -> tuple[Any, Any]:
    """The shared-memory types of an operand's values and scales.

    1x128 scales come with each k tile; 128x128 scales stay for a tile, each warpgroup with a copy of its own.
    """
    values = plgpu.SMEM((stages, operand.tile, TILE_K), operand.dtype, transforms=OPERAND_TRANSFORMS)
    scales: tuple[int, ...] = (num_warpgroups, operand.blocks_per_tile, operand.scale_row)
    if operand.scale_per_row:
        scales = (stages, operand.slab, *([SCALE_PARTS] if operand.splits_scales else []))
    return values, plgpu.SMEM(scales, jnp.float32)


class BlockScales(NamedTuple):
    """128x128 scales of a tile: for each block that it touches, a row of them, and where k tile 0 lies in it."""

    rows: list[jax.Array]
    shifts: list[jax.Array]


def load_block_scales(side: tuple[Operand, OperandRefs], group: Any, start: jax.Array) -> BlockScales | None:
    """Begins to load a tile's 128x128 scales into registers; None if there are none to keep."""
    operand, refs = side
    if not operand.keeps_block_scales:
        return None
    layout = plgpu.Layout.WG_STRIDED((operand.scale_row,), vec_size=1)
    last = refs.scales_gmem.shape[0] - operand.scale_row
    rows, shifts = [], []
    for i in range(operand.blocks_per_tile):
        block = operand.scale_block(group, lax.div(start, SCALE_BLOCK_ROWS) + i)
        first = lax.min(block * operand.k_tiles, last)
        rows.append(load(refs.scales_gmem.at[pl.ds(first, operand.scale_row)], layout=layout))
        shifts.append(block * operand.k_tiles - first)
    return BlockScales(rows, shifts)


def keep_block_scales(side: tuple[Operand, OperandRefs], scales: BlockScales | None, warpgroup: jax.Array) -> None:
    """Writes loaded scales to this warpgroup's copy in shared memory; the caller commits them."""
    if scales is not None:
        for i, row in enumerate(scales.rows):
            side[1].scales_smem[warpgroup, i] = row
