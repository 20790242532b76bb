"""The roofline plot: what was reached, under what the memory and the matrix units of the same GPU allow."""

import pathlib

from jaxgemm.bench.report import Report
from jaxgemm.bench.rows import OWN


def plot(report: Report, path: pathlib.Path) -> None:
    """Writes a plot of operations (or bytes) a second over operations a byte, all of it measured in this run.

    The slope is the bandwidth of a copy. The ceiling is the fastest product of the run by anybody.

    Args:
        report: of `bench gemm`, `dense` or `grouped`; `bench quantize` has no operations, and shows GB/s over bytes.
        path: file to write; its suffix says in which format.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'jaxgemm[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    by_bytes = report["command"] == "quantize"
    names = dict.fromkeys(name for row in report["rows"] for name in row["times"])
    for name in names:
        rows = [row for row in report["rows"] if name in row["times"]]
        x = [row["bytes"] if by_bytes else row["flops"] / row["bytes"] for row in rows]
        y = [row["times"][name]["gbps" if by_bytes else "tflops"] for row in rows]
        axes.scatter(x, y, label=name, s=22, marker="o" if name.startswith(OWN) else "x", zorder=3)
    _draw_limits(axes, report, by_bytes)
    axes.set(
        xscale="log",
        yscale="linear" if by_bytes else "log",
        xlabel="bytes read and written" if by_bytes else "operations a byte (FP8 operands)",
        ylabel="GB/s" if by_bytes else "TFLOP/s",
        title=f"jaxgemm.bench {report['command']}, {report['environment']['gpu']}",
    )
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _draw_limits(axes, report: Report, by_bytes: bool) -> None:
    copy = report["limits"].get("copy_gbps")
    if by_bytes:
        if copy:
            axes.axhline(copy, color="gray", linestyle="--", label="copy, measured")
        return
    rates = [time["tflops"] for row in report["rows"] for time in row["times"].values()]
    reached = [row["flops"] / row["bytes"] for row in report["rows"] if row["times"]]
    if not reached:
        return
    low, high = 0.7 * min(reached), 1.4 * max(reached)
    intensities = [low * (high / low) ** (i / 199) for i in range(200)]
    ceiling = max(rates, default=0.0)
    if copy and ceiling:
        limit = [min(copy * 1e-3 * intensity, ceiling) for intensity in intensities]
        axes.plot(intensities, limit, color="gray", linestyle="--", label="copy and fastest product, measured")
