"""Flax layers whose products are FP8: `jaxgemm.flax.linen` and `jaxgemm.flax.nnx`.

Each submodule is imported when it is first named, so that Linen alone does not load NNX and the reverse.
"""

import importlib
from types import ModuleType

__all__ = ["linen", "nnx"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
