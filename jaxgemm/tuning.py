"""Tiles for the kernels: what a configuration is, which are valid, and which one serves a problem."""

import dataclasses


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
