"""`autotune`: times the tiles that could compute a function's products on this GPU, and remembers the fastest."""

import concurrent.futures
import dataclasses
import datetime
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from jaxgemm import autotune_trial, dispatch, tile_candidates, tiles, tuning, tuning_cache
from jaxgemm.autotune_neighbours import neighbours
from jaxgemm.bench.measure import Call, CuptiTimer, Timer, fitting_iterations, measure_together, one_line
from jaxgemm.bench.progress import progress
from jaxgemm.find import FoundProblem, describe, find_problems
from jaxgemm.gemm_config import GemmConfig
from jaxgemm.problem import GemmProblem
from jaxgemm.tuned_rows import TunedRow, tuned_key

logger = logging.getLogger(__name__)

MARGIN = 0.01
"""By how much a tile must beat the one that is chosen now: repeated runs of one kernel differ by about as much."""

COMPILERS = 8
"""How many configurations are compiled at once."""

FINALISTS = 3
"""How many of the fastest take turns in the end, so that all see the same clocks."""


@dataclasses.dataclass(frozen=True)
class Tuner:
    """How configurations are compiled, timed and searched.

    Attributes:
        timer: measures a call.
        compile: makes the call of a problem with a configuration, for several sets of operands.
        iterations: calls a measurement.
        rounds: turns of each finalist.
        most_configs: how many configurations of one problem are tried.
        cold_bytes: weights of small products are rotated through at least so much.
    """

    timer: Timer = dataclasses.field(default_factory=CuptiTimer)
    compile: Callable[[GemmProblem, GemmConfig, Sequence[list[Any]]], Call] = autotune_trial.compile_config
    iterations: int = 20
    rounds: int = 2
    most_configs: int = 64
    cold_bytes: float = 2e8


@dataclasses.dataclass(frozen=True)
class Trial:
    """One configuration, tried.

    Attributes:
        config: what was tried.
        microseconds: the median time of a call; None if it was rejected.
        rejected: why it cannot win: it failed, or its result is wrong; None if it can.
    """

    config: GemmConfig
    microseconds: float | None
    rejected: str | None = None


@dataclasses.dataclass(frozen=True)
class TunedProblem:
    """One product of a function, and what came of tuning it.

    Attributes:
        problem: the product.
        before: what was chosen for it, and where that came from; None if it was not tuned.
        trials: every configuration tried, the fastest first, rejected ones last.
        winner: the row that was stored; None if it was not tuned.
        skipped: why it was not tuned, or None.
    """

    problem: GemmProblem
    before: tiles.Choice | None = None
    trials: tuple[Trial, ...] = ()
    winner: TunedRow | None = None
    skipped: str | None = None

    @property
    def rejected(self) -> tuple[Trial, ...]:
        """The trials that could not win."""
        return tuple(trial for trial in self.trials if trial.rejected is not None)

    def __str__(self) -> str:
        """The outcome in one line."""
        if self.winner is None or self.before is None:
            return f"{describe(self.problem)}: not tuned: {self.skipped}"
        earlier = next((t.microseconds for t in self.trials if t.config == self.before.config), None)
        now = self.winner.microseconds or 0.0
        if self.winner.config == self.before.config:
            change = f"as before ({self.before.source})"
        elif earlier is None:
            change = f"before ({self.before.source}) {tiles.describe_config(self.before.config)}, which was rejected"
        else:
            change = f"before ({self.before.source}) {earlier:.1f} us with {tiles.describe_config(self.before.config)}"
        tried = f"{len(self.trials)} tried, {len(self.rejected)} rejected"
        chosen = tiles.describe_config(self.winner.config)
        return f"{describe(self.problem)}: {now:.1f} us with {chosen}; {change}; {tried}"


@dataclasses.dataclass(frozen=True)
class TuningReport:
    """What `autotune` did. `str()` is meant to be read.

    Attributes:
        device: the kind of GPU.
        file: where the rows are stored.
        problems: one for each distinct product.
    """

    device: str
    file: str
    problems: tuple[TunedProblem, ...]

    def __str__(self) -> str:
        """A line a problem, and one for each rejected configuration."""
        lines = [f"{len(self.problems)} products on {self.device}; winners are stored in {self.file}"]
        for problem in self.problems:
            lines.append(f"  {problem}")
            lines += [f"    rejected {tiles.describe_config(t.config)}: {t.rejected}" for t in problem.rejected]
        if any(problem.winner for problem in self.problems):
            lines.append("Functions compiled before keep their tiles; jax.clear_caches() makes them compile anew.")
        return "\n".join(lines)


def autotune(
    fn: Callable[..., Any], *args: Any, retune: bool = False, tuner: Tuner | None = None, **kwargs: Any
) -> TuningReport:
    """Times the tiles that could compute each FP8 product of a function on this GPU, and stores the fastest.

    The function is traced, not run: each of its products is timed by itself, on random operands of its shape, kernel
    durations alone, the weights of small products cold. A tile whose result is not that of the dequantised operands
    never wins. Winners go to a file of the user's (`jaxgemm.tuning_cache` says where) for this kind of GPU, this
    version of JAX and this one of the library, and every later program uses them, in this process and in others, with
    no change to it. Functions that are compiled already keep their tiles, until `jax.clear_caches()`.

    Inside `jax.shard_map`, shapes are those of one device, and so are the rows. Where the compiler splits a function
    over devices by itself, tune the shapes of one device's share.

    Args:
        fn: any function that `jax.jit` takes, compiled or not; a whole training step, for example.
        *args: its arguments, or `jax.ShapeDtypeStruct`s in their place.
        retune: whether to measure products again that have a row already.
        tuner: how to compile and time; None for CUPTI's kernel durations on the GPU.
        **kwargs: its keyword arguments; bind one that is called `retune` or `tuner` with `functools.partial`.

    Returns:
        A `TuningReport`: print it.

    Raises:
        NotImplementedError: if JAX sees no NVIDIA GPU.
        OSError: if the file cannot be written.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxgemm import fp8_dot
        >>> autotune(fp8_dot, jnp.ones((64, 256)), jnp.ones((256, 512)))  # doctest: +SKIP
    """
    device = device_or_refuse()
    products = [found for found in find_problems(fn, *args, **kwargs) if isinstance(found.problem, GemmProblem)]
    return tune(*distinct(products), device=device, retune=retune, tuner=tuner or Tuner())


def device_or_refuse() -> str:
    """Returns the kind of the GPU at hand; raises NotImplementedError if there is none."""
    device = dispatch.device_kind()
    if device is None:
        seen = ", ".join(sorted({device.device_kind for device in jax.devices()}))
        raise NotImplementedError(
            f"jaxgemm.autotune times kernels on an NVIDIA GPU, and JAX sees none here, only {seen}"
        )
    return device


def distinct(found: Iterable[FoundProblem]) -> tuple[list[GemmProblem], list[TunedProblem]]:
    """Returns the products that need rows of their own, and those that get none, with the reason."""
    wanted: dict[Any, GemmProblem] = {}
    skipped: dict[GemmProblem, TunedProblem] = {}
    for product in found:
        problem = product.problem
        assert isinstance(problem, GemmProblem)
        reason = why_not_tuned(problem, product.implementation)
        if reason is not None:
            skipped[problem] = TunedProblem(problem, skipped=reason)
            continue
        # Those that differ in their epilogue alone share a row: it must fit in shared memory beside all of it.
        computed = dispatch.as_computed(problem)
        wanted[tuned_key(computed)] = max(wanted.get(tuned_key(computed), computed), computed, key=_epilogue_size)
    return list(wanted.values()), list(skipped.values())


def why_not_tuned(problem: GemmProblem, implementation: str | None = None) -> str | None:
    """Returns why no tile of a product can be chosen; None if one can."""
    if implementation not in (None, "mosaic"):
        return f"the call asks for implementation={implementation!r}"
    if 0 in (problem.m, problem.n, problem.k, problem.num_groups):
        return "there is nothing to compute"
    return dispatch.why_not("mosaic", problem, "cuda")


def _epilogue_size(problem: GemmProblem) -> int:
    return problem.has_bias + problem.accumulate


def tune(
    problems: Sequence[GemmProblem],
    skipped: Sequence[TunedProblem] = (),
    *,
    device: str,
    retune: bool,
    tuner: Tuner,
) -> TuningReport:
    """Tunes products one after the other and stores each winner as soon as it is known."""
    file = tuning_cache.add(device, [])  # if it cannot be written, it fails before hours of measuring
    done = list(skipped)
    with progress(len(problems) * tuner.most_configs, "tuning") as advance:
        for problem in problems:
            if not retune and tiles.tuned_choice(problem, device) is not None:
                result = TunedProblem(problem, skipped="it has a row already (retune=True measures it again)")
            else:
                result = tune_problem(problem, tuner, advance)
            if result.winner is not None:
                tuning_cache.add(device, [result.winner])
            done.append(result)
            advance(str(result), max(0, tuner.most_configs - len(result.trials)))
    return TuningReport(device, str(file), tuple(done))


def tune_problem(problem: GemmProblem, tuner: Tuner, advance: Callable[..., None]) -> TunedProblem:
    """Searches the configurations of one product: every candidate, then the neighbours of the fastest."""
    before = dispatch.choose_config(problem)
    try:
        search = _Search(problem, tuner, advance)
    except Exception as error:  # such as memory: the other products can still be tuned
        return TunedProblem(problem, skipped=one_line(error))
    promising = functools.partial(tuning.predicted_microseconds, problem, num_sms=dispatch.sm_count())
    search.run([before.config, *sorted(tile_candidates.candidates(problem), key=promising)])
    fastest = None
    while search.fastest() not in ([], fastest):
        fastest = search.fastest()
        search.run(n for trial in fastest[:2] for n in neighbours(problem, trial.config))
    winner = search.final(before.config)
    in_use = search.trials[before.config].rejected
    if in_use is not None:
        logger.warning("the tile in use for %s, %s, is rejected: %s", describe(problem), before, in_use)
    trials = tuple(sorted(search.trials.values(), key=lambda t: (t.microseconds is None, t.microseconds or 0.0)))
    if winner is None:
        first = trials[0].rejected if trials else "there is none"
        return TunedProblem(problem, before, trials, skipped=f"no configuration is right; the first: {first}")
    measured = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, jax {jax.__version__}, {tuner.timer.method}"
    assert winner.microseconds is not None
    row = TunedRow(tuned_key(problem), winner.config, round(winner.microseconds, 3), measured)
    return TunedProblem(problem, before, trials, row)


class _Search:
    """The operands of one product, and what was tried on them."""

    def __init__(self, problem: GemmProblem, tuner: Tuner, advance: Callable[..., None]):
        self.problem, self.tuner, self.advance = problem, tuner, advance
        self.trials: dict[GemmConfig, Trial] = {}
        self.calls: dict[GemmConfig, Call] = {}
        self.sets = autotune_trial.operand_sets(problem, tuner.cold_bytes)
        self.expected_from = "the dequantised product"
        self.expected: jax.Array | None
        try:
            self.expected = autotune_trial.oracle(problem, self.sets[0])
        except Exception:  # it needs four times the operands' memory; then all must agree with the first that runs
            self.expected, self.expected_from = None, "the first configuration that ran"

    def run(self, configs: Iterable[GemmConfig]) -> None:
        """Tries configurations, unless they were tried or there have been enough.

        Several are compiled at once, which takes longer than to time them; they are timed one after the other.
        """
        fresh = [config for config in dict.fromkeys(configs) if config not in self.trials]
        fresh = fresh[: self.tuner.most_configs - len(self.trials)]
        pool = concurrent.futures.ThreadPoolExecutor(COMPILERS)
        compiled = [pool.submit(self.tuner.compile, self.problem, config, self.sets) for config in fresh]
        try:
            for config, call in zip(fresh, compiled, strict=True):
                self.trials[config] = self._try(config, call.result)
                self.advance()
        finally:  # an interrupted search does not compile the rest
            pool.shutdown(cancel_futures=True)

    def fastest(self) -> list[Trial]:
        """Returns the best trials, the fastest first."""
        valid = [trial for trial in self.trials.values() if trial.microseconds is not None]
        return sorted(valid, key=lambda trial: trial.microseconds or 0.0)[:FINALISTS]

    def final(self, before: GemmConfig) -> Trial | None:
        """Measures the fastest by turns, beside the one that was chosen before, and returns the winner."""
        finalists = {str(trial.config): trial.config for trial in self.fastest()}
        if before in self.calls:
            finalists[str(before)] = before
        calls = {name: self.calls[config] for name, config in finalists.items()}
        timings, failures = measure_together(self.tuner.timer, calls, self.tuner.iterations, self.tuner.rounds)
        for name, config in finalists.items():
            time = timings[name].median_us if name in timings else None
            self.trials[config] = Trial(config, time, failures.get(name))
        times = {
            config: time for config in finalists.values() if (time := self.trials[config].microseconds) is not None
        }
        if not times:
            return None
        best = min(times, key=lambda config: times[config])
        return self.trials[before if before in times and times[best] >= (1 - MARGIN) * times[before] else best]

    def _try(self, config: GemmConfig, compiled: Callable[[], Call]) -> Trial:
        """Checks and times one configuration; whatever goes wrong rejects it, also when it was compiled."""
        try:
            call = compiled()
            result = call.first()
            if self.expected is None:
                self.expected = result
            difference = autotune_trial.difference(self.problem, result, self.expected)
            if not difference <= autotune_trial.BOUND:
                return Trial(config, None, f"its result differs from {self.expected_from} by {difference:.1e}")
            timing = self.tuner.timer(call, fitting_iterations(call, self.tuner.iterations))
        except Exception as error:
            return Trial(config, None, one_line(error))
        self.calls[config] = call
        return Trial(config, timing.median_us)
