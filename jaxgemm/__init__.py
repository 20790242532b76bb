"""FP8 matrix products for JAX with fine-grained scales.

`fp8_dot`, `grouped_fp8_dot`, `masked_grouped_fp8_dot`, `fp8_dot_general` and `fp8_mlp` take float arrays and
differentiate; `gemm` and its family take `ScaledArray`s, which `quantize` makes. The recipe is that of DeepSeek-V3
(https://arxiv.org/abs/2412.19437, section 3.3).
"""

import importlib
from types import ModuleType

from jaxgemm import layout
from jaxgemm.autotune import autotune
from jaxgemm.dot import fp8_dot, fp8_dot_general, grouped_fp8_dot, masked_grouped_fp8_dot
from jaxgemm.explain import explain
from jaxgemm.gemm import gemm, grouped_gemm, k_grouped_gemm, masked_grouped_gemm
from jaxgemm.mlp import fp8_mlp
from jaxgemm.quantize import dequantize, quantize, quantize_both, quantize_grouped, quantize_transposed
from jaxgemm.recipe import DEEPSEEK, Recipe
from jaxgemm.scaled_array import ScaledArray

__version__ = "0.1.0"

__all__ = [
    "DEEPSEEK",
    "Recipe",
    "ScaledArray",
    "autotune",
    "dequantize",
    "explain",
    "fp8_dot",
    "fp8_dot_general",
    "fp8_mlp",
    "gemm",
    "grouped_fp8_dot",
    "grouped_gemm",
    "k_grouped_gemm",
    "layout",
    "masked_grouped_fp8_dot",
    "masked_grouped_gemm",
    "quantize",
    "quantize_both",
    "quantize_grouped",
    "quantize_transposed",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `jaxgemm.flax` when it is first named: a program without Flax never loads it."""
    if name == "flax":
        return importlib.import_module("jaxgemm.flax")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
