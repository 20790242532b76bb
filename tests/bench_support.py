"""What the tests of the benchmark share: a timer in CUPTI's place, and a report by hand."""

import jax

from jaxgemm.bench import report
from jaxgemm.bench.__main__ import main
from jaxgemm.bench.measure import Timing
from jaxgemm.bench.rows import Row, Setup


class SteadyTimer:
    """Runs each call, and says that it took 100 microseconds: tests must not hang on how fast the machine is."""

    method = "steady clock"

    def __init__(self):
        self.calls = 0

    def __call__(self, call, iterations):
        for _ in range(iterations):
            jax.block_until_ready(call())
            self.calls += 1
        return Timing((100.0,) * iterations, 100.0, {"everything": 100.0})


def bench(*arguments):
    """Runs the command line with the steady clock; small iterations, small copy."""
    quick = () if arguments[0] == "readme" else ("--iterations", "2", "--rounds", "1")
    return main([*arguments, *quick], timer=SteadyTimer(), copy_bytes=1 << 20)


def sample_report(case="large 1x1x1", us=100.0, peer_us=150.0, **changes):
    """A report as a file would hold it."""
    row = Row(case, dict(group=case.split()[0], m=1, n=1, k=1, cold=changes.pop("cold", False)), 2e9, 1e6)
    row.times = {"jaxgemm": Timing((us,), us), "xla-bf16": Timing((peer_us,), peer_us)}
    row.checks["difference"] = 1.5e-6
    setup = Setup(SteadyTimer())
    made = report.new_report("gemm", "--suite x", "steady clock", {"copy_gbps": 1000.0}, setup)
    return {**made, "rows": [row.to_json()], **changes}
