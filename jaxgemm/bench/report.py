"""What a run leaves: a JSON file, a table, and a comparison with an older run."""

import datetime
import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

import jaxgemm
from jaxgemm import tuning_cache
from jaxgemm.bench import torch_peers
from jaxgemm.bench.rows import OWN

FORMAT = 1
REGRESSION = 0.05
"""How much slower than before counts as slower; repeated runs on one GPU differ by up to about 2 %."""

Report = dict[str, Any]


def new_report(command: str, arguments: str, method: str, limits: Mapping[str, float], setup: Any) -> Report:
    """Returns a report without rows: where, with what and how it is measured."""
    return {
        "format": FORMAT,
        "command": command,
        "arguments": arguments,
        "environment": environment(),
        "method": {
            "timer": method,
            "calls": f"{setup.rounds} rounds of {setup.iterations}, the columns of a row by turns",
            "data": "random normal",
            "cold": f"weights rotated through more than {setup.cold_bytes / 1e6:g} MB; other rows warm",
        },
        "limits": dict(limits),
        "rows": [],
    }


def environment() -> dict[str, Any]:
    """Returns what a figure depends on: the GPU, its driver, versions, the state of the source, the day."""
    device = jax.devices()[0]
    return {
        "gpu": device.device_kind,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "torch": torch_peers.version(),
        "jaxgemm": jaxgemm.__version__,
        "tuned rows": len(tuning_cache.rows(device.device_kind)),  # of this machine's own, which come before all else
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str | None:
    """Returns the commit of the checkout that this package lies in, marked if it was changed; None elsewhere."""
    root = pathlib.Path(jaxgemm.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    return _first_line("git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*")


def _first_line(*command: str) -> str | None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = result.stdout.strip().splitlines()
    return lines[0] if lines else None


def write(report: Report, path: pathlib.Path) -> None:
    """Writes a report; what was there before stays until all is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def read(path: pathlib.Path) -> Report:
    """Reads a report.

    Raises:
        ValueError: if there is none, or of another format.
    """
    try:
        report = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no report of jaxgemm.bench: {error}") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} holds no report of jaxgemm.bench in format {FORMAT}")
    return report


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Returns header and cells: own time and rate, then each other column's rate and this library's ratio to it."""
    rows = report["rows"]
    by_bytes = report["command"] == "quantize"
    own = _ordered(name for row in rows for name in row["times"] if name.startswith(OWN) and name != OWN)
    peers = _ordered(name for row in rows for name in row["times"] if not name.startswith(OWN))
    checks = _ordered(name for row in rows for name in row["checks"])
    copy = report["limits"].get("copy_gbps")
    shows_bandwidth = copy and (by_bytes or any(row.get("cold") for row in rows))
    unit = "GB/s" if by_bytes else "TFLOP/s"
    header = ["case", "us", "spread", unit]
    header += ["of copy"] if shows_bandwidth else []
    header += [f"{name}, us" for name in own]
    header += [cell for name in peers for cell in (f"{name}, {unit}", f"x {name}")] + checks
    cells = []
    for row in rows:
        rate = "gbps" if by_bytes else "tflops"
        mine = row["times"].get(OWN, {})
        line = [_case(row)]
        line += [_number(mine.get("us")), _percent(mine.get("spread")), _number(mine.get(rate))]
        if shows_bandwidth:
            line.append(_percent(mine["gbps"] / copy if mine and (by_bytes or row["cold"]) else None))
        line += [_number(row["times"].get(name, {}).get("us")) for name in own]
        for name in peers:
            line += [_number(row["times"].get(name, {}).get(rate)), _number(ratio(row, name), 3)]
        cells.append(line + [_check(row["checks"].get(name)) for name in checks])
    return header, cells


def ratio(row: Mapping[str, Any], peer: str) -> float | None:
    """Returns how many times as fast as a peer this library is; None if one of them has no time."""
    times = row["times"]
    return times[peer]["us"] / times[OWN]["us"] if peer in times and OWN in times else None


def means(report: Report) -> list[str]:
    """Returns a line for each group of cases: the geometric means of the ratios to each peer."""
    lines = []
    for group in _ordered(row.get("group", "") for row in report["rows"]):
        rows = [row for row in report["rows"] if row.get("group", "") == group]
        parts = []
        for peer in _ordered(name for row in rows for name in row["times"] if not name.startswith(OWN)):
            ratios = [r for r in (ratio(row, peer) for row in rows) if r is not None]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                parts.append(f"{mean:.3f} x {peer} (least {min(ratios):.3f}, {len(ratios)} cases)")
        if parts:
            lines.append(f"{group}: " + "; ".join(parts))
    return lines


def plain(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Returns a table in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def missing_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns why columns are empty: a line for each reason, with the number of cases, or the one case."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            reasons.setdefault((name, reason), []).append(row["case"])
    return [
        f"{name}: {reason} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})"
        for (name, reason), cases in reasons.items()
    ]


def check_comparable(new: Report, old: Report) -> None:
    """Raises ValueError unless two reports are of the same command on the same GPU."""
    for what, there, here in (
        ("command", old["command"], new["command"]),
        ("GPU", old["environment"]["gpu"], new["environment"]["gpu"]),
    ):
        if there != here:
            raise ValueError(f"the reports cannot be compared: {what} was {there}, is {here}")


def regressions(new: Report, old: Report) -> list[str]:
    """Returns a line for each of this library's times that is more than 5 % longer than in the old report.

    Raises:
        ValueError: if the reports cannot be compared: of another command or GPU, or without a case in common.
    """
    check_comparable(new, old)
    before, after = _own_times(old), _own_times(new)
    common = before.keys() & after.keys()
    if not common:
        raise ValueError("the reports cannot be compared: they have no case in common")
    return [
        f"{case}, {name}: {before[case, name]:.1f} us became {after[case, name]:.1f} us "
        f"({after[case, name] / before[case, name] - 1:+.1%})"
        for case, name in after
        if (case, name) in common and after[case, name] > (1 + REGRESSION) * before[case, name]
    ]


def _own_times(report: Report) -> dict[tuple[str, str], float]:
    """Returns this library's microseconds by case (cold ones set apart) and column."""
    return {
        (_case(row), name): time["us"]
        for row in report["rows"]
        for name, time in row["times"].items()
        if name.startswith(OWN)
    }


def _case(row: Mapping[str, Any]) -> str:
    return row["case"] + (" cold" if row.get("cold") else "")


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _check(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 0.1 else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
