"""What a search for tiles tries around the best that it knows."""

import dataclasses
from collections.abc import Iterator

from jaxgemm.gemm_config import GemmConfig, why_invalid, with_most_stages
from jaxgemm.layout import cdiv
from jaxgemm.problem import GemmProblem
from jaxgemm.tile_candidates import SPLITS


def neighbours(problem: GemmProblem, config: GemmConfig) -> Iterator[GemmConfig]:
    """Every valid configuration that differs from a given one in a single choice; where less fits, in stages too."""
    rows_of_tiles, columns_of_tiles = cdiv(problem.m, config.tile_m), cdiv(problem.n, config.tile_n)
    changes: list[dict[str, int | bool]] = [{"stages": config.stages + step} for step in (-1, -2, 1, 2)]
    if min(rows_of_tiles, columns_of_tiles) > 1:  # the order of the tiles matters
        changes += [{"band": band} for band in (2, 4, 8, 16, 32)]
        changes += [{"band_along_n": not config.band_along_n}]
    changes += [{"split_k": split_k} for split_k in SPLITS]
    changes += [{"share": share} for share in (1, 2)]
    changes += [{"multiply_scales": multiplies, "share": 1 + multiplies} for multiplies in (False, True)]
    if problem.n * problem.out_dtype.itemsize % 16:
        changes += [{"masked_store": not config.masked_store}]
    changes += [{"tile_n": config.tile_n + step} for step in (-64, -32, -16, 16, 32, 64)]
    narrow = (-16, -8, 8, 16) if problem.kind != "dense" else ()  # one dense tile has all of a few rows, and no more
    changes += [{"tile_m": config.tile_m + step} for step in (narrow if config.swap_operands else (-64, 64))]
    seen = {config}
    for change in changes:
        changed = dataclasses.replace(config, **change)  # type: ignore[arg-type]
        if min(changed.tile_m, changed.tile_n) < 1:
            continue
        neighbour = changed if "stages" in change else with_most_stages(problem, changed, config.stages)
        if neighbour is not None and neighbour not in seen and why_invalid(problem, neighbour) is None:
            seen.add(neighbour)
            yield neighbour
