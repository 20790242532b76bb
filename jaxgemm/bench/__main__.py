"""The command line: `python -m jaxgemm.bench --help`."""

import argparse
import dataclasses
import os
import pathlib
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax

from jaxgemm.bench import (
    dense,
    fsdp,
    gemm,
    grouped,
    quantize,
    readme,
    report,
    roofline,
    suites,
    torch_peers,
    train,
    tune,
)  # fmt: skip
from jaxgemm.bench.measure import COPY_BYTES, CuptiTimer, Timer, copy_bandwidth
from jaxgemm.bench.progress import progress
from jaxgemm.bench.rows import OWN, Setup, collect
from jaxgemm.problem import IMPLEMENTATIONS

REFUSED = 2
FAILED = 1
INTERRUPTED = 130

TRAIN_SIZES = tuple(field.name for field in dataclasses.fields(train.TrainCase) if field.type is int)

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "gemm": (gemm, "products of FP8 operands, dense and weight gradient"),
    "quantize": (quantize, "from floats to FP8, in bytes a second"),
    "dense": (dense, "linear layers forward and backward, quantising included"),
    "grouped": (grouped, "products of groups: masked, contiguous, k-grouped, and a layer of experts"),
    "train": (train, "training steps of a language model"),
    "fsdp": (fsdp, "layers with weights split over all GPUs of the host, and what they move between them"),
}


def main(arguments: Sequence[str] | None = None, timer: Timer | None = None, copy_bytes: int = COPY_BYTES) -> int:
    """Runs the command line.

    Args:
        arguments: those of the command line, by default.
        timer: measures a call; None for CUPTI's, which needs a GPU.
        copy_bytes: size of the copy that gives the memory's bandwidth.

    Returns:
        0; 1 if something failed, is slower than before or out of date; 2 if nothing could be measured.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    try:
        if options.command == "readme":
            return update_readme(options)
        if options.command == tune.EXPORT:
            return tune.export_rows(options)
        torch_peers.enabled = not getattr(options, "no_torch", True)
        if timer is None:
            set_environment()
            reason = why_no_gpu()
            if reason:
                print(f"jaxgemm.bench measures kernels on an NVIDIA GPU: {reason}", file=sys.stderr)
                return REFUSED
        if options.command == tune.TUNE:
            return tune.run(options, selected_cases(options))
        timer = timer or getattr(COMMANDS[options.command][0], "TIMER", CuptiTimer)()
        return run(options, list(sys.argv[1:] if arguments is None else arguments), timer, copy_bytes)
    except ValueError as error:
        print(f"jaxgemm.bench: {error}", file=sys.stderr)
        return REFUSED


def set_environment() -> None:
    """Sets what JAX reads when it first takes a device."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the GPU's memory too
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        # Kernels of a CUDA graph may overlap and come in any order, and their durations no longer add up.
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer=".strip()


def why_no_gpu() -> str | None:
    """Returns why nothing can be measured here, or None."""
    try:
        jax.devices("cuda")
    except RuntimeError:
        return f"JAX sees none here, only {', '.join(sorted({d.device_kind for d in jax.devices()}))}"
    return None


def run(options: argparse.Namespace, arguments: list[str], timer: Timer, copy_bytes: int) -> int:
    """Measures, prints, writes and compares, as the options say."""
    module, what = COMMANDS[options.command]
    old = report.read(options.compare) if options.compare else None
    cases = selected_cases(options)
    setup = make_setup(options, module, timer)
    limits = measured_limits(timer, copy_bytes)
    new = report.new_report(options.command, shlex.join(arguments[1:]), timer.method, limits, setup)
    if old:
        report.check_comparable(new, old)
    with progress(len(cases), what) as advance:

        def on_rows(rows: list[dict[str, Any]]) -> None:
            new["rows"] += rows
            if options.json:
                report.write(new, options.json)  # after each case: a run that is stopped leaves what it has
            advance("; ".join(summary(row) for row in rows))

        try:
            collect(cases, module.run_case, setup, on_rows)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
    rows = new["rows"]
    print_report(new)
    if options.plot:
        roofline.plot(new, options.plot)
    if interrupted:
        print("interrupted: what was measured until then is above")
        return INTERRUPTED
    failed = any(OWN not in row["times"] or any(name.startswith(OWN) for name in row["missing"]) for row in rows)
    slower = report.regressions(new, old) if old else []
    for line in slower:
        print(f"slower than before: {line}")
    return FAILED if failed or slower else 0


def selected_cases(options: argparse.Namespace) -> list[Any]:
    """Returns the cases that the options ask for."""
    cases: list[Any]
    if options.command in ("gemm", tune.TUNE):
        sizes = (options.m, options.n, options.k)
        if any(sizes) and not all(sizes):
            raise ValueError("--m, --n and --k go together")
        by_hand = suites.cases_of_sizes(*sizes, options.kind) if all(sizes) else None
        cases = list(by_hand if by_hand is not None else suites.gemm_cases(options.suite))
    else:
        makers: dict[str, Callable[[], list[Any]]] = {
            "quantize": quantize.quantize_cases,
            "dense": dense.dense_cases,
            "grouped": lambda: list(grouped.grouped_cases(options.suite)),
            "train": lambda: [train_case(options)],
            "fsdp": lambda: list(fsdp.fsdp_cases()),
        }
        cases = makers[options.command]()
    chosen = [case for case in cases if re.search(options.only, case.name)]
    if not chosen:
        raise ValueError(f"no case matches --only {options.only!r}; there are: {', '.join(c.name for c in cases[:20])}")
    return chosen


def train_case(options: argparse.Namespace) -> train.TrainCase:
    """Returns the model of the options; what they leave out is as `TrainCase` has it."""
    given = {name: getattr(options, name) for name in TRAIN_SIZES if getattr(options, name) is not None}
    case = train.TrainCase(**given, attention=options.attention)
    if case.width % case.heads or case.heads % case.kv_heads:
        raise ValueError(
            f"--width must be a multiple of --heads, and --heads of --kv-heads, got {case.width}, {case.heads} and "
            f"{case.kv_heads}"
        )
    return case


def make_setup(options: argparse.Namespace, module: ModuleType, timer: Timer) -> Setup:
    """Returns what the cases share."""
    peers = module.PEERS if options.vs is None else tuple(name for name in options.vs.split(",") if name)
    unknown = [name for name in peers if name not in module.PEERS]
    if unknown:
        raise ValueError(f"--vs knows {', '.join(module.PEERS)} here, got {', '.join(unknown)}")
    return Setup(
        timer=timer,
        implementation=options.implementation,
        peers=peers,
        iterations=options.iterations,
        rounds=options.rounds,
        cold_bytes=options.cold_megabytes * 1e6,
        temperature=getattr(options, "temperature", "auto"),
        bias=getattr(options, "bias", False),
    )


def measured_limits(timer: Timer, copy_bytes: int) -> dict[str, float]:
    """Returns the bandwidth of a copy in GB/s, read and written: the best of an XLA kernel and of PyTorch's copy."""
    rates = {"copy_xla_gbps": copy_bandwidth(timer, copy_bytes)}
    by_torch = torch_peers.copy_bandwidth(copy_bytes)
    if by_torch is not None:
        rates["copy_torch_gbps"] = by_torch
    return {name: round(rate, 1) for name, rate in {"copy_gbps": max(rates.values()), **rates}.items()}


def summary(row: dict[str, Any]) -> str:
    """Returns a row in one line, while others are still being measured."""
    times = ", ".join(f"{name} {time['us']:.1f} us" for name, time in row["times"].items())
    failures = [f"{name}: {reason}" for name, reason in row["missing"].items() if name.startswith(OWN)]
    return f"{row['case']}: {times}{'; '.join(failures)}"


def print_report(new: report.Report) -> None:
    """Prints the table, the means, and what is missing."""
    where = new["environment"]
    library = f"jaxgemm {where['jaxgemm']} ({where['commit']})"
    print(f"\n{where['gpu']}, driver {where['driver']}, jax {where['jax']}, {library}")
    print(f"{new['method']['timer']}; copy {new['limits']['copy_gbps']:.0f} GB/s\n")
    print(report.plain(*report.table(new)))
    for line in [*report.means(new), *report.missing_lines(new["rows"])]:
        print(line)


def update_readme(options: argparse.Namespace) -> int:
    """Writes README's tables, or checks them.

    Raises:
        ValueError: if there is no README.
    """
    if not options.file.is_file():
        raise ValueError(f"--file must be a README with tables, and there is no {options.file} here")
    if readme.update(options.file, options.results, options.check):
        return 0
    if options.check:
        print(f"{options.file} is out of date: run python -m jaxgemm.bench readme", file=sys.stderr)
        return FAILED
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m jaxgemm.bench", description="Measures kernels on an NVIDIA GPU.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        peers = ",".join(module.PEERS)
        command.add_argument("--vs", help=f"what to measure beside it, by commas ('': nothing); default: {peers}")
        able = [i for i in IMPLEMENTATIONS if i != "triton" or name not in ("quantize", "grouped")]
        command.add_argument("--implementation", choices=able, help="default: the best there is")
        command.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
        command.add_argument("--iterations", type=_positive, default=20, help="calls a round (default 20)")
        command.add_argument("--rounds", type=_positive, default=2, help="turns of each column (default 2)")
        command.add_argument("--cold-megabytes", type=float, default=200, help="weights to rotate through (200)")
        command.add_argument("--no-torch", action="store_true", help="leave PyTorch out, where it disturbs")
        command.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write a report, case by case")
        command.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="write a roofline plot")
        command.add_argument("--compare", type=pathlib.Path, metavar="OLD", help="fail if over 5 %% slower than this")
        if name == "gemm":
            _add_gemm_options(command)
            command.add_argument("--bias", action="store_true", help="measure each product with bias too")
            command.add_argument(
                "--temperature", choices=("auto", "cold", "warm"), default="auto", help="auto: cold up to m = 128"
            )
        elif name == "grouped":
            command.add_argument("--suite", choices=grouped.SUITES, default=grouped.SUITES[0])
        elif name == "train":
            _add_train_options(command)
    _add_gemm_options(tune.add_commands(commands))
    tables = commands.add_parser("readme", help="write the tables of README from benchmarks/results")
    tables.add_argument("--check", action="store_true", help="change nothing; fail if README is out of date")
    tables.add_argument("--file", type=pathlib.Path, default=pathlib.Path("README.md"))
    tables.add_argument("--results", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    return parser


def _add_gemm_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--suite", default="deepgemm", help="deepgemm, llama, mixtral, deepseek-v3 or a JSON file")
    for size in "mnk":
        command.add_argument(f"--{size}", type=_sizes, help="in place of a suite: one size, or several by commas")
    command.add_argument("--kind", choices=("dense", "wgrad"), default="dense", help="of --m --n --k (default dense)")


def _add_train_options(command: argparse.ArgumentParser) -> None:
    defaults = train.TrainCase()
    for size in TRAIN_SIZES:
        flag = f"--{size.replace('_', '-')}"
        command.add_argument(flag, type=_positive, help=f"default: {getattr(defaults, size)}")
    command.add_argument("--attention", choices=("cudnn", "xla"), default=defaults.attention)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run that is told to end prints what it has, too
    sys.exit(main())
