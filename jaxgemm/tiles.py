"""Which tile a product gets, and where that was learnt: the user's cache, the package's tables, the model."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxgemm import tuned_rows, tuning, tuning_cache
from jaxgemm.gemm_config import GemmConfig, why_invalid
from jaxgemm.problem import GemmProblem

AUTOTUNED = "autotuned"
MODEL = "model"
FORCED = "forced"

_forced: contextvars.ContextVar[GemmConfig | None] = contextvars.ContextVar("jaxgemm_forced_config", default=None)


class Choice(NamedTuple):
    """A configuration, and where it comes from: "autotuned", "measured on DEVICE", "model"; "forced" in a trial."""

    config: GemmConfig
    source: str


def choose(problem: GemmProblem, num_sms: int, device_kind: str | None) -> Choice:
    """Returns the configuration for a problem.

    The first there is of: a row that `jaxgemm.autotune` wrote for this device kind; a row of the package for this
    device kind; the best by the model. A row that is not valid for the problem does not count.

    Args:
        problem: with m, n and k positive.
        num_sms: streaming multiprocessors of the device.
        device_kind: as JAX names it; None where a program is lowered without the device at hand.

    Raises:
        ValueError: if no configuration is valid.
    """
    forced = _forced.get()
    if forced is not None:
        return Choice(forced, FORCED)
    return tuned_choice(problem, device_kind) or shipped_choice(problem, num_sms, device_kind)


def tuned_choice(problem: GemmProblem, device_kind: str | None) -> Choice | None:
    """Returns what `jaxgemm.autotune` found for a problem on a device kind, or None."""
    if device_kind is None:
        return None
    row = tuning_cache.rows(device_kind).get(tuned_rows.tuned_key(problem))
    return Choice(row.config, AUTOTUNED) if row and why_invalid(problem, row.config) is None else None


def shipped_choice(problem: GemmProblem, num_sms: int, device_kind: str | None) -> Choice:
    """Returns what is chosen where nothing was tuned: a row of the package, else the best by the model.

    NOTE: rows of another kind of device do not count. An H200's, which the model would not have chosen, took up to 14 %
    more time on an H100 than what it does choose (16x4096x7168: 14.1 us, else 12.4).
    """
    key = tuned_rows.tuned_key(problem)
    for table in tuned_rows.shipped_tables():
        row = table.rows.get(key)
        if table.device == device_kind and row and why_invalid(problem, row.config) is None:
            return Choice(row.config, f"measured on {table.device}")
    return Choice(tuning.choose_config(problem, num_sms), MODEL)


@contextlib.contextmanager
def forced(config: GemmConfig) -> Iterator[None]:
    """Within it, every product that is lowered by this thread gets a given configuration: to try it out."""
    token = _forced.set(config)
    try:
        yield
    finally:
        _forced.reset(token)


def describe_config(config: Any) -> str:
    """Returns a kernel's configuration in words: tile and stages, then what is not as usual.

    Example:
        >>> describe_config(GemmConfig(tile_m=16, tile_n=192, stages=7, warpgroups=3, swap_operands=True))
        'tile_m=16, tile_n=192, stages=7, warpgroups=3, swap_operands=True'
    """
    return ", ".join(
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name in ("tile_m", "tile_n", "stages") or getattr(config, field.name) != field.default
    )
