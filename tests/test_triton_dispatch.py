"""When the Triton kernel is taken, and why not; and its tiles. Needs neither Triton nor a GPU."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROW, SQUARE

import jaxgemm
from jaxgemm import dispatch
from jaxgemm.problem import GemmProblem, QuantizeProblem
from jaxgemm.triton_tuning import (
    TILES,
    TritonConfig,
    available_shared_memory,
    candidates,
    choose_config,
    shared_memory_bytes,
    why_invalid,
)

E4M3, BF16 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16)
DENSE = GemmProblem("dense", 4096, 4096, 7168, E4M3, E4M3, ROW, SQUARE, BF16)
CAPABILITIES = [80, 86, 89, 90, 100, 120, 121]


@pytest.fixture
def machine(monkeypatch):
    """Sets what the GPU is, and what is missing."""
    dispatch._warn_once.cache_clear()

    def pretend(capability, missing=None):
        monkeypatch.setattr(dispatch, "cuda_capability", lambda: capability)
        monkeypatch.setattr(dispatch, "why_triton_is_missing", lambda: missing)

    return pretend


@pytest.mark.parametrize("capability", ["8.0", "8.9", "12.0"])
def test_it_is_taken_on_chips_other_than_hopper(machine, capability, caplog):
    machine(capability)
    with caplog.at_level(logging.WARNING, "jaxgemm"):
        assert dispatch.choose(DENSE, "cuda", None) == "triton"
    assert any("not served by 'mosaic'" in r.message for r in caplog.records)
    machine(capability, missing="it needs jax_triton")
    assert dispatch.choose(DENSE, "cuda", None) == "xla"


@pytest.mark.skipif(jax.__version_info__ < dispatch.OLDEST_JAX_OF_KERNELS, reason="the Hopper kernel needs jax 0.11.1")
@pytest.mark.parametrize("capability", ["9.0", None])
def test_hopper_has_its_own_kernel(machine, capability):
    machine(capability)
    assert dispatch.choose(DENSE, "cuda", None) == "mosaic"
    assert dispatch.choose(DENSE, "cuda", "triton") == "triton"


@pytest.mark.parametrize(
    "changes, capability, missing, platform, message",
    [
        ({}, "8.9", None, "cpu", "it needs an NVIDIA GPU, and this program is lowered for cpu"),
        ({}, "7.5", None, "cuda", "compute capability 8.0 or newer, and this one has 7.5"),
        ({}, "8.9", "it needs jax_triton", "cuda", "it needs jax_triton"),
        ({"kind": "grouped", "num_groups": 3}, "8.9", None, "cuda", "dense operands alone, and these are grouped"),
        ({"kind": "masked", "num_groups": 3}, "8.9", None, "cuda", "dense operands alone, and these are masked"),
        ({"kind": "k_grouped", "num_groups": 3}, "8.9", None, "cuda", "dense operands alone, and these are k_grouped"),
        ({"lhs_block_shape": (1, 64)}, "8.9", None, "cuda", r"lhs must have blocks of .*, and has \(1, 64\)"),
        ({"rhs_block_shape": (64, 64)}, "8.9", None, "cuda", r"rhs must have blocks of .*, and has \(64, 64\)"),
    ],
)
def test_refusals_say_why(machine, changes, capability, missing, platform, message):
    machine(capability, missing)
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot serve this call: .*" + message):
        dispatch.choose(dataclasses.replace(DENSE, **changes), platform, "triton")


def test_explain_tells_its_tile(machine):
    machine("8.9")
    x, w = (jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16) for _ in range(2))
    dot = functools.partial(jaxgemm.fp8_dot, implementation="triton")
    found = jaxgemm.explain(dot, x, w, platform="cuda").problems
    assert [problem.implementation for problem in found] == ["xla", "xla", "triton"]
    assert found[-1].config == TILES[0] and found[-1].config_source == "model"
    assert "tile_m=128, tile_n=128, num_warps=8, num_stages=4 (model)" in str(found[-1])


def test_it_does_not_quantise(machine):
    machine("8.9")
    with pytest.raises(NotImplementedError, match="it multiplies, and does not quantise"):
        dispatch.choose(QuantizeProblem(ROW, E4M3), "cuda", "triton")


def test_what_is_not_installed_is_named(monkeypatch):
    """Which depends on this machine; a package that does not exist is missing on all."""
    find = dispatch.importlib.util.find_spec
    monkeypatch.setattr(
        dispatch.importlib.util, "find_spec", lambda name: None if name in ("triton", "jax_triton") else find(name)
    )
    reason = dispatch.why_triton_is_missing.__wrapped__()
    assert reason == "it needs triton and jax_triton, not installed here: pip install 'jaxgemm[cuda]'"


def test_falling_back_names_both_kernels_once(machine, caplog):
    machine("8.9", "it needs jax_triton")
    with caplog.at_level(logging.WARNING, "jaxgemm"):
        for m in (1, 2):
            assert dispatch.choose(dataclasses.replace(DENSE, m=m), "cuda", None) == "xla"
    mosaic, triton = (record.message for record in caplog.records)
    assert "not served by 'mosaic'" in mosaic
    assert "not served by 'triton': it needs jax_triton" in triton


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_shape_has_a_valid_tile(capability):
    for m, n, k, rhs in [(1, 1, 1, SQUARE), (7, 4096, 7168, SQUARE), (4096, 4096, 4096, ROW), (65, 129, 300, ROW)]:
        problem = dataclasses.replace(DENSE, m=m, n=n, k=k, rhs_block_shape=rhs)
        config = choose_config(problem, capability, 100)
        assert why_invalid(problem, config, capability) is None
        assert shared_memory_bytes(config, capability) <= available_shared_memory(capability)
        assert config.widen == (capability < 89)


def test_tiles_shrink_with_the_output():
    def tile(m, n, capability=89):
        config = choose_config(dataclasses.replace(DENSE, m=m, n=n), capability, 132)
        return config.tile_m, config.tile_n

    assert tile(4096, 4096) == (128, 128)
    assert tile(1, 4096) == (16, 32)
    assert tile(1, 4096, 90) == (64, 32)  # four warps multiply at least 64 rows at once
    assert {tile(m, 4096) for m in range(1, 4096, 40)} <= {(c.tile_m, c.tile_n) for c in TILES}


@pytest.mark.parametrize(
    "problem, config, capability, message",
    [
        ({"kind": "masked"}, TILES[0], 90, "dense operands alone"),
        ({"m": 0}, TILES[0], 90, "must be positive"),
        ({"lhs_block_shape": (1, 32)}, TILES[0], 90, r"blocks must be \(1, 128\) or \(128, 128\)"),
        ({}, TILES[0], 75, "needs compute capability 8.0 or newer, got 7.5"),
        ({}, TILES[0], 80, "widened where capability is below 8.9, got widen=False for 8.0"),
        ({}, TritonConfig(32, 64, 4, 4), 90, "tile_m must be a power of two from 64 to 128, got 32"),
        ({}, TritonConfig(96, 64, 4, 4), 89, "tile_m must be a power of two from 16 to 128, got 96"),
        ({}, TritonConfig(64, 256, 4, 4), 89, "tile_n must be a power of two from 16 to 128, got 256"),
        ({}, TritonConfig(64, 64, 3, 4), 89, "4 or 8 warps"),
        ({}, TritonConfig(128, 128, 4, 3), 90, "do not fit in the registers of 4 warps"),
        ({"rhs_block_shape": ROW}, TILES[0], 90, "columns' scales do not fit"),
        ({}, TritonConfig(128, 128, 8, 5), 89, "it needs 132096 bytes of shared memory, a block has 101376"),
    ],
)
def test_invalid_configurations_say_why(problem, config, capability, message):
    reason = why_invalid(dataclasses.replace(DENSE, **problem), config, capability)
    assert reason is not None and re.search(message, reason)


def test_candidates_are_none_where_nothing_is_valid():
    grouped = dataclasses.replace(DENSE, kind="grouped")
    assert not list(candidates(grouped, 89))
    with pytest.raises(ValueError, match="no configuration of the Triton kernel serves"):
        choose_config(grouped, 89, 132)
