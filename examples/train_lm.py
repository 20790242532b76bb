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

Prints the final losses and their relative gap, and leaves `loss.png` and `metrics.json` in --out. Without
--resume, what an earlier run left in --out is replaced.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
from lm import report
from lm.placement import make_mesh, parse_mesh
from lm.text import load_standard_library
from lm.training import Settings, train

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(steps=400, batch=16, seq=64, d_model=128, layers=2, heads=4, d_ff=512, lr=3e-3),
    "100m": dict(steps=2000, batch=16, seq=1024, d_model=768, layers=14, heads=12, d_ff=3072, lr=6e-4),
}
SHORT_NAMES = {"bfloat16": "bf16", "float32": "f32"}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a size that is not given comes from the preset."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="where sizes not given come from")
    for name in ("steps", "batch", "seq", "d-model", "layers", "heads", "d-ff"):
        parser.add_argument(f"--{name}", type=int, help=f"default: {PRESETS['demo'][name.replace('-', '_')]}")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=SHORT_NAMES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: bfloat16 on a GPU")
    parser.add_argument("--only", choices=("fp8", *SHORT_NAMES.values()), help="run one of the two")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"))
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=int, metavar="STEPS", help="default: a fifth of all steps")
    parser.add_argument("--mesh", type=parse_mesh, default="fsdp=1", help="devices, such as fsdp=2,tp=4; default: one")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    arguments = parser.parse_args(argv)
    if arguments.coordinator is None and (arguments.num_processes, arguments.process_id) != (None, None):
        parser.error("--num-processes and --process-id need --coordinator")
    return arguments


def make_settings(arguments: argparse.Namespace) -> Settings:
    """Fills in what was not given."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    values = {**PRESETS[arguments.preset], **given}
    if "dtype" not in given:
        by_name = {short: dtype for dtype, short in SHORT_NAMES.items()}
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        values["dtype"] = by_name.get(arguments.only, default)
    values.setdefault("evaluate_every", max(values["steps"] // 5, 1))
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    if arguments.only not in (None, "fp8", SHORT_NAMES[settings.dtype]):
        sys.exit(f"--only {arguments.only} and --dtype {settings.dtype} do not go together")
    if settings.d_model % settings.heads:
        sys.exit(f"--d-model must be a multiple of --heads, got {settings.d_model} and {settings.heads}")
    return settings


def open_directory(directory: Path, settings: Settings, resume: bool) -> None:
    """Makes the output directory, and refuses to go on with a run that had other settings."""
    path = directory / "settings.json"
    if resume and path.exists():
        earlier, now = json.loads(path.read_text()), asdict(settings)
        changed = [f"{key} was {earlier.get(key)}, is {now[key]}" for key in now if earlier.get(key) != now[key]]
        if changed:
            sys.exit(f"--resume needs the settings that {directory} was started with: {'; '.join(changed)}")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(settings), indent=1) + "\n")


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes of a run on several hosts."""
    if arguments.coordinator == "auto":
        jax.distributed.initialize()
    elif arguments.coordinator is not None:
        jax.distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, writes; returns what metrics.json has."""
    arguments = parse_arguments(argv)
    join_processes(arguments)
    settings = make_settings(arguments)
    try:
        mesh = make_mesh(arguments.mesh)
    except ValueError as error:
        sys.exit(f"--mesh: {error}")
    if jax.process_index() == 0:
        open_directory(arguments.out, settings, arguments.resume)
    texts = load_standard_library()

    runs = []
    for name in (SHORT_NAMES[settings.dtype], "fp8"):
        if arguments.only in (None, name):
            directory = arguments.out / f"checkpoints_{name}"
            runs.append(train(name, settings, texts, directory, mesh, fp8=name == "fp8", resume=arguments.resume))

    metrics = report.collect(settings, texts, runs)
    if jax.process_index() > 0:
        return metrics
    report.write_metrics(metrics, arguments.out / "metrics.json")
    report.plot(metrics, arguments.out / "loss.png")
    report.print_table(metrics)
    print(f"\nWrote {arguments.out / 'loss.png'} and {arguments.out / 'metrics.json'}")
    return metrics


if __name__ == "__main__":
    # A message of the C++ runtime in the middle of a progress bar helps nobody.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
