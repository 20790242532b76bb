"""Kernel durations: what a call costs on the GPU, apart from what launching it costs on the host."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

OUTPUT_BYTES = 8e9
"""Results of back-to-back calls are alive together: fewer calls are made where they would take more than this."""

COPY_BYTES = 1 << 30
"""Size of the array whose copy gives the memory's bandwidth: far more than any cache."""


class Unavailable(Exception):
    """A peer cannot compute a case here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What several calls of one function took.

    Attributes:
        samples_us: microseconds of each call: the sum of its kernels.
        wall_us: host time of one of many asynchronous calls: larger where launching or memory copies take longer.
        kernels: median microseconds of each kernel of a call, by name; those of one name are added.
    """

    samples_us: tuple[float, ...]
    wall_us: float
    kernels: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def median_us(self) -> float:
        """The median over the calls."""
        return statistics.median(self.samples_us)

    @property
    def spread(self) -> float:
        """The distance from the 10th to the 90th percentile, relative to the median."""
        low, high = np.percentile(self.samples_us, (10, 90))
        return float((high - low) / self.median_us)

    def joined(self, other: "Timing") -> "Timing":
        """Returns the samples of both rounds as one."""
        names = self.kernels.keys() | other.kernels.keys()
        kernels = {name: statistics.mean(t.kernels[name] for t in (self, other) if name in t.kernels) for name in names}
        return Timing(self.samples_us + other.samples_us, min(self.wall_us, other.wall_us), kernels)


class Call:
    """A function with the sets of arguments it is called with in turn.

    Several sets keep operands out of the caches: each call finds what it reads gone from them. Looks like a jitted
    function to JAX's profiler, which then calls it as it is.
    """

    def __init__(self, function: Callable[..., Any], *argument_sets: Sequence[Any]):
        self.function = function
        self.argument_sets = argument_sets
        self._turn = 0

    @classmethod
    def jitted(cls, function: Callable[..., Any], *argument_sets: Sequence[Any]) -> "Call":
        """Compiles `function` for the first set of arguments, and will call it with each."""
        return cls(jax.jit(function).lower(*argument_sets[0]).compile(), *argument_sets)

    def __call__(self) -> Any:
        """Calls the function with the next set of arguments."""
        arguments = self.argument_sets[self._turn % len(self.argument_sets)]
        self._turn += 1
        return self.function(*arguments)

    def first(self) -> Any:
        """Calls the function with the first set of arguments and waits for the result."""
        return jax.block_until_ready(self.function(*self.argument_sets[0]))

    def trace(self, *arguments: Any) -> Any:
        """Traces the function, as a jitted function does."""
        return self.function.trace(*arguments)  # type: ignore[attr-defined]

    def lower(self, *arguments: Any) -> Any:
        """Lowers the function, as a jitted function does."""
        return self.function.lower(*arguments)  # type: ignore[attr-defined]


class Timer(Protocol):
    """Measures calls; `CuptiTimer` on a GPU, another in tests."""

    method: str

    def __call__(self, call: Call, iterations: int) -> Timing:
        """Calls `call` once to warm up, then `iterations` times, and returns what those took."""
        ...


class CuptiTimer:
    """Adds up the durations that CUPTI reports of the kernels of each call."""

    method = "CUPTI kernel durations of back-to-back calls; median over calls"

    def __call__(self, call: Call, iterations: int) -> Timing:
        """Measures a call.

        Raises:
            RuntimeError: if no kernel ran, or not the same ones in each call.
        """
        from jax.experimental.mosaic.gpu import profiler

        calls: Any
        try:
            _, calls = profiler.measure(call, aggregate=False, iterations=iterations)()
            calls = [calls] if calls and iterations == 1 else calls
        except RuntimeError:  # kernels on several streams came in another order: ask for one call at a time
            calls = [profiler.measure(call, aggregate=False)()[1] for _ in range(iterations)]
        if not calls or not all(calls):
            raise RuntimeError("no GPU kernel ran")
        by_name: dict[str, list[float]] = {}
        for kernels in calls:
            totals: dict[str, float] = {}
            for name, milliseconds in kernels:
                totals[name] = totals.get(name, 0.0) + 1e3 * milliseconds
            for name, total in totals.items():
                by_name.setdefault(name, []).append(total)
        samples = tuple(1e3 * sum(milliseconds for _, milliseconds in kernels) for kernels in calls)
        return Timing(samples, wall_us(call, iterations), {k: statistics.median(v) for k, v in by_name.items()})


class WallTimer:
    """Takes the host's clock around many asynchronous calls: for programs of several devices."""

    method = "host clock around asynchronous calls; median of three batches"

    def __call__(self, call: Call, iterations: int) -> Timing:
        """Measures a call."""
        samples = tuple(wall_us(call, iterations) for _ in range(3))
        return Timing(samples, min(samples))


def wall_us(call: Call, iterations: int) -> float:
    """Returns the host's microseconds for one of `iterations` asynchronous calls."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    results = [call() for _ in range(iterations)]
    jax.block_until_ready(results)
    return 1e6 * (time.perf_counter() - start) / iterations


def measure_together(
    timer: Timer, calls: Mapping[str, Call], iterations: int, rounds: int
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Measures several calls by turns, so that no one alone has the cool chip or the slow moment.

    Args:
        timer: measures one call.
        calls: by column name.
        iterations: calls a round; fewer where results would fill the memory.
        rounds: how often each has its turn.

    Returns:
        `(timings, failures)` by column name; a failure is the message of the error that a call raised.
    """
    timings: dict[str, Timing] = {}
    failures: dict[str, str] = {}
    fitting: dict[str, int] = {}
    for turn in range(rounds):
        for name, call in calls.items():
            if name in failures:
                continue
            try:
                if turn == 0:
                    fitting[name] = fitting_iterations(call, iterations)
                timing = timer(call, fitting[name])
            except Exception as error:  # a peer's failure must not end the run; it is shown in the row
                failures[name] = one_line(error)
                timings.pop(name, None)
                continue
            timings[name] = timings[name].joined(timing) if name in timings else timing
    return timings, failures


def fastest(timer: Timer, calls: Sequence[Call]) -> Call:
    """Returns the one of several equivalent calls that takes the least time."""
    return calls[0] if len(calls) == 1 else min(calls, key=lambda call: timer(call, 5).median_us)


def temporary_mib(call: Call) -> float:
    """Returns the MiB that a compiled call needs beside its arguments and results, at its peak."""
    return round(call.function.memory_analysis().temp_size_in_bytes / 2**20, 1)  # type: ignore[attr-defined]


def program_mib(call: Call) -> float:
    """Returns the MiB that a compiled call needs at its peak: arguments, results that are not in their place, and all
    it makes on the way."""
    sizes = call.function.memory_analysis()  # type: ignore[attr-defined]
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return round((kept + sizes.temp_size_in_bytes) / 2**20, 1)


def fitting_iterations(call: Call, iterations: int) -> int:
    """Returns how many calls, at most `iterations` and at least 3, may have their results alive together."""
    result_bytes = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(call.first()))
    return max(min(iterations, int(OUTPUT_BYTES // max(result_bytes, 1))), min(3, iterations))


def copy_bandwidth(timer: Timer, size: int = COPY_BYTES) -> float:
    """Returns the GB/s, read and written, of an elementwise kernel over `size` bytes.

    A plain copy would be a memory copy command and no kernel, which CUPTI does not show; negating moves as much.
    """
    x = jnp.arange(size // 4, dtype=jnp.uint32)
    timing = timer(Call.jitted(jnp.bitwise_not, [x]), 5)
    return 2 * x.nbytes / timing.median_us / 1e3


def one_line(error: Exception) -> str:
    """Returns type and first line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
