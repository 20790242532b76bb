"""A progress bar where rich is installed and somebody watches; a line a row elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[..., None]]:
    """Shows how many of `total` steps are done.

    The function it gives, `advance(line=None, steps=1)`, is called after each: with a line where there is one to show.
    """
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

        def advance(line: str | None = None, steps: int = 1) -> None:
            if line is not None:
                bar.console.print(line, highlight=False, markup=False)
            bar.advance(task, steps)

        yield advance


def _lines(total: int) -> Callable[..., None]:
    done = 0

    def advance(line: str | None = None, steps: int = 1) -> None:
        nonlocal done
        done += steps
        if line is not None:
            print(f"[{done}/{total}] {line}", file=sys.stderr, flush=True)

    return advance
