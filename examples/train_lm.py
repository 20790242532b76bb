"""Trains a small language model twice, in high precision and in FP8, and compares the two.

The text is the source code of the running Python's standard library, byte by byte, so there is nothing to
download. Both runs start from the same parameters and see the same batches.

    python examples/train_lm.py                        # minutes on two CPU cores
    python examples/train_lm.py --preset 100m          # about 100 M parameters: for a GPU
    python examples/train_lm.py --resume               # goes on where a killed run stopped, to the same bits
    python examples/train_lm.py --mesh fsdp=2,tp=4     # on eight devices

Several hosts: start this once on each, with the same flags and --coordinator HOST:PORT, --num-processes and
--process-id (--coordinator auto alone where a cluster's launcher tells, as Slurm's does), and --out on a file system
that all of them see. Checkpoints do not depend on the mesh: --resume goes on with another one.

Prints the final losses and their relative gap, and leaves `loss.png` and `metrics.json` in --out. Without --resume,
what an earlier run left there is removed before the first step. --resume is refused unless all settings are those of
--out's `settings.json`, so that only runs of equal settings are ever compared. To make them one by one: --only f32,
then --only fp8 --resume, then --resume alone.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

import jax
from lm.command import add_flags, compare, make_settings, transformer_fields
from lm.model import Transformer
from lm.placement import make_mesh, parse_mesh
from lm.training import Settings

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(steps=400, batch=16, seq=64, d_model=128, layers=2, heads=4, d_ff=512, lr=3e-3),
    "100m": dict(steps=2000, batch=16, seq=1024, d_model=768, layers=14, heads=12, d_ff=3072, lr=6e-4),
}


def make_parser() -> argparse.ArgumentParser:
    """The flags; a size that is not given comes from the preset."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_flags(parser, PRESETS, out="runs/train_lm")
    parser.add_argument("--mesh", type=parse_mesh, default="fsdp=1", help="devices, such as fsdp=2,tp=4; default: one")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    return parser


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes of a run on several hosts."""
    if arguments.coordinator == "auto":
        jax.distributed.initialize()
    elif arguments.coordinator is not None:
        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)


def make_model(settings: Settings, fp8: bool) -> Transformer:
    """The model of these settings; float32 parameters, computing in `settings.dtype`."""
    return Transformer(**transformer_fields(settings, fp8))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, writes; returns what metrics.json has."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.coordinator is None and (arguments.num_processes, arguments.process_id) != (None, None):
        parser.error("--num-processes and --process-id need --coordinator")
    join_processes(arguments)
    settings = make_settings(parser, arguments, PRESETS, Settings)
    try:
        mesh = make_mesh(arguments.mesh)
    except ValueError as error:
        parser.error(f"--mesh: {error}")
    return compare(arguments, settings, make_model, mesh)


if __name__ == "__main__":
    # A message of the C++ runtime in the middle of a progress bar helps nobody.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
