"""README's tables, written from the reports in `benchmarks/results`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and is that of `benchmarks/results/NAME.json`.
"""

import pathlib
import re

from jaxgemm.bench import report as reports
from jaxgemm.bench.report import Report

MARKED = re.compile(r"(<!-- table: (?P<name>[\w.-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
OPENING = re.compile(r"<!-- table: ")


def render(text: str, results: pathlib.Path) -> str:
    """Returns the text with every table between markers written anew.

    Raises:
        ValueError: if a report is missing, or an opening marker has no closing one.
    """
    if len(OPENING.findall(text)) != len(MARKED.findall(text)):
        raise ValueError("every '<!-- table: NAME -->' must stand on a line of its own, with '<!-- end -->' after it")
    return MARKED.sub(lambda found: f"{found[1]}{markdown(reports.read(_path(results, found)))}{found[4]}", text)


def markdown(report: Report) -> str:
    """Returns a report as a Markdown table, with the ratios' means and where it was measured below it."""
    header, cells = reports.table(report)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    where, timer = report["environment"], report["method"]["timer"]
    means = "".join(f"- {line}\n" for line in reports.means(report))
    versions = ", ".join(
        f"{name} {where[name]}" for name in ("driver", "jax", "jaxlib", "torch", "jaxgemm", "commit") if where[name]
    )
    command = f"python -m jaxgemm.bench {report['command']} {report['arguments']}".strip()
    source = f"`{command}` on {where['gpu']}, {where['date']}; {versions}. {timer}."
    return f"\n{rows}\n\n{means}{chr(10) if means else ''}{source}\n\n"


def update(readme: pathlib.Path, results: pathlib.Path, check: bool) -> bool:
    """Writes the tables of a README anew, or only looks whether that would change it.

    Returns:
        Whether it was up to date before.
    """
    before = readme.read_text()
    after = render(before, results)
    if after != before and not check:
        readme.write_text(after)
    return after == before


def _path(results: pathlib.Path, found: re.Match[str]) -> pathlib.Path:
    return results / f"{found['name']}.json"
