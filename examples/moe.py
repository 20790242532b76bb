"""Trains a small language model of experts twice, in high precision and in FP8, and compares the two.

Each feed-forward layer is a mixture of experts (`lm/mixture.py`): a router sends every token to its best `--top-k`
experts, and `jaxgemm.grouped_fp8_dot` serves all experts with one product; the other run has `jax.lax.ragged_dot` in
its place. A loss keeps the experts evenly busy. The text is the source code of the running Python's standard library,
so there is nothing to download. Both runs start from the same parameters and see the same batches.

    python examples/moe.py                    # about a minute on two CPU cores
    python examples/moe.py --preset mixtral   # one layer of Mixtral 8x7B's size, 8192 tokens a step: for a GPU

Prints the final losses, their relative gap and what share of the tokens each expert got, and leaves `loss.png` and
`metrics.json` in --out. Without --resume, what an earlier run left there is removed before the first step; with it, all
settings must be those of --out's `settings.json`.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm.command import add_flags, compare, make_settings, transformer_fields
from lm.mixture import MixtureTransformer
from lm.placement import make_mesh, parse_mesh
from lm.training import Settings

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        steps=200, batch=8, seq=64, d_model=128, layers=2, heads=4, d_ff=128, experts=8, top_k=2, lr=3e-3,
        implementation=None,
    ),
    "mixtral": dict(
        steps=100, batch=4, seq=2048, d_model=4096, layers=1, heads=32, d_ff=14336, experts=8, top_k=2, lr=3e-4,
        implementation=None, checkpoint_every=0,  # 18 GB each
    ),
}  # fmt: skip


@dataclass(frozen=True)
class MixtureSettings(Settings):
    """Settings of a run, with those of its experts."""

    experts: int
    top_k: int
    balance_weight: float
    implementation: str | None


def make_model(settings: MixtureSettings, fp8: bool) -> MixtureTransformer:
    """The model of these settings; float32 parameters, computing in `settings.dtype`."""
    return MixtureTransformer(
        **transformer_fields(settings, fp8),
        num_experts=settings.experts,
        top_k=settings.top_k,
        balance_weight=settings.balance_weight,
        implementation=settings.implementation,
    )


def print_loads(metrics: dict[str, Any]) -> None:
    """Prints the share of the validation text's rows that each expert of each layer got."""
    print("\nshare of the rows an expert got on the validation text, in %")
    for name, run in metrics["runs"].items():
        for layer, sown in sorted(run["metrics"].items()):
            print(f"{name:>5} {layer:24}" + " ".join(f"{100 * share:5.1f}" for share in sown["load"][0]))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, prints, writes; returns what metrics.json has."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_flags(parser, PRESETS, out="runs/moe")
    parser.add_argument("--balance-weight", type=float, default=0.01, help="of the loss that balances the load")
    parser.add_argument("--implementation", choices=("mosaic", "xla"), help="of the experts' FP8 products")
    arguments = parser.parse_args(argv)
    settings = make_settings(parser, arguments, PRESETS, MixtureSettings)
    if not 1 <= settings.top_k <= settings.experts:
        parser.error(f"--top-k must be from 1 to --experts {settings.experts}, got {settings.top_k}")
    metrics = compare(arguments, settings, make_model, make_mesh(parse_mesh("fsdp=1")))
    print_loads(metrics)
    return metrics


if __name__ == "__main__":
    # A message of the C++ runtime in the middle of a progress bar helps nobody.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
