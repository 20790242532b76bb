"""What the commands that train a language model share: flags, settings, and the comparison of two runs."""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flags import folder, non_negative_int, positive_int
from flax import linen as nn
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lm import report
from lm.text import load_standard_library
from lm.training import Settings, train

SHORT_NAMES = {"bfloat16": "bf16", "float32": "f32"}
SettingsType = TypeVar("SettingsType", bound=Settings)
Presets = Mapping[str, Mapping[str, Any]]


def add_flags(parser: argparse.ArgumentParser, presets: Presets, out: str) -> None:
    """Adds the flags of every training command; a whole number of a preset becomes a flag of its own."""
    parser.add_argument("--preset", choices=presets, default="demo", help="where sizes not given come from")
    for name, value in presets["demo"].items():
        if isinstance(value, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=positive_int, help=f"default: {value}")
    parser.add_argument("--lr", type=float, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=SHORT_NAMES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: bfloat16 on a GPU")
    parser.add_argument("--only", choices=("fp8", *SHORT_NAMES.values()), help="run one of the two")
    parser.add_argument("--out", type=folder, default=Path(out))
    parser.add_argument("--checkpoint-every", type=non_negative_int, metavar="STEPS", help="default: 100; 0: never")
    parser.add_argument("--evaluate-every", type=positive_int, metavar="STEPS", help="default: a fifth of all steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")


def make_settings(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, presets: Presets, settings_type: type[SettingsType]
) -> SettingsType:
    """Fills in what was not given; flags that do not go together end the command."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    values = {**presets[arguments.preset], **given}
    if "dtype" not in given:
        by_name = {short: dtype for dtype, short in SHORT_NAMES.items()}
        default = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        values["dtype"] = by_name.get(arguments.only, default)
    values.setdefault("checkpoint_every", 100)
    values.setdefault("evaluate_every", max(values["steps"] // 5, 1))
    settings = settings_type(**{field.name: values[field.name] for field in fields(settings_type)})
    if arguments.only not in (None, "fp8", SHORT_NAMES[settings.dtype]):
        parser.error(f"--only {arguments.only} and --dtype {settings.dtype} do not go together")
    if settings.d_model % (2 * settings.heads):  # a rotary embedding turns pairs of a head's features
        multiple = f"2 * --heads = {2 * settings.heads}"
        parser.error(f"--d-model must be a multiple of {multiple}, got {settings.d_model}")
    place = f"{settings.dtype} on a {jax.default_backend()}"
    if settings.attention == "cudnn" and place != "bfloat16 on a gpu":
        parser.error(f"--attention cudnn must compute in bfloat16 on a gpu, got {place}; xla takes all")
    return settings


def transformer_fields(settings: Settings, fp8: bool) -> dict[str, Any]:
    """The fields of `Transformer` by these settings."""
    return dict(
        num_layers=settings.layers,
        num_heads=settings.heads,
        d_model=settings.d_model,
        d_ff=settings.d_ff,
        dtype=jnp.dtype(settings.dtype),
        attention=settings.attention,
        fp8=fp8,
    )


def compare(
    arguments: argparse.Namespace,
    settings: SettingsType,
    make_model: Callable[[SettingsType, bool], nn.Module],
    mesh: Mesh,
) -> dict[str, Any]:
    """Trains in high precision and in FP8, prints, writes.

    Args:
        arguments: `out`, `only` and `resume` of the flags.
        settings: Of both runs.
        make_model: `(settings, fp8)` to a model; equal parameters whether FP8 or not.
        mesh: The devices.

    Returns:
        What `metrics.json` has.
    """
    _open_directory(arguments.out, settings, arguments.resume)
    texts = load_standard_library()

    runs, metrics = [], {}
    for name in (SHORT_NAMES[settings.dtype], "fp8"):
        if arguments.only in (None, name):
            directory = arguments.out / f"checkpoints_{name}"
            model = make_model(settings, name == "fp8")
            runs.append(train(name, settings, model, texts, directory, mesh))
            metrics = report.collect(settings, texts, runs)
            if jax.process_index() == 0:  # after each run, so that a kill in the second one loses nothing of the first
                report.write_metrics(metrics, arguments.out / "metrics.json")

    if jax.process_index() == 0:
        report.plot(metrics, arguments.out / "loss.png")
        report.print_table(metrics)
        print(f"\nWrote {arguments.out / 'loss.png'} and {arguments.out / 'metrics.json'}")
    return metrics


def _open_directory(directory: Path, settings: Settings, resume: bool) -> None:
    """Makes the output directory one whose every run is of these settings, or ends the command.

    All processes call this: each looks, one writes, and the others wait for it.
    """
    path = directory / "settings.json"
    checkpoints = [directory / f"checkpoints_{name}" for name in (*SHORT_NAMES.values(), "fp8")]
    if resume:
        _refuse_other_settings(path, settings, checkpoints)
    if jax.process_index() == 0 and not (resume and path.exists()):
        # NOTE: The old settings go first and the new ones come last, at once, so that wherever this is killed, no
        # checkpoint lies beside settings that are not its own.
        directory.mkdir(parents=True, exist_ok=True)
        for old in (path, directory / "metrics.json", directory / "loss.png"):
            old.unlink(missing_ok=True)
        for old in filter(Path.exists, checkpoints):
            shutil.rmtree(old)
        partial = directory / "settings.json.partial"
        partial.write_text(json.dumps(asdict(settings), indent=1) + "\n")
        partial.replace(path)
    multihost_utils.sync_global_devices(f"opened {directory.name}")


def _refuse_other_settings(path: Path, settings: Settings, checkpoints: list[Path]) -> None:
    """Ends a command that would go on with checkpoints of other settings, or of nobody knows which."""
    if path.exists():
        earlier, now = json.loads(path.read_text()), asdict(settings)
        pairs = {key: (earlier.get(key, "absent"), now.get(key, "absent")) for key in {**now, **earlier}}
        changed = [f"{key} was {was}, is {value}" for key, (was, value) in pairs.items() if was != value]
        if changed:
            sys.exit(f"--resume needs the settings that {path.parent} was started with: {'; '.join(changed)}")
    elif any(directory.exists() for directory in checkpoints):
        sys.exit(f"--resume needs {path}, which says what the checkpoints beside it are of; it is not there")
