"""Names of the parts of a program: what profiles and reports call the work of this library."""

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any

import jax

SCOPE_PREFIX = "fp8_"
"""Names of this library's `jax.named_scope`s start so."""

_parts: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("parts", default=())


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Names what is traced inside: "fprop", "dgrad", ...; by a `jax.named_scope`, and in the names of kernels.

    NOTE: XLA runs kernels in CUDA graphs, and of one in a graph a profile shows no scope, only its name.
    """
    token = _parts.set((*_parts.get(), name))
    try:
        with jax.named_scope(SCOPE_PREFIX + name):
            yield
    finally:
        _parts.reset(token)


def kernel_label() -> str:
    """Returns what the name of a kernel should say of its part in the program: "fprop", "mlp_up_backward_dgrad", ..."""
    return "_".join(_parts.get())


def scope_names(name_stack: Any) -> list[str]:
    """Returns the names in a name stack of JAX, the outermost first, without the transformations around them."""
    names = str(name_stack).split("/")
    return [name.rpartition("(")[2].rstrip(")") for name in names if name]


def own_scope(names: Iterable[str]) -> str | None:
    """Returns the names among them that are this library's, as one: "fp8_dgrad", "fp8_mlp_up_backward/fp8_dgrad"."""
    return "/".join(name for name in names if name.startswith(SCOPE_PREFIX)) or None
