"""`explain`: what would compute each FP8 problem of a function, and why. Nothing is run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxgemm import dispatch, tiles
from jaxgemm.find import FoundProblem, describe, find_problems
from jaxgemm.problem import GemmProblem, QuantizeProblem

NOTHING_TO_COMPUTE = "there is nothing to compute"


@dataclasses.dataclass(frozen=True)
class ExplainedProblem:
    """One FP8 problem of a function, and what serves it.

    Attributes:
        found: the problem itself, how often it runs, from which line.
        implementation: what would compute it; None if the call names one that cannot, and so would raise.
        refused: name and reason of each better implementation, best first.
        config: its tile or layout (`GemmConfig`, `TritonConfig`, `QuantizeConfig`), if a kernel computes it.
        config_source: where that comes from: "autotuned", "measured on DEVICE", "model", "default".
    """

    found: FoundProblem
    implementation: str | None
    refused: tuple[tuple[str, str], ...] = ()
    config: Any = None
    config_source: str | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of one run's products, every row counted as valid; 0 for quantising."""
        return self.found.problem.flops if isinstance(self.found.problem, GemmProblem) else 0

    @property
    def bytes(self) -> int:
        """Bytes that one run must read and write at least."""
        return self.found.bytes

    def to_json(self) -> dict[str, Any]:
        """Returns everything as a JSON object."""
        found = self.found
        return {
            "kind": found.kind,
            "problem": _plain(found.problem),
            "operands": [_shape(x) for x in found.operands],
            "results": [_shape(x) for x in found.results],
            "runs": found.runs,
            "condition": found.condition,
            "devices": found.devices,
            "requested": found.implementation,
            "implementation": self.implementation,
            "refused": dict(self.refused),
            "config": None if self.config is None else _plain(self.config),
            "config_source": self.config_source,
            "flops": self.flops,
            "bytes": self.bytes,
            "scope": found.scope,
            "source": found.source,
        }

    def __str__(self) -> str:
        """The problem in a few lines."""
        found = self.found
        lines = [("runs on", self.implementation or f"nothing: {found.implementation!r} was asked for, and raises")]
        lines += [(f"not {name}", reason) for name, reason in self.refused]
        if self.config is not None:
            lines.append(("tile", f"{tiles.describe_config(self.config)} ({self.config_source})"))
        work = f"{_amount(self.flops, 'FLOP')}, " if self.flops else ""
        lines.append(("one run", f"{work}{_amount(self.bytes, 'B')}"))
        if found.source:
            lines.append(("called at", found.source))
        title = [_title(found), f"runs {found.runs} x" if found.runs != 1 else "", found.condition or ""]
        title += [f"on each of {found.devices} devices" if found.devices > 1 else "", found.scope or ""]
        return "\n".join([", ".join(filter(None, title)), *(f"    {name:<11}{text}" for name, text in lines)])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Every FP8 problem of a function, in the order in which it runs them. `str()` is meant to be read.

    Attributes:
        platform: what the function would be lowered for: "cuda", "cpu", ...
        device: the kind of GPU at hand; None where there is none, and tiles are those of an H100 or H200.
        problems: one for each equation.
    """

    platform: str
    device: str | None
    problems: tuple[ExplainedProblem, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products in one call of the function, as far as `runs` tells."""
        return sum(problem.found.runs * problem.flops for problem in self.problems)

    @property
    def bytes(self) -> int:
        """Bytes that all problems must read and write at least, in one call of the function."""
        return sum(problem.found.runs * problem.bytes for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as a JSON object."""
        return {
            "platform": self.platform,
            "device": self.device,
            "jax": jax.__version__,
            "flops": self.flops,
            "bytes": self.bytes,
            "problems": [problem.to_json() for problem in self.problems],
        }

    def __str__(self) -> str:
        """A text, a paragraph a problem."""
        where = f"{self.platform} ({self.device})" if self.device and self.platform == "cuda" else self.platform
        count = f"{len(self.problems)} FP8 problem{'' if len(self.problems) == 1 else 's'}"
        if not self.problems:
            return f"{count} for {where}: the function calls nothing of jaxgemm whose result it uses"
        title = f"{count} for {where}: {_amount(self.flops, 'FLOP')}, {_amount(self.bytes, 'B')} a call"
        return "\n\n".join([title, *(f"[{i}] {problem}" for i, problem in enumerate(self.problems, 1))])


def explain(fn: Callable[..., Any], *args: Any, platform: str | None = None, **kwargs: Any) -> Explanation:
    """Says of each FP8 problem in a function what would compute it, and why nothing better would.

    The function is traced, as `jax.jit` does, and neither compiled nor run. Steps whose results nobody uses are left
    out, as the compiler leaves them out. Inside `jax.shard_map`, shapes are those of one device; where the compiler
    splits a function over devices by itself, they are those of the whole product, and each device's share may get
    another tile.

    Args:
        fn: any function that `jax.jit` takes, compiled or not; a gradient or a whole training step, for example.
        *args: its arguments, or `jax.ShapeDtypeStruct`s in their place.
        platform: "cuda", "cpu", ...: what it would be lowered for; None for the default backend. "cuda" needs no GPU:
            without one, the answer is that of an H100 or H200 on which nothing was tuned.
        **kwargs: its keyword arguments; bind one that is called `platform` with `functools.partial`.

    Returns:
        An `Explanation`: print it, or take its `problems` or `to_json()`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxgemm import fp8_dot
        >>> x, w = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
        >>> explanation = explain(fp8_dot, x, w, platform="cpu")
        >>> print(explanation.problems[-1])
        dense 64x512x256, float8_e4m3fn 1x128 by float8_e4m3fn 128x128 -> bfloat16, fp8_fprop
            runs on    xla
            not mosaic it needs a Hopper GPU, and this program is lowered for cpu
            not triton it needs an NVIDIA GPU, and this program is lowered for cpu
            one run    16.8 MFLOP, 213.5 kB
        >>> explanation.to_json()["flops"]
        16777216
    """
    if platform is None:
        platform = jax.default_backend()
    platform = {"gpu": "cuda"}.get(platform, platform)
    problems = tuple(_explained(found, platform) for found in find_problems(fn, *args, **kwargs))
    return Explanation(platform, dispatch.device_kind() if platform == "cuda" else None, problems)


def _explained(found: FoundProblem, platform: str) -> ExplainedProblem:
    if found.implementation is not None:
        reason = dispatch.why_not(found.implementation, found.problem, platform)
        refused = () if reason is None else ((found.implementation, reason),)
        return _with_config(found, None if refused else found.implementation, refused)
    refusals: list[tuple[str, str]] = []
    for name in dispatch.PREFERENCE:
        reason = dispatch.why_not(name, found.problem, platform)
        if reason is None:
            return _with_config(found, name, tuple(refusals))
        refusals.append((name, reason))
    raise AssertionError("'xla' serves everything")


def _with_config(
    found: FoundProblem, implementation: str | None, refused: tuple[tuple[str, str], ...]
) -> ExplainedProblem:
    """Adds what the kernel would be launched with."""
    if implementation in (None, "xla"):
        return ExplainedProblem(found, implementation, refused)
    problem = found.problem
    if 0 in _sizes(found):  # what `dispatch` does then
        return ExplainedProblem(found, "xla", (*refused, (str(implementation), NOTHING_TO_COMPUTE)))
    if isinstance(problem, GemmProblem) and implementation == "triton":
        return ExplainedProblem(found, implementation, refused, dispatch.choose_triton_config(problem), "model")
    if isinstance(problem, GemmProblem):
        choice = dispatch.choose_config(problem)
        return ExplainedProblem(found, implementation, refused, choice.config, choice.source)
    config, source = _quantize_config(problem, found.operands)
    return ExplainedProblem(found, implementation, refused, config, source)


def _quantize_config(problem: QuantizeProblem, inputs: Sequence[jax.ShapeDtypeStruct]) -> tuple[Any, str]:
    """What `dispatch.run_quantize` launches, and whether with the function in front that the problem has."""
    from jaxgemm.kernels import hopper_quantize_plan as plan  # kernels are not loaded with the library

    arrays, _ = problem.split_inputs(inputs)
    shapes, dtype = [x.shape for x in arrays], arrays[0].dtype
    reason = plan.why_not(problem, dtype, shapes)
    if problem.function is None or reason is None:
        return plan.default_config(problem, dtype, math.prod(shapes[0])), "default"
    (plain, _), *_ = problem.results(shapes)
    return plan.default_config(
        plain, dtype, math.prod(shapes[0])
    ), f"default, with {problem.function} left to XLA: {reason}"


def _sizes(found: FoundProblem) -> tuple[int, ...]:
    problem = found.problem
    if isinstance(problem, GemmProblem):
        return problem.m, problem.n, problem.k, problem.num_groups
    return tuple(size for x in found.operands for size in x.shape)


def _title(found: FoundProblem) -> str:
    """What is computed, in one line."""
    problem = found.problem
    if isinstance(problem, QuantizeProblem):
        arrays, _ = problem.split_inputs(found.operands)
        inputs = " and ".join("x".join(map(str, x.shape)) for x in arrays)
        rows = {"masked": "masked rows of ", "segments": f"{problem.num_groups} groups of rows of "}.get(
            problem.rows, ""
        )
        function = f"{problem.function} of " if problem.function else ""
        outputs = [name for name in ("natural", "transposed", "column_sum", "hidden") if getattr(problem, name)]
        formats = f"{found.operands[0].dtype} -> {problem.dtype} {_block(problem.block_shape)}"
        return f"quantize {rows}{function}{inputs}, {formats} ({', '.join(outputs)})"
    lhs = f"{problem.lhs_dtype} {_block(problem.lhs_block_shape)}"
    rhs = f"{problem.rhs_dtype} {_block(problem.rhs_block_shape)}"
    epilogue = [
        "bias" if problem.has_bias else "",
        problem.activation or "",
        "accumulate" if problem.accumulate else "",
    ]
    fused = "".join(f" + {name}" for name in epilogue if name)
    return f"{describe(problem)}, {lhs} by {rhs}{fused} -> {problem.out_dtype}"


def _block(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _shape(x: jax.ShapeDtypeStruct) -> dict[str, Any]:
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def _plain(description: Any) -> dict[str, Any]:
    """A dataclass of numbers, names, dtypes and tuples as a JSON object."""
    return {
        name: str(value) if isinstance(value, np.dtype) else list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(description).items()
    }


def _amount(number: int, unit: str) -> str:
    """A number in three or four digits, with the prefix that takes."""
    value = float(number)
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000:
            return f"{value:.4g} {prefix}{unit}" if not prefix else f"{value:.1f} {prefix}{unit}"
        value /= 1000
    return f"{value:.1f} P{unit}"
