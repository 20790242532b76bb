"""The Triton kernel without a GPU: run by Triton's interpreter, and compiled for several chips."""

import collections
import os
import pathlib
import re
import subprocess
import sys

import pytest
from kernel_support import BF16, E4M3, E5M2, F32, ROW, SQUARE

from jaxgemm.problem import GemmProblem
from jaxgemm.triton_tuning import candidates, choose_config, shared_memory_bytes

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from jaxgemm.kernels.triton_gemm import constants, fp8_gemm_triton  # noqa: E402

HERE = pathlib.Path(__file__).parent
TRITON_TYPES = {E4M3: "*fp8e4nv", E5M2: "*fp8e5"}
TENSOR_CORE = re.compile(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\.\S*")


def test_interpreted():
    """Every test of `triton_interpreted.py`, in a process that Triton interprets kernels in."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0 and re.search(r"\b[1-9]\d+ passed", result.stdout), result.stdout + result.stderr


def problem(m=4096, n=4096, k=7168, rhs=SQUARE, lhs_dtype=E4M3, rhs_dtype=E4M3, bias=False, activation=None):
    out = F32 if rhs == ROW else BF16
    return GemmProblem("dense", m, n, k, lhs_dtype, rhs_dtype, ROW, rhs, out, has_bias=bias, activation=activation)


Compiled = collections.namedtuple("Compiled", "tensor_core, additions, shared_memory, registers, spilled")
"""Kinds of tensor-core instructions, float32 additions not fused, bytes of shared memory, registers, spilled bytes."""


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles the kernel to the chip's machine code, with Triton's own compiler and assembler."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))

    def compile_for(capability, problem, config):
        fixed = constants(problem, config)
        values = [TRITON_TYPES[dtype] for dtype in (problem.lhs_dtype, problem.rhs_dtype)]
        lhs, rhs = ["*u8"] * 2 if config.widen else values
        out = "*bf16" if problem.out_dtype == BF16 else "*fp32"
        pointers = [lhs, "*fp32", rhs, "*fp32", "*fp32", out]
        signature = dict(zip(fp8_gemm_triton.arg_names, [*pointers, *["constexpr"] * len(fixed)], strict=True))
        aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(pointers))}
        kernel = triton.compile(
            ASTSource(fp8_gemm_triton, signature, fixed, aligned),
            target=GPUTarget("cuda", capability, 32),
            options=dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True),
        )
        ptx = kernel.asm["ptx"]
        (tmp_path / "kernel.ptx").write_text(ptx)
        instructions = {match.group() for match in TENSOR_CORE.finditer(ptx)}
        additions = re.findall(r"\badd(?:\.\w+)*\.f32", ptx)
        return Compiled(instructions, additions, kernel.metadata.shared, *assemble(tmp_path / "kernel.ptx", capability))

    return compile_for


def assemble(source, capability):
    """Returns the registers a thread and the spilled bytes that the assembler reports."""
    [chip] = re.findall(r"^\.target (\w+)", source.read_text(), re.MULTILINE)
    command = [
        get_ptxas(capability).path,
        "-v",
        f"--gpu-name={chip}",
        str(source),
        "-o",
        str(source.with_suffix(".cubin")),
    ]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "C7510" not in log and "C7514" not in log, log  # products of a warpgroup, serialised
    return int(re.search(r"Used (\d+) registers", log)[1]), sum(map(int, re.findall(r"(\d+) bytes spill", log)))


NATIVE = {
    89: {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"},
    90: {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"},
    120: {"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"},
}
HALF = {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"}


@pytest.mark.parametrize("rhs", [SQUARE, ROW], ids=["fprop", "wgrad"])
@pytest.mark.parametrize("capability", [80, 89, 90, 120])
def test_multiplies_in_fp8_where_the_chip_can(compiled, capability, rhs):
    """And in float16 where it cannot. Promoting is fused, nothing spills, shared memory is what was counted on."""
    described = problem(rhs=rhs)
    config = choose_config(described, capability, num_sms=132)
    result = compiled(capability, described, config)
    assert result.tensor_core == NATIVE.get(capability, HALF)
    assert not result.additions and result.spilled == 0
    assert 0 <= shared_memory_bytes(config, capability) - result.shared_memory <= 1024


@pytest.mark.parametrize("lhs_dtype, rhs_dtype", [(E5M2, E4M3), (E4M3, E5M2)], ids=["e5m2 lhs", "e5m2 rhs"])
@pytest.mark.parametrize("capability", [89, 90])
def test_mixed_formats_multiply_in_fp8(compiled, capability, lhs_dtype, rhs_dtype):
    described = problem(m=64, lhs_dtype=lhs_dtype, rhs_dtype=rhs_dtype)
    result = compiled(capability, described, choose_config(described, capability, num_sms=132))
    formats = ".".join("e4m3" if dtype == E4M3 else "e5m2" for dtype in (lhs_dtype, rhs_dtype))
    [instruction] = result.tensor_core
    assert formats in instruction and result.spilled == 0


@pytest.mark.parametrize("rhs", [SQUARE, ROW], ids=["fprop", "wgrad"])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_tile_spills(compiled, capability, rhs):
    """Where registers are scarcest: the chip that widens, and the one with most of them taken by addresses."""
    described = problem(4097, 4100, 7100, rhs=rhs, bias=True, activation="gelu")
    for config in candidates(described, capability):
        result = compiled(capability, described, config)
        assert result.spilled == 0, (config, result)
        assert result.shared_memory <= shared_memory_bytes(config, capability), (config, result)
