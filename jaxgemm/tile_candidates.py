"""Which tiles of the Hopper kernel are worth considering for a problem; `jaxgemm.tuning` says which is fastest.

Plain Python on static shapes: no device is asked, and nothing is run.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from jaxgemm.gemm_config import MAX_SHORT_COLUMNS, GemmConfig, all_scales_per_row, with_most_stages
from jaxgemm.layout import SCALE_BLOCK, align_up, cdiv
from jaxgemm.problem import GemmProblem

TYPICAL_SMS = 132
"""Streaming multiprocessors of an H100 SXM and an H200."""

FEW_ROWS = 128
"""Rows up to which a product reads weights and does little else."""


def candidates(problem: GemmProblem) -> Iterator[GemmConfig]:
    """Every configuration worth considering for a problem; all are valid."""
    shapes = []
    extent = expected_extent(problem)
    if extent.m <= FEW_ROWS and problem.kind not in ("k_grouped", "k_masked"):
        tile_m = align_up(extent.m, 8) if problem.kind == "dense" else _tile_of_groups(problem, extent)
        wide = problem.kind == "dense" and tile_m > MAX_SHORT_COLUMNS  # slow in tiles of several warpgroups
        for tile_n, warpgroups in ((64, 1),) if wide else ((64, 1), (128, 2), (192, 3)):
            for split_k in SPLITS if problem.kind == "dense" else (1,):
                shapes.append(GemmConfig(tile_m, tile_n, 2, warpgroups, swap_operands=True, split_k=split_k))
    for tile_m, warpgroups in ((256, 2), (192, 3), (128, 2), (64, 1)):
        for tile_n in _tile_widths(problem, tile_m):
            for share in _shares(problem, tile_m, tile_n):
                shapes.append(GemmConfig(tile_m, tile_n, 2, warpgroups, share=share))
    shapes += _multiplying_scales(problem)
    for shape in shapes:
        config = with_most_stages(problem, shape, _most_stages(problem, shape))
        if config is not None:
            yield _with_bands(problem, config)


SPLITS = (1, 2, 3, 4, 8)
"""Blocks that share out k of a tile of few rows."""


def _shares(problem: GemmProblem, tile_m: int, tile_n: int) -> tuple[int, ...]:
    """Blocks that share the loads of rows: two of high tiles. An odd tile along n leaves one without a partner.

    Dense products take 0 to 5 % less time so, groups of rows 0 to 15 % (H100), for which an idle block may be worth it.
    """
    if all_scales_per_row(problem) or tile_m <= 128:
        return (1,)
    if cdiv(problem.n, tile_n) % 2 == 0:
        return (2,)
    return (1,) if problem.kind == "dense" else (1, 2)


def _multiplying_scales(problem: GemmProblem) -> Iterator[GemmConfig]:
    """Tiles whose scales the tensor core multiplies; blocks of two share loads, without which they are not faster."""
    if not all_scales_per_row(problem) or problem.kind not in ("dense", "k_grouped"):
        return
    high = (80, 96, 104) if problem.out_dtype.itemsize == 4 else (80, 96)
    for tile_m, tile_n, band in (*((256, width, 8) for width in high), (128, 128, 16)):
        if problem.n > tile_n:
            yield GemmConfig(tile_m, tile_n, 2, share=2, band=band, multiply_scales=True)


def _with_bands(problem: GemmProblem, config: GemmConfig) -> GemmConfig:
    """The configuration with bands of tiles as wide, and along the axis, as is best.

    An output that is larger than the operands drives them out of the L2 cache. In bands of eight tiles along n, of all
    rows each, rhs comes from memory once: high tiles then take 1 to 18 % less time (H100, five shapes), and those of
    256 rows up to 3 % less where rhs is not the larger operand. Others were fastest in bands of as many rows as high
    tiles have in eight, but for outputs that are far larger.

    Groups of 129 to 256 rows go one after the other, their weights read once: tiles of 128x192, 128x128 and 256x128
    take 2 to 5 % less time in bands of two than of eight (H100; larger groups 0 to 2 % more in other bands).
    """
    if reads_weights_once(problem):
        return dataclasses.replace(config, band=2)
    if problem.kind != "dense" or config.swap_operands or all_scales_per_row(problem):
        return config
    out = problem.m * problem.n * problem.out_dtype.itemsize
    operands = (problem.m + problem.n) * problem.k
    is_high = config.tile_m > 128
    larger = out >= operands if is_high else out > 10 * operands
    if larger or (config.tile_m > 192 and problem.n <= problem.m):
        return dataclasses.replace(config, band_along_n=True)
    return config if is_high else dataclasses.replace(config, band=16)


def reads_weights_once(problem: GemmProblem) -> bool:
    """Whether a problem has groups of many rows, but of one or two tiles at most."""
    rows = expected_extent(problem).m
    return problem.kind in ("grouped", "masked") and is_of_later_loop(problem) and rows <= 2 * SCALE_BLOCK


MOST_STAGES = (8, 12)
"""Most k tiles in flight: of any product; and where that is too few for `WEIGHTS_IN_FLIGHT`."""

WEIGHTS_IN_FLIGHT = 8e6
"""Bytes of weights that are best on their way from memory at once, in all. More only keep more of its queues busy: with
weights read cold, 1x4096x7168 takes 12.4 us with 8 stages and 13.4 with 24, 64x7168x16384 43.1 with 8 and 44.6 with 12;
64x4096x7168 in tiles of 64x32, half as many bytes, 13.9 and 13.5 (H100)."""


def _most_stages(problem: GemmProblem, config: GemmConfig) -> int:
    """How many k tiles to have in flight at most: if there are few rows, by the weights that are then on their way."""
    few, many = MOST_STAGES
    if problem.kind != "dense" or problem.m > FEW_ROWS:
        return few
    row_tiles, column_tiles = cdiv(problem.m, config.tile_m), cdiv(problem.n, config.tile_n) * config.split_k
    of_a_stage = config.tile_n * SCALE_BLOCK * min(column_tiles, TYPICAL_SMS // row_tiles)
    return min(many, max(few, int(WEIGHTS_IN_FLIGHT // of_a_stage)))


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


def _tile_widths(problem: GemmProblem, tile_m: int) -> tuple[int, ...]:
    """Columns of tiles of so many rows; what was slower in every measurement is left out."""
    narrow = (32, 64, 96, 128)
    if not all_scales_per_row(problem):
        if tile_m <= 128:
            return *narrow, 144, 160, 192
        return (96, 128) if tile_m == 192 and problem.kind == "dense" else (128,)
    if tile_m > 128:
        return 96, 112
    return (*narrow, 160) if problem.out_dtype.itemsize < 4 else narrow


def is_of_later_loop(problem: GemmProblem) -> bool:
    """Whether a problem's kernels were measured with the later main loop, on an H100: all but groups of few rows, and
    1x128 blocks on both sides, with constants of their own where the tensor core multiplies these scales."""
    return not all_scales_per_row(problem) and (problem.kind == "dense" or expected_extent(problem).m > FEW_ROWS)
