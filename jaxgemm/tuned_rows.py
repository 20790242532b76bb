"""Rows of measured tiles: for which problem which configuration won, how they are written, and those of the package.

The package's tables lie in `jaxgemm/tuned`, one JSON file a device, written by `python -m jaxgemm.bench export-rows`.
The user's cache (`jaxgemm.tuning_cache`) has the same form. Plain Python: no device is asked.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxgemm.gemm_config import GemmConfig
from jaxgemm.problem import GemmProblem

FORMAT = 1


class TunedKey(NamedTuple):
    """What a row was measured of. Bias, activation and the operands' FP8 dtypes do not count: they hardly cost time."""

    kind: str
    m: int
    n: int
    k: int
    num_groups: int
    lhs_block_rows: int
    rhs_block_rows: int
    out_bytes: int
    expected_m: int | None = None


@dataclasses.dataclass(frozen=True)
class TunedRow:
    """One measured winner.

    Attributes:
        key: what it was measured of.
        config: the fastest configuration.
        microseconds: what a call of it took, if that is known.
        measured: when, with which versions.
    """

    key: TunedKey
    config: GemmConfig
    microseconds: float | None = None
    measured: str | None = None


@dataclasses.dataclass(frozen=True)
class TunedTable:
    """The rows of one device.

    Attributes:
        device: its kind, as JAX names it.
        rows: by key.
        jax: version of JAX that they hold for; None for any.
        jaxgemm: version of this library that they hold for; None for any.
        source: where they come from, in words.
    """

    device: str
    rows: Mapping[TunedKey, TunedRow] = dataclasses.field(default_factory=dict)
    jax: str | None = None
    jaxgemm: str | None = None
    source: str | None = None

    def merged(self, rows: Iterable[TunedRow]) -> "TunedTable":
        """Returns the table with further rows, which replace those of the same problems."""
        return dataclasses.replace(self, rows={**self.rows, **{row.key: row for row in rows}})


def tuned_key(problem: GemmProblem) -> TunedKey:
    """Returns the key of a problem's row.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> e4m3, bf16 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16)
        >>> tuned_key(GemmProblem("dense", 64, 4096, 7168, e4m3, e4m3, (1, 128), (128, 128), bf16))[:4]
        ('dense', 64, 4096, 7168)
    """
    return TunedKey(
        problem.kind,
        problem.m,
        problem.n,
        problem.k,
        problem.num_groups,
        problem.lhs_block_shape[0],
        problem.rhs_block_shape[0],
        problem.out_dtype.itemsize,
        problem.expected_m,
    )


def to_text(table: TunedTable) -> str:
    """Returns a table as JSON, one row a line, in an order that does not depend on when rows were measured."""
    header = {"format": FORMAT, "device": table.device}
    for name in ("jax", "jaxgemm", "source"):
        if getattr(table, name) is not None:
            header[name] = getattr(table, name)
    ordered = sorted(table.rows.values(), key=lambda row: [x or 0 for x in row.key])
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in header.items()]
    rows = ",\n".join(f"    {json.dumps(_row_to_json(row))}" for row in ordered)
    return "\n".join(["{", *lines, f'  "rows": [\n{rows}\n  ]' if rows else '  "rows": []', "}"]) + "\n"


def from_text(text: str) -> TunedTable:
    """Reads a table. Rows that today's keys or configurations do not allow are left out.

    Raises:
        ValueError: if it is no table.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"it is not a table of format {FORMAT}")
    strings = {name: content.get(name) for name in ("device", "jax", "jaxgemm", "source")}
    if not isinstance(strings["device"], str) or not all(isinstance(s, str | None) for s in strings.values()):
        raise ValueError("device must be a string, and jax, jaxgemm and source, if present, too")
    if not isinstance(content.get("rows"), list):
        raise ValueError("rows must be a list")
    rows = [row for row in map(_row_from_json, content["rows"]) if row is not None]
    return TunedTable(rows={row.key: row for row in rows}, **strings)  # type: ignore[arg-type]


@functools.cache
def shipped_tables() -> tuple[TunedTable, ...]:
    """Returns the tables of the package, in the order of their names."""
    files = [file for file in (importlib.resources.files("jaxgemm") / "tuned").iterdir() if file.name.endswith(".json")]
    return tuple(from_text(file.read_text("utf-8")) for file in sorted(files, key=lambda file: file.name))


def _row_to_json(row: TunedRow) -> dict[str, Any]:
    """Returns a row as a JSON object. Configurations are written whole: a row must outlive a change of the defaults."""
    key = {name: value for name, value in row.key._asdict().items() if value is not None}
    rest = {name: getattr(row, name) for name in ("microseconds", "measured") if getattr(row, name) is not None}
    return {**key, "config": dataclasses.asdict(row.config), **rest}


def _row_from_json(content: Any) -> TunedRow | None:
    """Returns a row, or None if it cannot be read."""
    try:
        key = TunedKey(**{name: content[name] for name in TunedKey._fields if name in content})
        config = GemmConfig(**content["config"])
    except (TypeError, KeyError):
        return None
    sizes = [value for name, value in key._asdict().items() if name != "kind" and value is not None]
    choices = [getattr(config, field.name) for field in dataclasses.fields(config)]
    if not isinstance(key.kind, str) or not all(isinstance(value, int) for value in (*sizes, *choices)):
        return None
    if any(value < 1 for value in choices if not isinstance(value, bool)):
        return None
    microseconds, measured = content.get("microseconds"), content.get("measured")
    return TunedRow(
        key,
        config,
        float(microseconds) if isinstance(microseconds, int | float) else None,
        measured if isinstance(measured, str) else None,
    )
