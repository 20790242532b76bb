"""What `train_lm.py` shows: a table, `metrics.json` and `loss.png`."""

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

import jaxgemm
from lm.text import Text
from lm.training import Run, Settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def collect(settings: Settings, texts: tuple[Text, Text], runs: list[Run]) -> dict[str, Any]:
    """Everything worth keeping of the runs, as JSON takes it."""
    device = jax.devices()[0]
    metrics: dict[str, Any] = {
        "settings": asdict(settings),
        "device": f"{device.platform}: {device.device_kind}",
        "versions": {"jax": jax.__version__, "jaxgemm": jaxgemm.__version__},
        "text": {
            side: {"files": text.num_files, "bytes": text.data.size, "order0_entropy": text.order0_entropy()}
            for side, text in zip(("train", "validation"), texts, strict=True)
        },
        "runs": {run.name: _run_metrics(settings, run) for run in runs},
    }
    if len(runs) == 2:
        baseline, fp8 = (metrics["runs"][run.name] for run in runs)
        metrics["relative_gap"] = {key: fp8[key] / baseline[key] - 1 for key in ("train_loss", "validation_loss")}
    return metrics


def _run_metrics(settings: Settings, run: Run) -> dict[str, Any]:
    step_seconds = statistics.median(run.history.step_seconds)
    return {
        "train_loss": float(np.mean(run.history.train[-_tail(settings) :])),
        "validation_loss": run.history.validation[-1][1],
        "step_seconds": step_seconds,
        "tokens_per_second": settings.batch * settings.seq / step_seconds,
        "compile_seconds": run.compile_seconds,
        "step_bytes": run.step_bytes,
        "device_peak_bytes": run.device_peak_bytes,
        "parameters": run.num_parameters,
        "parameters_sha256": run.parameters_sha256,
        "train_losses": run.history.train,
        "validation_losses": run.history.validation,
        "metrics": run.history.metrics,
    }


def _tail(settings: Settings) -> int:
    """Steps whose mean is the final training loss, the last 5 %: one batch alone says little."""
    return max(1, settings.steps // 20)


def print_table(metrics: dict[str, Any]) -> None:
    """Prints the losses of the runs, their gap, and what a step took."""
    runs, text = metrics["runs"], metrics["text"]
    print()
    for side, facts in text.items():
        size, entropy = facts["bytes"] / 1e6, facts["order0_entropy"]
        print(f"{side} text: {facts['files']} files, {size:.1f} MB, byte entropy {entropy:.4f} nats")
    parameters = next(iter(runs.values()))["parameters"]
    steps = metrics["settings"]["steps"]
    print(f"{parameters / 1e6:.2f} M parameters, {steps} steps, {metrics['device']}\n")

    gaps = metrics.get("relative_gap", {})
    _print_row("", [*runs, *(["gap"] if gaps else [])])
    for label, key in (("train loss [nats]", "train_loss"), ("validation loss [nats]", "validation_loss")):
        gap = [f"{100 * gaps[key]:+.3f} %"] if gaps else []
        _print_row(label, [f"{run[key]:.4f}" for run in runs.values()] + gap)
    _print_row("step time [ms]", [f"{1e3 * run['step_seconds']:.1f}" for run in runs.values()])
    _print_row("tokens/s", [f"{run['tokens_per_second']:.0f}" for run in runs.values()])
    _print_row("compile time [s]", [f"{run['compile_seconds']:.1f}" for run in runs.values()])
    _print_row("memory of a step [MB]", [f"{run['step_bytes'] / 1e6:.0f}" for run in runs.values()])
    peaks = [run["device_peak_bytes"] for run in runs.values()]
    if None not in peaks:
        _print_row("device peak so far [MB]", [f"{peak / 1e6:.0f}" for peak in peaks])


def _print_row(label: str, cells: list[str]) -> None:
    print(f"{label:24}" + "".join(f"{cell:>12}" for cell in cells))


def write_metrics(metrics: dict[str, Any], path: Path) -> None:
    """Writes all metrics, the loss of every step included."""
    path.write_text(json.dumps(metrics, indent=1) + "\n")


def plot(metrics: dict[str, Any], path: Path) -> None:
    """Draws the curves of the runs, and beneath them the gap between two."""
    runs = metrics["runs"]
    figure, (losses, gap) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1), layout="constrained")
    width = max(1, metrics["settings"]["steps"] // 50)
    for name, run in runs.items():
        (line,) = losses.plot(*_smooth(run["train_losses"], width), label=f"{name}, train")
        steps, values = zip(*run["validation_losses"], strict=True)
        losses.plot(steps, values, "o--", color=line.get_color(), label=f"{name}, validation")
    entropy = metrics["text"]["validation"]["order0_entropy"]
    losses.axhline(entropy, color="grey", linestyle=":", label="byte entropy of the text")
    losses.set_ylabel("loss [nats a byte]")
    losses.legend()

    if len(runs) == 2:
        baseline, fp8 = (np.asarray(run["train_losses"]) for run in runs.values())
        gap.plot(*_smooth(100 * (fp8 / baseline - 1), width), color="black")
        gap.axhline(0, color="grey", linewidth=0.8)
    gap.set_ylabel("gap of FP8, train [%]")
    gap.set_xlabel(f"step (curves are means over {width} steps)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _smooth(values: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over a running window, each at the window's last step."""
    means = np.convolve(np.asarray(values), np.ones(width) / width, mode="valid")
    return np.arange(width, width + means.size), means
