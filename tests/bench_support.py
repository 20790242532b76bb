"""What the tests of the benchmark share: a timer by the host's clock in CUPTI's place, and a report by hand."""

import time

import jax

from jaxgemm.bench import report
from jaxgemm.bench.__main__ import main
from jaxgemm.bench.measure import Timing
from jaxgemm.bench.rows import Row, Setup


class HostTimer:
    """Times whole calls by the host's clock: for tests, where there is no GPU."""

    method = "host clock"

    def __init__(self):
        self.calls = 0

    def __call__(self, call, iterations):
        samples = []
        for _ in range(iterations):
            start = time.perf_counter()
            jax.block_until_ready(call())
            samples.append(1e6 * (time.perf_counter() - start))
            self.calls += 1
        return Timing(tuple(samples), sum(samples) / iterations, {"everything": sum(samples) / iterations})


def bench(*arguments):
    """Runs the command line with the host's clock; small iterations, small copy."""
    quick = () if arguments[0] == "readme" else ("--iterations", "2", "--rounds", "1")
    return main([*arguments, *quick], timer=HostTimer(), copy_bytes=1 << 12)


def sample_report(case="large 1x1x1", us=100.0, peer_us=150.0, **changes):
    """A report as a file would hold it."""
    row = Row(case, dict(group=case.split()[0], m=1, n=1, k=1, cold=changes.pop("cold", False)), 2e9, 1e6)
    row.times = {"jaxgemm": Timing((us,), us), "xla-bf16": Timing((peer_us,), peer_us)}
    row.checks["difference"] = 1.5e-6
    setup = Setup(HostTimer())
    made = report.new_report("gemm", "--suite x", "host clock", {"copy_gbps": 1000.0}, setup)
    return {**made, "rows": [row.to_json()], **changes}
