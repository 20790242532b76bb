"""What a compiled program multiplies beside this library's kernels."""

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


def _definitions(hlo: str) -> Iterator[tuple[str, str, str, str]]:
    for line in hlo.splitlines():
        if match := DEFINITION.match(line):
            yield match["name"], match["type"], match["operation"], match["rest"]


def _dimensions(text: str) -> set[int]:
    """Returns all sizes of axes in a piece of text with shapes, such as `bf16[8,16]{1,0}`."""
    return {int(size) for axes in SHAPE.findall(text) for size in axes.split(",") if size}
