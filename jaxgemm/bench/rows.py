"""A row of a benchmark, and the loop that fills rows."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxgemm.bench import accuracy
from jaxgemm.bench.measure import Call, Timer, Timing, measure_together, one_line, temporary_mib

OWN = "jaxgemm"
"""Column of this library; columns whose names start so are this library's too."""

MOST_WEIGHTS = 256


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cases of a run share.

    Attributes:
        timer: measures a call.
        implementation: of this library; None for the best.
        peers: names of the columns to measure beside it.
        iterations: calls a round.
        rounds: how often each column has its turn.
        cold_bytes: weights are rotated through at least so much; more than an L2 cache.
        temperature: "auto" (small products cold), "cold" or "warm".
        bias: whether to measure a product with bias too.
    """

    timer: Timer
    implementation: str | None = None
    peers: tuple[str, ...] = ()
    iterations: int = 20
    rounds: int = 2
    cold_bytes: float = 2e8
    temperature: str = "auto"
    bias: bool = False

    def weight_copies(self, weight_bytes: int, is_small: bool) -> int:
        """Returns how many weights to rotate through: 1 if warm, else as many as exceed `cold_bytes`, one over.

        Weights so small that it would take more than `MOST_WEIGHTS` of them are measured warm.
        """
        cold = is_small if self.temperature == "auto" else self.temperature == "cold"
        copies = 1 + math.ceil(self.cold_bytes / weight_bytes)
        return copies if cold and copies <= MOST_WEIGHTS else 1


@dataclasses.dataclass
class Row:
    """One case, measured.

    Attributes:
        case: its name.
        problem: its sizes, and what else tells it apart; `cold` among them.
        flops: floating-point operations of a call.
        bytes: what a call must read and write at least, in this library's formats.
        times: a `Timing` for each column.
        missing: why a column has none.
        checks: figures that are no times, such as `difference`.
    """

    case: str
    problem: dict[str, Any]
    flops: float
    bytes: float
    times: Mapping[str, Timing] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    checks: dict[str, Any] = dataclasses.field(default_factory=dict)

    def measured(self, setup: Setup, calls: Mapping[str, Call], missing: Mapping[str, str] | None = None) -> "Row":
        """Fills in the times of `calls`, and returns the row."""
        self.times, failures = measure_together(setup.timer, calls, setup.iterations, setup.rounds)
        self.missing = {**(missing or {}), **failures}
        return self

    def compared_with_bf16(self, calls: Mapping[str, Call], result: Any) -> None:
        """Notes the memory that our call takes for itself; if XLA's is a column, its too, and how far the results are.

        Args:
            calls: what was measured, ours among them.
            result: of ours.
        """
        self.checks["temp MiB"] = temporary_mib(calls[OWN])
        if "xla-bf16" in calls:
            pairs = zip(jax.tree.leaves(result), jax.tree.leaves(calls["xla-bf16"].first()), strict=True)
            self.checks["largest difference from bf16"] = max(accuracy.difference(x, y) for x, y in pairs)
            self.checks["xla-bf16 temp MiB"] = temporary_mib(calls["xla-bf16"])

    def to_json(self) -> dict[str, Any]:
        """Returns the row as a JSON object."""
        times = {
            name: {
                "us": round(timing.median_us, 3),
                "spread": round(timing.spread, 4),
                "wall_us": round(timing.wall_us, 1),
                "samples": len(timing.samples_us),
                "tflops": round(self.flops / timing.median_us / 1e6, 2),
                "gbps": round(self.bytes / timing.median_us / 1e3, 1),
                "kernels": {kernel[:80]: round(us, 3) for kernel, us in timing.kernels.items()},
            }
            for name, timing in self.times.items()
        }
        return {
            "case": self.case,
            **self.problem,
            "flops": self.flops,
            "bytes": self.bytes,
            "times": times,
            "missing": self.missing,
            "checks": self.checks,
        }


def collect(
    cases: Sequence[Any],
    run_case: Callable[[Any, Setup], Sequence[Row]],
    setup: Setup,
    on_rows: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Runs every case and returns its rows as JSON objects.

    A case that raises becomes a row without times that says why, and the run goes on.

    Args:
        cases: objects with a `name`.
        run_case: returns the rows of a case.
        setup: what the cases share.
        on_rows: is given the new rows after each case.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        try:
            new = list(run_case(case, setup))
        except Exception as error:  # one impossible case must not lose the others' results
            new = [Row(case.name, {}, 0, 0, missing={OWN: one_line(error)})]
        rows += [row.to_json() for row in new]
        on_rows(rows[-len(new) :])
    return rows


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Returns random normal numbers: zeros or ones draw less power and run faster than real data.

    They are drawn in float32: drawn in bfloat16 they lie on a coarse grid that is not symmetric about zero, and the
    rounding errors of a long column then no longer cancel in its sum.
    """
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def stored_bytes(*arrays: Any) -> int:
    """Returns the bytes that arrays, and pytrees of them, take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
