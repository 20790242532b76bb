"""`bench tune` and `bench export-rows`: tiles for the shapes of a suite, and the tables that the package ships."""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jaxgemm
from jaxgemm import tuned_rows, tuning_cache
from jaxgemm.bench.suites import GemmCase
from jaxgemm.scaled_array import ROW_BLOCK, SQUARE_BLOCK

TUNE, EXPORT = "tune", "export-rows"
SOURCE = "python -m jaxgemm.bench tune"


def add_commands(commands: Any) -> argparse.ArgumentParser:
    """Adds both commands to the parser and returns the one of `tune`, which takes a suite."""
    what = "times the tiles of dense products and stores the fastest in the user's cache"
    command: argparse.ArgumentParser = commands.add_parser(TUNE, help=what, description=what)
    command.add_argument("--only", default="", metavar="REGEX", help="cases whose name it finds")
    command.add_argument("--retune", action="store_true", help="measure again what has a row already")
    what = "prints the rows of the user's cache as a table that can be shipped, or merges them into one"
    export = commands.add_parser(EXPORT, help=what, description=what)
    export.add_argument(
        "--cache", type=pathlib.Path, nargs="+", metavar="FILE", help="default: those of this jax and jaxgemm"
    )
    export.add_argument("--table", type=pathlib.Path, metavar="FILE", help="merge the rows of its device into it")
    export.add_argument("--device", help="rows of this device alone; default: that of --table, else all")
    return command


def run(options: argparse.Namespace, cases: Sequence[GemmCase]) -> int:
    """Tunes the products of `cases` and prints the report; returns 1 if one of them could not be tuned."""
    operands = [_operands(case) for case in cases]
    out_dtypes = [jnp.float32 if case.kind == "wgrad" else jnp.bfloat16 for case in cases]

    def products(operands: Any) -> list[jax.Array]:
        return [
            jaxgemm.gemm(lhs, rhs, preferred_element_type=dtype)
            for (lhs, rhs), dtype in zip(operands, out_dtypes, strict=True)
        ]

    report = jaxgemm.autotune(products, operands, retune=options.retune)
    print(report)
    return int(any(problem.trials and problem.winner is None for problem in report.problems))


def _operands(case: GemmCase) -> tuple[Any, Any]:
    """Shapes and dtypes of the operands of a case, without the arrays."""
    blocks = ROW_BLOCK, ROW_BLOCK if case.kind == "wgrad" else SQUARE_BLOCK
    lhs, rhs = (
        jax.eval_shape(lambda x, block=block: jaxgemm.quantize(x, block), jax.ShapeDtypeStruct(shape, jnp.bfloat16))
        for shape, block in zip(((case.m, case.k), (case.n, case.k)), blocks, strict=True)
    )
    return lhs, rhs


def export_rows(options: argparse.Namespace) -> int:
    """Prints tables made of cache files, or merges them into the table of one device.

    Raises:
        ValueError: if a file holds no table, or there is nothing to export.
    """
    table = None
    if options.table is not None and options.table.exists():
        table = _read(options.table)
    device = options.device or (table.device if table else None)
    if table and device != table.device:
        raise ValueError(f"--device must be that of --table, {table.device!r}, got {device!r}")
    merged: dict[str, tuned_rows.TunedTable] = {table.device: table} if table else {}
    files = options.cache or sorted(tuning_cache.folder().glob(tuning_cache.path("*").name))
    found = 0
    for content in map(_read, files):
        if device in (None, content.device):
            known = merged.get(content.device) or tuned_rows.TunedTable(content.device, source=SOURCE)
            merged[content.device] = known.merged(content.rows.values())
            found += len(content.rows)
    if not found:
        raise ValueError(f"no rows{f' of {device}' if device else ''} in {', '.join(map(str, files)) or 'the cache'}")
    if options.table is None:
        print("\n".join(tuned_rows.to_text(table) for table in merged.values()), end="")
        return 0
    if len(merged) > 1:
        raise ValueError(f"a table is of one device: choose with --device among {', '.join(merged)}")
    (table,) = merged.values()
    options.table.write_text(tuned_rows.to_text(table), "utf-8")
    print(f"{options.table} has {len(table.rows)} rows, {found} of them from {len(files)} files of the cache")
    return 0


def _read(file: pathlib.Path) -> tuned_rows.TunedTable:
    try:
        return tuned_rows.from_text(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} holds no table of tuned tiles: {error}") from None
