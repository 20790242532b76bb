"""What a compiled program multiplies beside this library's kernels, and what it moves between devices."""

import math
import re
from collections.abc import Collection, Iterator

DEFINITION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<operation>[\w-]+)\((?P<rest>.*)$"
)
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]")


def plain_products(hlo: str, sizes: Collection[int]) -> list[str]:
    """Returns the instructions of a compiled program that multiply operands other than FP8 with an axis of given size.

    Those are `dot`s, also inside fusions, and calls of cuBLAS; this library's kernels are calls of another name.

    Args:
        hlo: the program's text.
        sizes: of the axes to look for, in operands or result.
    """
    shapes = {name: _dimensions(kind) for name, kind, _, _ in _definitions(hlo)}
    found = []
    for name, kind, operation, rest in _definitions(hlo):
        is_cublas = operation == "custom-call" and "__cublas$" in rest and "$f8" not in rest
        if operation != "dot" and not is_cublas:
            continue
        operands = rest.partition(")")[0]
        axes = _dimensions(kind) | _dimensions(operands)
        for operand in re.findall(r"%?([\w.-]+)", operands):
            axes |= shapes.get(operand, set())
        if axes & set(sizes):
            found.append(name)
    return found


COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-done)?")
TYPED_SHAPE = re.compile(r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<axes>[\d,]*)\]")


def collective_bytes(hlo: str) -> dict[str, int]:
    """Returns the bytes that collective operations leave on each device, by operation.

    An operation inside a loop counts once. One that is started and awaited counts where it is awaited.

    Args:
        hlo: the program's text.

    Example:
        >>> collective_bytes("  %gathered.1 = f8e4m3fn[8,128]{1,0} all-gather(%w), dimensions={0}")
        {'all-gather': 1024}
    """
    moved: dict[str, int] = {}
    for _, kind, operation, _ in _definitions(hlo):
        if match := COLLECTIVE.fullmatch(operation):
            shapes = [(int(m["bits"] or 8), m["axes"]) for m in TYPED_SHAPE.finditer(kind)]
            size = sum(bits * math.prod(int(axis) for axis in axes.split(",") if axis) // 8 for bits, axes in shapes)
            moved[match[1]] = moved.get(match[1], 0) + size
    return moved


def _definitions(hlo: str) -> Iterator[tuple[str, str, str, str]]:
    for line in hlo.splitlines():
        if match := DEFINITION.match(line):
            yield match["name"], match["type"], match["operation"], match["rest"]


def _dimensions(text: str) -> set[int]:
    """Returns all sizes of axes in a piece of text with shapes, such as `bf16[8,16]{1,0}`."""
    return {int(size) for axes in SHAPE.findall(text) for size in axes.split(",") if size}
