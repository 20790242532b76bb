"""The shapes that are measured: of DeepGEMM's tests, of Llama, Mixtral and DeepSeek-V3, of a file, or by hand."""

import dataclasses
import functools
import importlib.resources
import itertools
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

SMALL_M = 128
"""Up to so many rows a product reads weights and does little else: it is measured cold."""

DEEPGEMM_NK = (
    (4096, 7168),
    (7168, 16384),
    (24576, 1536),
    (2112, 7168),
    (7168, 2048),
    (32768, 512),
    (576, 7168),
)
DEEPGEMM_DGRAD = (
    (4096, 7168, 4096),
    (4096, 16384, 7168),
    (4096, 1536, 24576),
    (4096, 2048, 7168),
    (4096, 512, 32768),
)
DEEPGEMM_WGRAD = (
    (4096, 4096, 7168),
    (7168, 4096, 16384),
    (7168, 4096, 2048),
    (24576, 4096, 1536),
)
LLAMA_NK = (  # 8B, then 70B: query-key-value, attention's output, gate and up, down
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
)
MIXTRAL_ATTENTION_NK = ((6144, 4096), (4096, 4096))  # 8x7B: query-key-value, output
MIXTRAL_EXPERT_NK = ((28672, 4096), (4096, 14336))  # of one of eight experts: gate and up, down
DEEPSEEK_V3_NK = (  # arXiv 2412.19437, 4.2: down and up projections of latent attention, output, dense and expert MLPs
    (2112, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (36864, 7168),
    (7168, 18432),
    (4096, 7168),
    (7168, 2048),
)
SMALL_ROWS = (1, 7, 16, 64, 128)


@dataclasses.dataclass(frozen=True)
class GemmCase:
    """One product `[m, k] x [n, k] -> [m, n]`.

    Attributes:
        group: what kind of case it is called; ratios are averaged by it.
        m: rows of lhs.
        n: rows of rhs.
        k: the contracted axis.
        kind: "dense" (lhs 1x128, rhs 128x128, bfloat16 out) or "wgrad" (both 1x128, float32 out).
    """

    group: str
    m: int
    n: int
    k: int
    kind: str = "dense"

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"{self.group} {self.m}x{self.n}x{self.k}"

    @property
    def is_small(self) -> bool:
        """Whether reading the weights is nearly all there is to it."""
        return self.kind == "dense" and self.m <= SMALL_M


def gemm_cases(suite: str) -> list[GemmCase]:
    """Returns the cases of a suite by name, or of a JSON file: a list of objects with m, n, k and maybe kind, group.

    Raises:
        ValueError: if there is no such suite or file, or the file holds something else.
    """
    match suite:
        case "deepgemm":
            return [
                *_products("large", (4096, 8192), DEEPGEMM_NK),
                GemmCase("large", 8192, 8192, 8192),
                *(GemmCase("dgrad", *shape) for shape in DEEPGEMM_DGRAD),
                *(GemmCase("wgrad", *shape, "wgrad") for shape in DEEPGEMM_WGRAD),
                *_products("small", SMALL_ROWS, DEEPGEMM_NK),
            ]
        case "llama":
            return [*_products("large", (8192,), LLAMA_NK), *_products("small", (1, 16, 128), LLAMA_NK)]
        case "mixtral":  # of 8192 tokens, each to two of eight experts, an expert gets 2048
            return [
                *_products("large", (8192,), MIXTRAL_ATTENTION_NK),
                *_products("large", (2048,), MIXTRAL_EXPERT_NK),
                *_products("small", (1, 16, 128), MIXTRAL_ATTENTION_NK + MIXTRAL_EXPERT_NK),
            ]
        case "deepseek-v3":
            return [*_products("large", (4096,), DEEPSEEK_V3_NK), *_products("small", (1, 16, 128), DEEPSEEK_V3_NK)]
    return _cases_of_file(pathlib.Path(suite))


def deepgemm_ratio(case: GemmCase) -> float | None:
    """Returns how many times as fast as cuBLASLt's FP8 product with one scale a tensor DeepGEMM is on an H100.

    That product is the yardstick by which figures of different machines and methods can be compared.
    """
    return deepgemm_figures()["ratios"].get(f"{case.kind} {case.m}x{case.n}x{case.k}")


@functools.cache
def deepgemm_figures() -> dict[str, Any]:
    """Returns what was measured of DeepGEMM: `ratios` of dense products, and `rates` in TFLOP/s of grouped ones."""
    source = importlib.resources.files("jaxgemm.bench") / "deepgemm_h100.json"
    return json.loads(source.read_text())


def cases_of_sizes(m: Sequence[int], n: Sequence[int], k: Sequence[int], kind: str = "dense") -> list[GemmCase]:
    """Returns every combination of the given sizes."""
    group = "wgrad" if kind == "wgrad" else "shape"
    return [GemmCase(group, *sizes, kind) for sizes in itertools.product(m, n, k)]


def _products(group: str, rows: Iterable[int], weights: Iterable[tuple[int, int]]) -> list[GemmCase]:
    return [GemmCase(group, m, n, k) for m, (n, k) in itertools.product(rows, weights)]


def _cases_of_file(path: pathlib.Path) -> list[GemmCase]:
    if not path.is_file():
        raise ValueError(f"--suite must be deepgemm, llama, mixtral, deepseek-v3 or a JSON file, got {str(path)!r}")
    try:
        cases = [GemmCase(**{"group": "file", **case}) for case in json.loads(path.read_text())]
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} must hold a list of objects with m, n, k and maybe kind, group: {error}") from None
    for case in cases:
        sizes = (case.m, case.n, case.k)
        if case.kind not in ("dense", "wgrad") or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{path}: m, n, k must be positive integers and kind dense or wgrad, got {case}")
    return cases
