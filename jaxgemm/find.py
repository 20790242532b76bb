"""The FP8 problems in a function: which, how often, and from which line of the user's code. Nothing is run."""

import dataclasses
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

from jaxgemm.primitives import GEMM_PRIMITIVES, fp8_quantize_p
from jaxgemm.problem import GemmProblem, QuantizeProblem
from jaxgemm.scopes import own_scope, scope_names

FP8_PRIMITIVES = (*GEMM_PRIMITIVES.values(), fp8_quantize_p)

RUN_ONCE = frozenset(
    {
        "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "shard_map",
        "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin",
    }
)  # fmt: skip
"""Equations that run the function inside them once."""


@dataclasses.dataclass(frozen=True)
class FoundProblem:
    """One FP8 equation of a function.

    Attributes:
        problem: what it computes.
        implementation: the one that the call names, or None.
        operands: shapes and dtypes of the stored arrays it reads.
        results: those of the arrays it writes.
        runs: how often it runs in one call of the function: lengths of the scans around it, multiplied.
        condition: what `runs` cannot say: an unknown number of iterations, or a branch; None if `runs` is exact.
        devices: how many devices each run it, inside `shard_map`; shapes are one device's there.
        scope: this library's named scopes: "fp8_fprop", "fp8_dgrad", "fp8_mlp_up_backward/fp8_wgrad", ...; or None.
        source: "file:line (function)" of the innermost frame outside of JAX, Flax and this library; or None.
    """

    problem: GemmProblem | QuantizeProblem
    implementation: str | None
    operands: tuple[jax.ShapeDtypeStruct, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    runs: int = 1
    condition: str | None = None
    devices: int = 1
    scope: str | None = None
    source: str | None = None

    @property
    def kind(self) -> str:
        """ "quantize", or the kind of the product."""
        return self.problem.kind if isinstance(self.problem, GemmProblem) else "quantize"

    @property
    def bytes(self) -> int:
        """Bytes that one run must read and write at least: every stored operand and result once."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (*self.operands, *self.results))


def find_problems(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[FoundProblem, ...]:
    """Returns the FP8 problems of a function, in the order in which it runs them; those without effect are left out.

    Args:
        fn: any function that `jax.jit` takes, compiled or not.
        *args: its arguments; `jax.ShapeDtypeStruct`s will do.
        **kwargs: likewise.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxgemm.dot import fp8_dot
        >>> x, w = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256, 512), jnp.bfloat16)
        >>> [found.kind for found in find_problems(fp8_dot, x, w)]
        ['quantize', 'quantize', 'dense']
    """
    traced: Any = fn.trace(*args, **kwargs) if isinstance(fn, jax.stages.Wrapped) else None
    if not hasattr(traced, "jaxpr"):  # not compiled, or by a wrapper of `jax.jit` that hides it, such as Flax's
        traced = jax.jit(fn).trace(*args, **kwargs)
    jaxpr = _open(traced.jaxpr)
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # as the compiler will
    return tuple(_problems(live, _Around()))


def describe(problem: GemmProblem) -> str:
    """Returns a product in a few words.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> e4m3, bf16 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.bfloat16)
        >>> describe(GemmProblem("masked", 64, 4096, 7168, e4m3, e4m3, (1, 128), (128, 128), bf16, num_groups=8))
        'masked 8 groups of 64x4096x7168'
    """
    sizes = f"{problem.m}x{problem.n}x{problem.k}"
    groups = {
        "dense": "",
        "masked": f"{problem.num_groups} groups of ",
        "k_masked": f"{problem.num_groups} groups of ",
    }.get(problem.kind, f"{problem.num_groups} groups in ")
    expected = "" if problem.expected_m is None else f", expected_m={problem.expected_m}"
    return f"{problem.kind} {groups}{sizes}{expected}"


@dataclasses.dataclass(frozen=True)
class _Around:
    """What the equations around one say about it."""

    runs: int = 1
    conditions: tuple[str, ...] = ()
    devices: int = 1
    scopes: tuple[str, ...] = ()
    source: str | None = None

    def inside(self, eqn: JaxprEqn) -> "_Around":
        """Returns what holds for the equations of the functions inside `eqn`."""
        name, params = eqn.primitive.name, eqn.params
        source = _source(eqn) or self.source  # what JAX traces later, on its own, knows no line of the user's
        around = dataclasses.replace(self, scopes=(*self.scopes, *_scopes(eqn)), source=source)
        if name == "scan":
            return dataclasses.replace(around, runs=self.runs * params["length"])
        if name == "shard_map":
            axes = params.get("manual_axes", params["mesh"].axis_names)
            return dataclasses.replace(around, devices=math.prod((params["mesh"].shape[a] for a in axes), start=1))
        if name in RUN_ONCE:
            return around
        condition = {
            "while": "in each iteration of a while loop",
            "cond": "if its branch is taken",
        }.get(name, f"as often as {name} runs it")
        return dataclasses.replace(around, conditions=(*self.conditions, condition))


def _problems(jaxpr: Jaxpr, around: _Around) -> Iterator[FoundProblem]:
    for eqn in jaxpr.eqns:
        if eqn.primitive in FP8_PRIMITIVES:
            yield FoundProblem(
                eqn.params["problem"],
                eqn.params["implementation"],
                tuple(_shape(v.aval) for v in eqn.invars),
                tuple(_shape(v.aval) for v in eqn.outvars),
                around.runs,
                ", ".join(dict.fromkeys(around.conditions)) or None,
                around.devices,
                own_scope((*around.scopes, *_scopes(eqn))),
                _source(eqn) or around.source,
            )
            continue
        for inner in _functions_inside(eqn.params.values()):
            yield from _problems(inner, around.inside(eqn))


def _functions_inside(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield _open(value)
        elif isinstance(value, list | tuple):
            yield from _functions_inside(value)


def _open(jaxpr: Any) -> Jaxpr:
    """Returns a jaxpr without its constants, whether JAX keeps the two apart (before 0.12) or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shape(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _scopes(eqn: JaxprEqn) -> list[str]:
    return scope_names(eqn.source_info.name_stack)


def _source(eqn: JaxprEqn) -> str | None:
    """The user's line: what `source_info` holds is not documented, and may be missing."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        if not frame.file_name.startswith((*_library_folders(), "<frozen", "<string")):
            return f"{frame.file_name}:{frame.line_num} ({frame.function_name})"
    return None


@functools.cache
def _library_folders() -> tuple[str, ...]:
    """Folders of the libraries between an equation and the user's code."""
    specs = [importlib.util.find_spec(name) for name in ("jax", "jaxlib", "flax", "jaxgemm")]
    origins = [os.path.dirname(spec.origin) + os.sep for spec in specs if spec is not None and spec.origin]
    standard = os.path.dirname(functools.__file__) + os.sep
    return (*origins, *(standard + name for name in ("functools.py", "contextlib.py")))
