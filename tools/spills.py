#!/usr/bin/env python3
"""Compiles the Hopper kernels without a GPU and fails if one spills registers, serialises wgmma, or promotes with all
operands from one bank of the register file.

    python tools/spills.py              # every configuration of the table, and those chosen for typical problems
    python tools/spills.py --keep DIR   # and keep PTX, the assembler's log and SASS in DIR

Needs Python >= 3.12, jax >= 0.11.1, gcc, and triton (for its ptxas and nvdisasm). Each kernel is lowered for CUDA and
compiled by the compiler inside jax's own CUDA plugin, which is loaded over a stub of the CUDA driver; the first run
downloads the plugin of the same version (150 MB) into a cache folder. What is printed of each kernel: registers,
spilled bytes, warnings, and the instructions of its main loop. This leans on private names of jax: expect to mend it
after an upgrade.
"""

import argparse
import collections
import ctypes
import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

CHILD_VARIABLE = "JAXGEMM_SPILLS_CHILD"
"""Set in the processes that compile, to the number of their share."""

NUM_PROCESSES = 2

MOST_FROM_ONE_BANK = 0.1
"""Share of a main loop's FFMA that may have all operands in one bank: the assembler leaves one or two in some loops."""

DRIVER_STUB = """
int cuInit(unsigned flags) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "stub"; return 0; }
int cuGetErrorName(int code, const char **text) { *text = "stub"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetCurrent(void **context) { *context = 0; return 100; }
int cuModuleLoadData(void **module, const void *image) { *module = 0; return 100; }
"""
"""What Mosaic asks of the driver: it sees a chip of capability 9.0, and no module can be loaded."""

TYPICAL = [
    (4096, 4096, 7168), (4096, 7168, 16384), (4096, 24576, 1536), (4096, 2112, 7168), (4096, 7168, 2048),
    (4096, 32768, 512), (4096, 576, 7168), (8192, 8192, 8192), (4097, 4100, 7100), (8193, 577, 7168),
    (4096, 4090, 7168), (8192, 8190, 8192),
    (300, 500, 700), (7, 7, 7),
    (1, 4096, 7168), (16, 24576, 1536), (64, 7168, 16384), (128, 4096, 7168), (192, 4096, 7168),
    (16, 576, 7168), (64, 2112, 7168), (96, 4096, 7168),
]  # fmt: skip


GROUPS = [  # kind, m, n, k, groups, expected_m
    ("grouped", 32768, 6144, 7168, 8, None), ("grouped", 2048, 4096, 2048, 16, None),
    ("grouped", 100, 4100, 2048, 64, None), ("grouped", 32768, 6142, 7168, 8, None),
    ("masked", 256, 6144, 7168, 32, 192), ("masked", 1344, 7168, 3072, 6, 1024), ("masked", 64, 4096, 4096, 32, 20),
    ("k_grouped", 4096, 7168, 33280, 4, None), ("k_grouped", 7168, 2048, 34816, 16, None),
    ("k_masked", 4096, 7168, 1024, 8, None),
]  # fmt: skip


def cases() -> dict[str, tuple]:
    """Name, problem and configuration of every kernel to check; each distinct kernel once.

    What stores rows that TMA cannot address differs by their length.
    """
    import jax.numpy as jnp
    import numpy as np

    from jaxgemm.problem import GemmProblem
    from jaxgemm.tiles import shipped_choice
    from jaxgemm.tuned_rows import shipped_tables

    row, square = (1, 128), (128, 128)
    e4m3, bf16, f32 = (np.dtype(d) for d in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32))
    shapes = [(*dims, row, rhs, f32 if rhs == row else bf16, None) for dims in TYPICAL for rhs in (square, row)]
    for table in shipped_tables():
        for key in table.rows:
            if key.kind == "dense":
                blocks = [(rows, 128) for rows in (key.lhs_block_rows, key.rhs_block_rows)]
                out = {2: bf16, 4: f32}[key.out_bytes]
                shapes.append((key.m, key.n, key.k, *blocks, out, table.device))
    found, seen = {}, set()
    for m, n, k, lhs_block, rhs_block, out, device in shapes:
        for bias, activation in ((False, None), (True, "gelu")):
            problem = GemmProblem(
                "dense", m, n, k, e4m3, e4m3, lhs_block, rhs_block, out, has_bias=bias, activation=activation
            )
            config = shipped_choice(problem, 132, device).config
            kernel = (config, lhs_block, rhs_block, out, bias, config.masked_store and n)
            if kernel not in seen:
                seen.add(kernel)
                name = f"{m}x{n}x{k} {'wgrad' if rhs_block == row else 'fprop'}{' bias' if bias else ''}"
                found[f"{name} {config.tile_m}x{config.tile_n}"] = problem, config
    for kind, m, n, k, groups, expected_m in GROUPS:
        wgrad = kind in ("k_grouped", "k_masked")
        for fill, has_bias in (("zero", not wgrad),) if kind != "masked" else (("zero", True), ("unspecified", False)):
            problem = GemmProblem(
                kind, m, n, k, e4m3, e4m3, row, row if wgrad else square, f32 if wgrad else bf16, num_groups=groups,
                has_bias=has_bias, expected_m=expected_m, fill=fill,
                segment_alignment=128 if kind == "k_grouped" else 1,
            )  # fmt: skip
            found[f"{kind} {groups} of {m}x{n}x{k} {fill if kind == 'masked' else ''}"] = (
                problem,
                shipped_choice(problem, 132, None).config,
            )
    return found


def lower(problem, config) -> list[bytes]:
    """Lowers one kernel for CUDA and returns its Mosaic modules."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.mosaic.gpu import core

    from jaxgemm.kernels.hopper_gemm import hopper_gemm
    from jaxgemm.problem import stored_operands

    dense = problem.kind == "dense"
    bias_shape = (problem.n,) if dense else (problem.num_groups, problem.n)
    bias = jax.ShapeDtypeStruct(bias_shape, jnp.float32) if problem.has_bias else None
    sizes = None if dense else jax.ShapeDtypeStruct((problem.num_groups,), jnp.int32)
    core.KNOWN_KERNELS.clear()
    kernel = functools.partial(hopper_gemm, problem=problem, config=config, num_sms=132)
    jax.jit(kernel).trace(*stored_operands(problem), bias, sizes).lower(lowering_platforms=("cuda",))
    return list(core.KNOWN_KERNELS.values())


def quantize_cases() -> dict[str, tuple]:
    """Name, problem and shapes of the quantising kernels that hold the most numbers at once."""
    import jax.numpy as jnp
    import numpy as np

    from jaxgemm.elementwise import FUNCTIONS
    from jaxgemm.problem import QuantizeProblem

    e4m3 = np.dtype(jnp.float8_e4m3fn)
    rows, joined = (8192, 14336), (8192, 2 * 14336)
    found = {
        "quantize both, sum": (QuantizeProblem((1, 128), e4m3, transposed=True, column_sum=True), [rows]),
        "quantize weight": (QuantizeProblem((128, 128), e4m3, transposed=True), [rows]),
    }
    for function, description in FUNCTIONS.items():
        is_joined = "_gate" in function
        options = {"transposed": description.has_hidden, "joined": is_joined, "hidden": description.has_hidden}
        shapes = [rows] * (description.num_inputs - 2 * is_joined) + [joined] * is_joined
        found[f"quantize {function}"] = QuantizeProblem((1, 128), e4m3, function=function, **options), shapes
        if description.has_hidden:
            options["natural"] = False
            found[f"quantize {function}, transposed"] = (
                QuantizeProblem((1, 128), e4m3, function=function, **options),
                shapes,
            )
    return found


def lower_quantize(problem, shapes) -> list[bytes]:
    """Lowers one quantising kernel for CUDA and returns its Mosaic modules."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.mosaic.gpu import core

    from jaxgemm.kernels.hopper_quantize import default_config, hopper_quantize

    core.KNOWN_KERNELS.clear()
    config = default_config(problem, jnp.bfloat16)
    kernel = functools.partial(hopper_quantize, problem=problem, config=config, num_sms=132)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    jax.jit(kernel).trace(*inputs).lower(lowering_platforms=("cuda",))
    return list(core.KNOWN_KERNELS.values())


def compile_dump(modules: list[bytes], folder: pathlib.Path) -> None:
    """Compiles Mosaic modules; PTX, log and SASS are dumped to a folder before the stub refuses to load them."""
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    compile_kernel = ctypes.CDLL(os.environ["JAXGEMM_SPILLS_PLUGIN"]).MosaicGpuCompile
    compile_kernel.argtypes, compile_kernel.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for module in modules:
        compile_kernel(module, len(module))


def loops(sass: str) -> Iterator[list[str]]:
    """The instructions of each loop of a listing; a loop ends in a backward branch."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    pending = None
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            pending = label.group(1)
        if instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);?\s*(?:/\*|$)", line):
            if pending:
                labels[pending], pending = len(instructions), None
            instructions.append(re.sub(r"^@!?\S+\s+", "", instruction.group(1)))
    for end, text in enumerate(instructions):
        branch = re.search(r"BRA.*?`\(\.(L_x_\d+)\)", text)
        if branch and labels.get(branch.group(1), end + 1) <= end:
            yield instructions[labels[branch.group(1)] : end + 1]


def opcodes(instructions: list[str]) -> collections.Counter:
    """How many of each kind there are."""
    return collections.Counter(i.split()[0].split(".")[0] for i in instructions)


def from_one_bank(instructions: list[str]) -> int:
    """Counts the FFMA whose three operands have odd numbers, or even ones: registers of one of two banks.

    Where half of them did, tiles of 192x128 took 4 % longer on an H100 (docs/kernel-notes.md).
    """
    operands = (re.match(r"FFMA R\d+, R(\d+)\S*, R(\d+)\S*, R(\d+)", i) for i in instructions)
    return sum(len({int(register) % 2 for register in found.groups()}) == 1 for found in operands if found)


def report(name: str, folder: pathlib.Path, multiplies: bool = True) -> bool:
    """Prints what the assembler said of one kernel; returns whether it is sound."""
    log = "\n".join(path.read_text() for path in sorted(folder.glob("*.ptxas")))
    registers = re.search(r"Used (\d+) registers", log)
    spilled = max((int(n) for n in re.findall(r"(\d+) bytes spill", log)), default=0)
    bodies = [body for path in folder.glob("*sass*") for body in loops(path.read_text())]
    main_loop = min((body for body in bodies if opcodes(body)["QGMMA"]), key=len, default=[])
    mix, conflicts = opcodes(main_loop), from_one_bank(main_loop)
    problems = [] if registers else ["not compiled"]
    if multiplies and not main_loop:
        problems.append("no FP8 tensor core instruction in a loop")
    if spilled:
        problems.append(f"{spilled} bytes spilled")
    if "C7514" in log:
        problems.append("wgmma serialised (C7514)")
    if conflicts > MOST_FROM_ONE_BANK * mix["FFMA"]:
        problems.append(f"operands of {conflicts} FFMA come from one bank")
    counts = ", ".join(f"{mix[op]} {op}" for op in ("QGMMA", "FFMA", "FMUL", "LDS"))
    verdict = "FAILED: " + "; ".join(problems) if problems else "ok"
    used = registers.group(1) if registers else "?"
    loop = f", loop of {mix.total()}: {counts}" if multiplies else ""
    print(f"{name:46} {used:>4} registers{loop}: {verdict}")
    return not problems


def child_environment() -> dict[str, str]:
    """Fetches the plugin, builds the stub driver and a CUDA root; returns the environment to compile in."""
    import jax
    import triton

    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
    root = cache / "jaxgemm-spills" / jax.__version__
    plugin, stub, cuda = root / "plugin", root / "stub", root / "cuda"
    if not (plugin / "jax_plugins").is_dir():
        packages = [f"jax-cuda13-pjrt=={jax.__version__}", f"jax-cuda13-plugin=={jax.__version__}"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(plugin), *packages]
        subprocess.run(command, check=True)
    if not (stub / "libcuda.so.1").exists():
        stub.mkdir(parents=True, exist_ok=True)
        (stub / "driver.c").write_text(DRIVER_STUB)
        command = ["gcc", "-shared", "-fPIC", "-o", str(stub / "libcuda.so.1"), str(stub / "driver.c")]
        subprocess.run(command, check=True)
    (cuda / "bin").mkdir(parents=True, exist_ok=True)
    for tool in (pathlib.Path(triton.__file__).parent / "backends/nvidia/bin").iterdir():
        if tool.is_file() and not (cuda / "bin" / tool.name).exists():
            (cuda / "bin" / tool.name).symlink_to(tool)
    return dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        LD_LIBRARY_PATH=str(stub),
        MOSAIC_GPU_CUDA_ROOT=str(cuda),
        CUDA_ROOT=str(cuda),
        PATH=f"{cuda}/bin:{os.environ['PATH']}",
        JAXGEMM_SPILLS_PLUGIN=str(next(plugin.glob("jax_plugins/xla_cuda13/xla_cuda_plugin.so"))),
        MOSAIC_GPU_RUNTIME_LIB_PATH=str(next(plugin.glob("jax_cuda13_plugin/libmosaic_gpu_runtime.so"))),
        MOSAIC_GPU_DUMP_PTX="1",
        MOSAIC_GPU_DUMP_PTXAS="1",
        MOSAIC_GPU_DUMP_SASS="1",
    )


def main() -> int:
    """Runs the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=pathlib.Path, help="folder for PTX, the assembler's log and SASS")
    arguments = parser.parse_args()
    if CHILD_VARIABLE not in os.environ:
        environment = child_environment()
        shares = [dict(environment, **{CHILD_VARIABLE: str(share)}) for share in range(NUM_PROCESSES)]
        children = [subprocess.Popen([sys.executable, *sys.argv], env=share) for share in shares]
        return max([child.wait() for child in children])
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    sound = True
    with tempfile.TemporaryDirectory() as temporary:
        kernels = [(name, lower, case, True) for name, case in cases().items()]
        kernels += [(name, lower_quantize, case, False) for name, case in quantize_cases().items()]
        for index, (name, lower_kernel, case, multiplies) in enumerate(kernels):
            if index % NUM_PROCESSES != int(os.environ[CHILD_VARIABLE]):
                continue
            folder = (arguments.keep or pathlib.Path(temporary)) / f"{index:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            compile_dump(lower_kernel(*case), folder)
            sound &= report(name, folder, multiplies)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
