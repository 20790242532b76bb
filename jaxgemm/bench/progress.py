"""A progress bar where rich is installed and somebody watches; a line a row elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[str], None]]:
    """Shows how many of `total` cases are done; the function it gives is called with a line after each."""
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        Console = None  # type: ignore[assignment,misc]
    if Console is None or not sys.stderr.isatty():
        yield _lines(total)
        return
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)

        def advance(line: str) -> None:
            bar.console.print(line, highlight=False, markup=False)
            bar.advance(task)

        yield advance


def _lines(total: int) -> Callable[[str], None]:
    done = 0

    def advance(line: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done}/{total}] {line}", file=sys.stderr, flush=True)

    return advance
