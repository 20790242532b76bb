"""Draws docs/dataflow.svg: the three products of a linear layer, with formats and layouts.

python docs/dataflow.py
"""

import pathlib
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1120, 586
ROW, TOP = 82, 84
SOURCE, OPERAND, PRODUCT, RESULT = 30, 250, 640, 900
"""Left edges of the columns."""

INK, PALE, HIGH, FP8, SUM = "#1f2933", "#5b6770", "#eceff1", "#d7e8fb", "#fde8cf"

OPERANDS = (  # name, shape, blocks, axis of the scales, stored scales
    ("x", "m, k", "1x128", "along k", "[k/128, m]"),
    ("wᵀ", "n, k", "128x128", "squares", "[n/128, k/128]"),
    ("w", "k, n", "128x128", "the same, transposed", "[k/128, n/128]"),
    ("dy", "m, n", "1x128", "along n", "[n/128, m]"),
    ("dyᵀ", "n, m", "1x128", "along m", "[m/128, n]"),
    ("xᵀ", "k, m", "1x128", "along m; is kept", "[m/128, k]"),
)
SOURCES = (  # name, what, centre in rows, rows of the operands it becomes
    ("x [m, k]", ("activation", "bf16, f16 or f32"), 0.0, (0, 5)),
    ("w [k, n]", ("weight", "its parameter's dtype"), 1.5, (1, 2)),
    ("dy [m, n]", ("gradient of y", "its column sum: dbias"), 3.5, (3, 4)),
)
PRODUCTS = (  # name, what, contracted axis, result, its dtype
    ("forward", "x w", "k", "y [m, n]", ("+ bias, activation,", "in float32; then rounded")),
    ("data gradient", "dy wᵀ", "n", "dx [m, k]", ("dtype of x",)),
    ("weight gradient", "xᵀ dy", "m", "dw [k, n]", ("dtype of the parameter",)),
)


def main() -> None:
    """Writes the file."""
    pathlib.Path(__file__).with_suffix(".svg").write_text(draw())


def draw() -> str:
    """Returns the figure. It brings its own light ground, so that it reads on a dark page too."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">',
        "<title>Dataflow of forward, data gradient and weight gradient</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{PALE}"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="10" fill="#ffffff" stroke="#c3cbd1"/>',
    ]
    for x, heading in (
        (SOURCE, "high precision"),
        (OPERAND, "FP8 (e4m3), the contracted axis last"),
        (PRODUCT, "FP8 tensor core"),
        (RESULT, "high precision"),
    ):
        parts.append(text(x, 40, heading, size=14, color=PALE))
    for i, operand in enumerate(OPERANDS):
        parts += draw_operand(i, *operand)
    for name, lines, row, targets in SOURCES:
        parts += draw_source(name, lines, row, targets)
    for i, product in enumerate(PRODUCTS):
        parts += draw_product(i, *product)
    note = "Each is quantised both ways in one pass over it: x and dy along m from the original, not from FP8."
    parts += [text(SOURCE, HEIGHT - 22, note, size=13, color=PALE), "</svg>"]
    return "\n".join(parts) + "\n"


def draw_source(name: str, lines: tuple[str, ...], row: float, targets: tuple[int, ...]) -> list[str]:
    """A tensor in high precision, and arrows to what it is quantised to."""
    y = centre(row)
    parts = [box(SOURCE, y - 33, 160, 66, HIGH), text(SOURCE + 12, y - 11, name, weight=600)]
    parts += [text(SOURCE + 12, y + 8 + 16 * i, line, size=12) for i, line in enumerate(lines)]
    for target in targets:
        if abs(target - row) > 1:  # around the other sources, on the left
            parts.append(arrow(f"M{SOURCE},{y} H14 V{centre(target)} H{OPERAND - 2}"))
        elif target == row:
            parts.append(arrow(f"M{SOURCE + 160},{y} H{OPERAND - 2}"))
        else:
            parts.append(arrow(f"M{SOURCE + 160},{y} H220 V{centre(target)} H{OPERAND - 2}"))
    return parts


def draw_operand(row: int, name: str, shape: str, blocks: str, axis: str, stored: str) -> list[str]:
    """An FP8 operand with a picture of its scaling blocks, and an arrow to its product."""
    y, product_y = centre(row), centre(2 * (row // 2) + 0.5)
    parts = [box(OPERAND, y - 33, 320, 66, FP8), *blocks_icon(OPERAND + 12, y - 20, blocks)]
    parts += [
        text(OPERAND + 66, y - 12, f"{name} [{shape}]", weight=600),
        text(OPERAND + 66, y + 6, f"scales {blocks.replace('x', '×')}, {axis}", size=12),
        text(OPERAND + 66, y + 22, f"scales stored {stored}", size=12, color=PALE),
    ]
    end = product_y + (-14 if row % 2 == 0 else 14)
    parts.append(arrow(f"M{OPERAND + 320},{y} H605 V{end} H{PRODUCT - 2}"))
    return parts


def draw_product(index: int, name: str, formula: str, axis: str, result: str, lines: tuple[str, ...]) -> list[str]:
    """A product and its result."""
    y = centre(2 * index + 0.5)
    contracts = f"{formula}, contracts {axis};"
    parts = [box(PRODUCT, y - 38, 205, 76, SUM), text(PRODUCT + 12, y - 15, name, weight=600)]
    parts += [text(PRODUCT + 12, y + 5, contracts, size=12)]
    parts += [text(PRODUCT + 12, y + 22, f"float32 sum, every 128 of {axis}", size=12)]
    parts += [arrow(f"M{PRODUCT + 205},{y} H{RESULT - 2}"), box(RESULT, y - 33, 190, 66, HIGH)]
    parts += [text(RESULT + 12, y - 11, result, weight=600)]
    return parts + [text(RESULT + 12, y + 8 + 16 * i, line, size=12) for i, line in enumerate(lines)]


def blocks_icon(x: float, y: float, blocks: str) -> list[str]:
    """A matrix cut into its scaling blocks: rows of 1x128, or squares."""
    rows, columns = (8, 2) if blocks == "1x128" else (2, 2)
    lines = [f'<rect x="{x}" y="{y}" width="40" height="40" fill="#ffffff" stroke="{INK}"/>']
    for i in range(1, rows):
        lines.append(f'<path d="M{x},{y + 40 * i / rows:g} h40" stroke="{INK}" stroke-width="0.7"/>')
    for i in range(1, columns):
        lines.append(f'<path d="M{x + 40 * i / columns:g},{y} v40" stroke="{INK}" stroke-width="0.7"/>')
    return lines


def centre(row: float) -> float:
    """The middle of a row, which may lie between two."""
    return TOP + ROW * row + 6


def box(x: float, y: float, width: float, height: float, fill: str) -> str:
    """A rounded box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="7" fill="{fill}" stroke="#9aa5ae"/>'


def arrow(path: str) -> str:
    """A line with a tip."""
    return f'<path d="{path}" fill="none" stroke="{PALE}" stroke-width="1.4" marker-end="url(#tip)"/>'


def text(x: float, y: float, words: str, size: int = 15, weight: int = 400, color: str = INK) -> str:
    """Words from the left."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{color}">{escape(words)}</text>'


if __name__ == "__main__":
    main()
