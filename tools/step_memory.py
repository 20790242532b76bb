#!/usr/bin/env python3
"""Prints what compiled training steps need beside their arguments and results, for an H200, without a GPU.

    python tools/step_memory.py                                       # a gated MLP, 4096 -> 14336 -> 4096, 8192 rows
    python tools/step_memory.py --rows 4096 --width 2048 --hidden 8192

XLA compiles the step ahead of time for a described chip (`jax.experimental.topologies`), and what is printed is its
`memory_analysis()`. Compiled on a GPU, `fp8_mlp` and `fp8_dot` layer by layer needed the same 1220 and 1018 MiB (H200,
benchmarks/results/mlp-h200.json). In bfloat16 XLA tunes its products on a GPU, and may need more or less.

Needs what `tools/spills.py` does: Python >= 3.12, jax >= 0.11.1, gcc and triton; the first run downloads jax's CUDA
plugin. This leans on private names of jax: expect to mend it after an upgrade.
"""

import argparse
import functools
import os
import pathlib
import subprocess
import sys

import spills

CHILD_VARIABLE = "JAXGEMM_STEP_MEMORY_CHILD"

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 149000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
"""What XLA must know of the chip (its `GpuTargetConfigProto`)."""


def child_environment() -> dict[str, str]:
    """That of `tools/spills.py`, and where XLA finds the library of device functions."""
    import triton

    environment = spills.child_environment()
    cuda = pathlib.Path(environment["CUDA_ROOT"])
    library = cuda / "nvvm" / "libdevice" / "libdevice.10.bc"
    library.parent.mkdir(parents=True, exist_ok=True)
    if not library.exists():
        library.symlink_to(pathlib.Path(triton.__file__).parent / "backends/nvidia/lib/libdevice.10.bc")
    dumps = [name for name in environment if name.startswith("MOSAIC_GPU_DUMP_")]
    environment = {name: value for name, value in environment.items() if name not in dumps}
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={cuda}"
    return dict(environment, XLA_FLAGS=flags, **{CHILD_VARIABLE: "1"})


def print_table(rows: int, width: int, hidden: int) -> None:
    """Compiles forward and backward of each kind of MLP, and prints a line for each."""
    plugin = pathlib.Path(os.environ["JAXGEMM_SPILLS_PLUGIN"]).parent.parent.parent
    sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(plugin)]
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import jaxgemm
    from jaxgemm.dot_vjp import RESIDUAL_NAMES

    chip = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=H200).devices[0]
    described = functools.partial(
        jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(chip)
    )
    x, gate_up, down = described((rows, width)), described((width, 2, hidden)), described((hidden, width))

    def fused(low_memory, x, gate_up, down):
        return jaxgemm.fp8_mlp(x, gate_up, down, low_memory=low_memory, implementation="mosaic")

    def in_turn(dot, x, gate_up, down):
        gate, up = jnp.split(dot(x, gate_up.reshape(width, 2 * hidden)), 2, -1)
        return dot(jax.nn.silu(gate) * up, down)

    def keeping(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return jax.checkpoint(functools.partial(fused, False), policy=policy)

    lhs, rhs, pre_activation = RESIDUAL_NAMES
    steps = {
        "`fp8_mlp`": functools.partial(fused, False),
        "`fp8_mlp`, `low_memory=True`": functools.partial(fused, True),
        f"`fp8_mlp`, without `{rhs}`": keeping(lhs, pre_activation),
        f"`fp8_mlp`, without `{lhs}` and `{rhs}`": keeping(pre_activation),
        "`fp8_dot`, layer by layer": functools.partial(
            in_turn, functools.partial(jaxgemm.fp8_dot, implementation="mosaic")
        ),
        "bfloat16, not tuned": functools.partial(in_turn, jnp.matmul),
    }
    print(f"| {rows} rows, {width} -> 2 x {hidden} -> {width} | MiB |\n|---|---:|")
    for name, mlp in steps.items():

        def step(x, gate_up, down, dout, mlp=mlp):
            out, pull_back = jax.vjp(mlp, x, gate_up, down)
            return out, pull_back(dout)

        lowered = jax.jit(step).trace(x, gate_up, down, x).lower(lowering_platforms=("cuda",))
        needed = lowered.compile().memory_analysis().temp_size_in_bytes
        print(f"| {name} | {needed / 2**20:.0f} |", flush=True)


def main() -> int:
    """Runs the tool; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="default: 8192")
    parser.add_argument("--width", type=int, default=4096, help="default: 4096")
    parser.add_argument("--hidden", type=int, default=14336, help="default: 14336")
    sizes = parser.parse_args()
    if CHILD_VARIABLE not in os.environ:
        return subprocess.run([sys.executable, *sys.argv], env=child_environment(), check=False).returncode
    print_table(sizes.rows, sizes.width, sizes.hidden)
    return 0


if __name__ == "__main__":
    sys.exit(main())
