"""The choice of a configuration: pure, valid everywhere, and sensible."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgemm.autotune_neighbours import neighbours
from jaxgemm.gemm_config import (
    SHARED_MEMORY_BYTES,
    GemmConfig,
    clusters_launched,
    frees_early,
    pairs_k_tiles,
    shared_memory_bytes,
    staged_chunks,
    takes_turns,
    when_scales_are_read,
    why_invalid,
)
from jaxgemm.kernels.plan import make_plan
from jaxgemm.layout import align_up
from jaxgemm.problem import GemmProblem
from jaxgemm.tile_candidates import candidates
from jaxgemm.tiles import shipped_choice
from jaxgemm.tuned_rows import shipped_tables, tuned_key
from jaxgemm.tuning import choose_config, predicted_microseconds

E4M3 = np.dtype(jnp.float8_e4m3fn)
ROW, SQUARE = (1, 128), (128, 128)


def problem(m, n, k, rhs=SQUARE, out=jnp.bfloat16, kind="dense", **options):
    return GemmProblem(kind, m, n, k, E4M3, E4M3, ROW, rhs, np.dtype(out), **options)


sizes = st.one_of(st.integers(1, 300), st.integers(1, 40000))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from([ROW, SQUARE]), st.sampled_from([jnp.bfloat16, jnp.float32]), st.booleans())
def test_every_problem_has_a_valid_configuration(m, n, k, rhs, out, bias):
    described = problem(m, n, k, rhs, out, has_bias=bias)
    for num_sms in (1, 114, 132):
        config = choose_config(described, num_sms)
        assert why_invalid(described, config) is None
        assert shared_memory_bytes(described, config) <= SHARED_MEMORY_BYTES


def test_candidates_are_valid_and_the_model_orders_them():
    described = problem(64, 4096, 7168)
    found = list(candidates(described))
    assert len(found) > 10
    assert all(why_invalid(described, config) is None for config in found)
    assert all(predicted_microseconds(described, config, 132) > 0 for config in found)


def test_large_problems_get_large_tiles_and_few_rows_get_swapped():
    large = choose_config(problem(8192, 8192, 8192), 132)
    assert large.tile_m * large.tile_n >= 128 * 192 and not large.swap_operands
    for m in (1, 7, 32):
        few = choose_config(problem(m, 4096, 7168), 132)
        assert few.swap_operands and few.tile_m < 64


def test_the_choice_is_pure():
    assert choose_config(problem(300, 500, 700), 132) == choose_config(problem(300, 500, 700), 132)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmConfig(100, 128, 3), "multiple of 64"),
        (GemmConfig(128, 100, 3), "multiple of 8"),
        (GemmConfig(128, 104, 3), "multiple of 32 bytes"),
        (GemmConfig(128, 128, 3, multiply_scales=True), "1x128 scales of both"),
        (GemmConfig(256, 128, 4), "shared memory"),
        (GemmConfig(256, 192, 2), "registers"),
        (GemmConfig(192, 192, 2, 3), "registers"),
        (GemmConfig(16, 256, 2, 1, swap_operands=True, split_k=2), "one wave"),
        (GemmConfig(128, 128, 1), "stages"),
        (GemmConfig(512, 64, 2), "up to 256"),
        (GemmConfig(128, 128, 3, split_k=2), "swapped"),
        (GemmConfig(16, 128, 3, swap_operands=True, split_k=16), "cluster"),
    ],
    ids=str,
)
def test_invalid_configurations_say_why(config, reason):
    assert reason in why_invalid(problem(4096, 4096, 7168), config)


@pytest.mark.parametrize("out, columns", [(jnp.bfloat16, 96), (jnp.float32, 48)])
def test_ragged_rows_are_stored_by_whole_swizzles(out, columns):
    """Else the TMA would have to start where it cannot, in the middle of 128 bytes of shared memory."""
    config = GemmConfig(64, columns, 3, 1)
    described = problem(100, 4096, 512, out=out, kind="grouped", num_groups=4)
    assert "128 bytes at a time" in why_invalid(described, config)
    assert why_invalid(problem(100, 4096, 512, out=out), config) is None
    assert why_invalid(described, dataclasses.replace(config, tile_n=2 * columns)) is None


def test_waves_are_staged_together_where_they_fit():
    described = problem(4096, 4096, 7168)
    together, apart = GemmConfig(256, 128, 3), GemmConfig(256, 128, 4)
    assert staged_chunks(described, together) == 2 * staged_chunks(described, apart) == 4
    assert shared_memory_bytes(described, together) <= SHARED_MEMORY_BYTES < shared_memory_bytes(described, apart)


def test_odd_rows_are_stored_without_a_copy_where_that_has_run():
    assert choose_config(problem(4097, 4100, 7100), 132).masked_store
    assert choose_config(problem(4097, 4098, 7100, out=jnp.float32), 132).masked_store
    assert not choose_config(problem(4097, 4104, 7100), 132).masked_store
    weight = problem(4096, 4097, 7168, out=jnp.float32, rhs=ROW)
    assert choose_config(weight, 132).num_waves == 2 and not choose_config(weight, 132).masked_store
    few = problem(7, 4098, 7100, out=jnp.float32)
    assert choose_config(few, 132).swap_operands and not choose_config(few, 132).masked_store


def test_what_no_configuration_serves_is_refused():
    described = problem(64, 64, 64)
    config = GemmConfig(128, 128, 3)
    groups = dataclasses.replace(described, kind="grouped", num_groups=3)
    assert why_invalid(groups, config) is None
    assert why_invalid(groups, dataclasses.replace(config, share=2)) is None
    assert "clusters" in why_invalid(groups, dataclasses.replace(config, swap_operands=True, split_k=2))
    masks = dataclasses.replace(groups, kind="k_masked", rhs_block_shape=ROW)
    assert "clusters" in why_invalid(masks, dataclasses.replace(config, share=2, multiply_scales=True))
    assert "positive" in why_invalid(dataclasses.replace(groups, num_groups=0), config)
    assert "positive" in why_invalid(dataclasses.replace(described, m=0), config)
    both = problem(4096, 4096, 4096, ROW)
    assert "share" in why_invalid(both, dataclasses.replace(config, share=2))
    assert why_invalid(both, dataclasses.replace(config, share=2, multiply_scales=True)) is None
    rows = dataclasses.replace(both, kind="grouped", num_groups=3)
    assert "no groups of rows" in why_invalid(rows, dataclasses.replace(config, multiply_scales=True))
    assert "registers" in why_invalid(both, GemmConfig(256, 112, 2, multiply_scales=True))
    assert "registers" in why_invalid(problem(4096, 4096, 4096, ROW), GemmConfig(256, 128, 3))


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    sizes,
    sizes,
    st.integers(1, 300),
    st.sampled_from(["grouped", "masked", "k_grouped", "k_masked"]),
    st.booleans(),
)
def test_groups_have_a_valid_configuration(m, n, k, groups, kind, is_decoding):
    options = dict(kind=kind, num_groups=groups, expected_m=1 + m // 3 if kind == "masked" and is_decoding else None)
    described = dataclasses.replace(problem(m, n, k, ROW if kind in ("k_grouped", "k_masked") else SQUARE), **options)
    config = choose_config(described, 132)
    assert why_invalid(described, config) is None
    assert predicted_microseconds(described, config, 132) > 0


def test_few_rows_a_group_take_narrow_tiles_and_many_take_high_ones():
    decoding = dataclasses.replace(problem(64, 7168, 2048), kind="masked", num_groups=32, expected_m=20)
    training = dataclasses.replace(problem(32768, 7168, 2048), kind="grouped", num_groups=8)
    assert choose_config(decoding, 132).swap_operands and choose_config(decoding, 132).tile_m < 64
    assert choose_config(training, 132).tile_m >= 192


@pytest.mark.parametrize(
    "device, row",
    [(table.device, row) for table in shipped_tables() for row in table.rows.values()],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.key)),
)
def test_measured_rows_are_valid(device, row):
    key, out = row.key, {2: jnp.bfloat16, 4: jnp.float32}[row.key.out_bytes]
    described = problem(
        key.m, key.n, key.k, (key.rhs_block_rows, 128), out,
        kind=key.kind, num_groups=key.num_groups, expected_m=key.expected_m,
    )  # fmt: skip
    assert tuned_key(described) == key
    assert why_invalid(described, row.config) is None
    assert shipped_choice(described, 132, device) == (row.config, f"measured on {device}")


@pytest.mark.parametrize(
    "described", [problem(64, 4096, 7168), problem(4096, 4096, 7168), problem(4096, 4096, 4096, ROW)]
)
def test_neighbours_are_valid_distinct_and_not_the_same(described):
    for config in candidates(described):
        found = list(neighbours(described, config))
        assert found and len(set(found)) == len(found) and config not in found
        assert all(why_invalid(described, neighbour) is None for neighbour in found)


@pytest.mark.parametrize("kind", ["grouped", "masked"])
@pytest.mark.parametrize("config", [GemmConfig(128, 128, 3), GemmConfig(128, 160, 3), GemmConfig(256, 96, 3)], ids=str)
def test_warpgroups_that_may_have_no_rows_take_no_turns(kind, config):
    """One that passes over its k tiles never takes its turn, and the others would wait for it for ever."""
    assert takes_turns(problem(4096, 4096, 4096, ROW, jnp.bfloat16), config)
    assert not takes_turns(problem(4096, 4096, 4096, ROW, jnp.bfloat16, kind, num_groups=4), config)


def test_scales_are_read_where_there_are_registers_for_them():
    both, one = problem(4096, 4096, 4096, ROW), problem(4096, 4096, 4096)
    assert when_scales_are_read(both, GemmConfig(128, 128, 3)) == "during"
    assert when_scales_are_read(both, GemmConfig(128, 160, 3)) == "before"
    assert when_scales_are_read(both, GemmConfig(256, 96, 3)) == "before"
    assert when_scales_are_read(both, GemmConfig(64, 192, 3, 1)) == "after"
    assert when_scales_are_read(both, GemmConfig(128, 128, 3, multiply_scales=True)) == "multiplied"
    assert when_scales_are_read(one, GemmConfig(128, 128, 3)) == "before"
    assert not takes_turns(one, GemmConfig(256, 128, 3))


@pytest.mark.parametrize(
    "m, n, k, fastest",
    [  # the fastest, and those within 2 % of it, in kernel-tiles, shared-loads, even-waves and edges-h100.json
        (8192, 24576, 1536, [(128, 192), (192, 128)]),
        (8192, 2112, 7168, [(192, 128), (128, 192)]),
        (4096, 2112, 7168, [(192, 128)]),
        (4096, 1536, 24576, [(128, 192), (192, 128)]),
        (4096, 32768, 512, [(192, 128)]),
        (8192, 32768, 512, [(192, 128)]),
        (4104, 4104, 7168, [(192, 128)]),
        (4097, 4100, 7100, [(192, 128)]),
        (4097, 4101, 7100, [(192, 128)]),
        (4096, 4224, 7168, [(256, 128)]),
        (8192, 8320, 4096, [(256, 128), (192, 128)]),
        (6000, 3000, 3000, [(192, 128)]),
        (8192, 1408, 7168, [(192, 128)]),
        (4096, 1408, 2048, [(192, 128)]),
        (8193, 577, 7168, [(128, 160)]),
        (300, 4096, 7168, [(64, 160)]),
        (4096, 4096, 7168, [(256, 128)]),
        (4096, 7168, 16384, [(256, 128)]),
        (8192, 4096, 7168, [(256, 128), (192, 128)]),
        (8192, 8192, 8192, [(256, 128), (192, 128)]),
        (8192, 2048, 2048, [(256, 128)]),
        (8192, 7168, 2048, [(192, 128), (256, 128)]),
        (8192, 2048, 7168, [(256, 128)]),
        (8192, 4096, 14336, [(256, 128)]),
        (8192, 14336, 4096, [(192, 128), (256, 128)]),
        (8192, 28672, 4096, [(192, 128), (256, 128)]),
        (4096, 24576, 1536, [(128, 192), (192, 128)]),
        (4096, 28672, 8192, [(256, 128)]),
        (4096, 13824, 5120, [(192, 128)]),
        (4096, 3584, 7168, [(192, 128)]),
        (2048, 7168, 7168, [(192, 128)]),
        (8192, 7168, 16384, [(256, 128)]),
        (4096, 16384, 7168, [(256, 128)]),
        (8192, 576, 7168, [(192, 96)]),
        (4096, 576, 7168, [(192, 96), (128, 144)]),
        (1, 24576, 1536, [(8, 64)]),
        (1, 4096, 7168, [(8, 64)]),
        (64, 4096, 7168, [(64, 32)]),
        (64, 24576, 1536, [(64, 64)]),
    ],
)
def test_products_get_the_tiles_that_were_fastest(m, n, k, fastest):
    config = choose_config(problem(m, n, k), 132)
    assert (config.tile_m, config.tile_n) in fastest


def test_high_tiles_share_loads_where_each_finds_a_partner():
    """0 to 5 % less time (benchmarks/results/shared-loads-h100.json); an odd number would leave a block idle."""
    shares = {config.tile_m: config.share for config in candidates(problem(4096, 4096, 7168))}
    assert shares[256] == shares[192] == 2 and shares[128] == 1
    odd = [config for config in candidates(problem(4096, 2112, 7168)) if -(-2112 // config.tile_n) % 2]
    assert odd and all(config.share == 1 for config in odd)
    groups = {
        config.tile_m: config.share for config in candidates(problem(4096, 4096, 7168, kind="grouped", num_groups=4))
    }
    assert groups == shares
    odd_groups = list(candidates(problem(4096, 2112, 7168, kind="masked", num_groups=4)))
    assert {(config.tile_m, config.share) for config in odd_groups} >= {(256, 1), (256, 2), (192, 1), (192, 2)}


def groups_of_rows(kind, groups, rows, n, k):
    options = {"expected_m": rows, "fill": "unspecified"} if kind == "masked" else {}
    m = align_up(int(1.3 * rows), 64) if kind == "masked" else groups * rows
    return problem(m, n, k, kind=kind, num_groups=groups, **options)


@pytest.mark.parametrize(
    "kind, groups, rows, n, k, fastest",
    [  # the fastest, and those within 2 % of it, in benchmarks/results/group-shares-h100.json
        ("grouped", 8, 4096, 6144, 7168, [(256, 128, 2), (192, 128, 2)]),
        ("grouped", 8, 4096, 4096, 4096, [(256, 128, 1), (256, 128, 2), (192, 128, 2)]),
        ("grouped", 8, 4096, 4096, 2048, [(192, 128, 2)]),
        ("grouped", 4, 8192, 7168, 3072, [(192, 128, 2)]),
        ("grouped", 8, 2048, 28672, 4096, [(192, 128, 2)]),
        ("grouped", 8, 2048, 4096, 14336, [(256, 128, 2), (192, 128, 2)]),
        ("grouped", 64, 512, 4096, 7168, [(256, 128, 2), (192, 128, 2)]),
        ("masked", 6, 1024, 6144, 7168, [(192, 128, 2)]),
        ("masked", 6, 1024, 4096, 2048, [(192, 128, 2), (192, 128, 1)]),
        ("masked", 6, 1024, 4096, 4096, [(192, 128, 2)]),
        ("masked", 32, 192, 6144, 7168, [(128, 192, 1)]),
        ("masked", 32, 192, 4096, 2048, [(128, 192, 1), (128, 128, 1)]),
    ],
)
def test_groups_get_the_tiles_that_were_fastest(kind, groups, rows, n, k, fastest):
    config = choose_config(groups_of_rows(kind, groups, rows, n, k), 132)
    assert (config.tile_m, config.tile_n, config.share) in fastest
    assert config.band == (2 if rows <= 256 else 8)


def test_no_more_blocks_than_even_waves_need():
    """256 pairs of tiles are four waves of 64, of the 66 that run at once; where k is short they are not even."""
    long, high = problem(4096, 4096, 7168), GemmConfig(256, 128, 3, share=2)
    assert clusters_launched(long, high, 256, 132) == make_plan(long, high, 132).num_clusters == 64
    assert clusters_launched(problem(4096, 4096, 2048), high, 256, 132) == 66
    assert clusters_launched(problem(256, 512, 7168), high, 2, 132) == 2
    assert clusters_launched(long, high, 256, 1) == 1
    assert clusters_launched(long, GemmConfig(256, 128, 3), 512, 132) == 132  # not single blocks
    assert clusters_launched(long, GemmConfig(192, 128, 4, 3, share=2), 352, 132) == 66  # nor three warpgroups
    grouped = problem(4096, 4096, 7168, ROW, jnp.float32, "k_grouped", num_groups=4)
    assert clusters_launched(grouped, GemmConfig(256, 96, 4, share=2, multiply_scales=True), 352, 132) == 66


@given(st.integers(1, 100_000), st.integers(2, 132))
def test_even_waves_are_no_more_waves(tiles, num_sms):
    launched = clusters_launched(problem(4096, 4096, 7168), GemmConfig(256, 128, 3, share=2), tiles, num_sms)
    at_once = num_sms // 2
    assert 1 <= launched <= at_once
    assert -(-tiles // launched) == -(-tiles // at_once)


def test_large_outputs_are_walked_in_bands_along_n():
    """Else rhs would be read again for each band: 4096x32768x512 took 163 us, and 134 with such bands (H100)."""
    high = [config for config in candidates(problem(4096, 32768, 512)) if config.tile_m > 128]
    assert high and all(config.band_along_n for config in high)
    assert not any(config.band_along_n for config in candidates(problem(4096, 7168, 7168)))
    for m in (4096, 8192):  # rhs is as large as lhs, or smaller: the highest tiles alone
        along_n = {config.tile_m: config.band_along_n for config in candidates(problem(m, 4096, 7168))}
        assert along_n[256] and not along_n[192] and not along_n[128]
    grouped = problem(4096, 32768, 512, kind="grouped", num_groups=4)
    assert not any(config.band_along_n for config in candidates(grouped))


@pytest.mark.parametrize(
    "m, n, k, out, tile, multiplies",
    [  # the fastest, and those within 3 % of it, in benchmarks/results/wgrad-tiles-h100.json
        (4096, 4096, 7168, jnp.float32, [(256, 104)], True),
        (4096, 7168, 4096, jnp.float32, [(256, 80), (256, 88)], True),
        (7168, 4096, 2048, jnp.float32, [(128, 128), (256, 96)], True),
        (24576, 4096, 1536, jnp.float32, [(128, 128), (256, 96), (256, 104)], True),
        (7168, 4096, 16384, jnp.float32, [(256, 104), (256, 96)], True),
        (4096, 14336, 8192, jnp.float32, [(256, 104)], True),
        (14336, 4096, 8192, jnp.float32, [(256, 104), (256, 96)], True),
        (7168, 2048, 8192, jnp.bfloat16, [(256, 96)], True),
        (4096, 4096, 7168, jnp.bfloat16, [(128, 128), (256, 96)], True),
        (2048, 2048, 8192, jnp.bfloat16, [(128, 128)], False),
    ],
)
def test_weight_gradients_get_the_tiles_that_were_fastest(m, n, k, out, tile, multiplies):
    config = choose_config(problem(m, n, k, ROW, out), 132)
    assert (config.tile_m, config.tile_n) in tile
    assert config.multiply_scales == multiplies and config.share == 1 + multiplies


@pytest.mark.parametrize("m, n, groups", [(4096, 7168, 4), (7168, 2048, 8), (4096, 7168, 16)])
def test_k_grouped_products_get_the_tiles_that_were_fastest(m, n, groups):
    config = choose_config(problem(m, n, 32768, ROW, jnp.float32, "k_grouped", num_groups=groups), 132)
    assert (config.tile_m, config.tile_n, config.multiply_scales) == (256, 104, True)


@pytest.mark.parametrize(
    "m, n, k, fastest",
    [  # the fastest, and those within 2 % of it, in benchmarks/results/few-rows-h100.json
        (16, 4096, 4096, [(16, 64, 8), (16, 64, 12)]),
        (32, 4096, 4096, [(32, 64, 8), (32, 64, 12), (64, 32, 12)]),
        (64, 4096, 7168, [(64, 32, 12)]),
        (128, 4096, 7168, [(64, 64, 12), (64, 64, 10)]),
        (64, 7168, 16384, [(64, 64, 8)]),
        (64, 24576, 1536, [(64, 64, 8), (64, 64, 12)]),
    ],
)
def test_few_rows_get_the_tiles_and_stages_that_were_fastest(m, n, k, fastest):
    config = choose_config(problem(m, n, k), 132)
    assert (config.tile_m, config.tile_n, config.stages) in fastest


@pytest.mark.parametrize(
    "m, n, k, fastest",
    [  # blocks that share out k: the fastest, and those within 3 % of it, in benchmarks/results/few-rows-h100.json
        (1, 576, 7168, [(64, 4), (64, 8)]),
        (16, 576, 7168, [(64, 4), (64, 8)]),
        (64, 576, 7168, [(64, 8)]),
        (16, 1536, 7168, [(64, 4)]),
        (64, 1536, 7168, [(64, 4)]),
        (1, 2112, 7168, [(64, 3), (128, 4)]),
        (64, 2112, 7168, [(64, 3)]),
        (128, 2112, 7168, [(32, 1)]),
        (16, 4096, 7168, [(64, 2)]),
        (64, 4096, 7168, [(32, 1)]),
        (96, 4096, 7168, [(32, 1)]),
        (128, 24576, 1536, [(64, 1), (128, 1)]),
    ],
)
def test_few_rows_get_as_many_blocks_for_k_as_were_fastest(m, n, k, fastest):
    config = choose_config(problem(m, n, k), 132)
    assert (config.tile_n, config.split_k) in fastest


@pytest.mark.parametrize("m", [1, 16, 64, 96, 128, 4096])
@pytest.mark.parametrize("rhs", [SQUARE, ROW])
@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_a_stage_is_freed_early_only_where_its_scales_were_read_before(m, rhs, kind):
    options = {"num_groups": 8, "expected_m": m} if kind == "masked" else {}
    described = problem(m, 4096, 2048, rhs, jnp.bfloat16, kind, **options)
    for config in candidates(described):
        reads_later = when_scales_are_read(described, config) in ("during", "after")
        assert frees_early(described, config) != reads_later, config
        if pairs_k_tiles(described, config):
            assert frees_early(described, config) and not takes_turns(described, config), config
