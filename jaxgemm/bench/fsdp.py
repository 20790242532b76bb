"""`bench fsdp`: layers whose weights are split over all GPUs of a host, forward and backward, beside bfloat16.

Each device has a share of the rows and a share of each weight (FSDP). The compiler gathers weights as they are needed;
with `fp8_dot` it gathers them in FP8.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgemm
from jaxgemm.bench import accuracy, hlo
from jaxgemm.bench.dense import DenseCase
from jaxgemm.bench.measure import Call, WallTimer, temporary_mib
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

PEERS = ("xla-bf16",)
TIMER = WallTimer
"""Kernels of several devices overlap: their durations do not add up to the time of a step."""

AXIS = "fsdp"


class FsdpCase(DenseCase):
    """Linear layers, one after the other, their rows and weights split over all devices."""

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return f"fsdp: {super().name}, {jax.device_count()} devices"


def fsdp_cases() -> list[FsdpCase]:
    """Returns an MLP with many rows, and one with few, where gathering weights counts most."""
    return [FsdpCase(rows, (4096, 14336, 4096)) for rows in (16384, 2048)]


def run_case(case: FsdpCase, setup: Setup) -> list[Row]:
    """Measures a step by the host's clock, and counts the bytes that it moves between devices."""
    devices = jax.device_count()
    if devices < 2:
        raise ValueError(f"it needs several devices, and there is {devices}")
    mesh = jax.make_mesh((devices,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, P(AXIS))
    keys = itertools.count()

    def draw(*shape: int, scale: float = 1.0) -> jax.Array:
        return jax.device_put(normal(next(keys), *shape) * jnp.bfloat16(scale), split)

    x, dout = draw(case.m, case.widths[0]), draw(case.m, case.widths[-1])
    weights = [draw(k, n, scale=k**-0.5) for k, n in itertools.pairwise(case.widths)]

    def step(dot: Any) -> Call:
        def training_step(x: jax.Array, weights: list[jax.Array], dout: jax.Array) -> Any:
            def forward(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
                for w in weights:
                    x = dot(x, w)
                return x

            out, pull_back = jax.vjp(forward, x, weights)
            dx, gradients = pull_back(dout)
            return out, dx, [jax.lax.with_sharding_constraint(g, split) for g in gradients]

        return Call.jitted(training_step, [x, weights, dout])

    calls = {OWN: step(lambda x, w: jaxgemm.fp8_dot(x, w, implementation=setup.implementation))}
    bf16 = step(jnp.matmul)
    result, expected = calls[OWN].first(), bf16.first()
    if "xla-bf16" in setup.peers:
        calls["xla-bf16"] = bf16
    problem = dict(group="fsdp", m=case.m, widths=list(case.widths), devices=devices, cold=False)
    row = Row(case.name, problem, 3 * case.flops, float(stored_bytes(x, weights, dout, result)))
    row.measured(setup, calls)
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    row.checks["largest difference from bf16"] = max(accuracy.difference(a, b) for a, b in pairs)
    for name, call in ((OWN, calls[OWN]), ("xla-bf16", bf16)):
        moved = hlo.collective_bytes(call.function.as_text())  # type: ignore[attr-defined]
        prefix = "" if name == OWN else f"{name} "
        row.checks[f"{prefix}all-gather MiB"] = round(moved.get("all-gather", 0) / 2**20, 2)
        row.checks[f"{prefix}other collectives MiB"] = round(
            sum(size for operation, size in moved.items() if operation != "all-gather") / 2**20, 2
        )
        row.checks[f"{prefix}temp MiB"] = temporary_mib(call)
    return [row]
