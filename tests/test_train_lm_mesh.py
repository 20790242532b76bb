"""The language model on several devices: same losses on every mesh, resumed onto another, and with two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import train_lm  # noqa: E402
from lm import placement  # noqa: E402

ROOT = Path(__file__).parents[1]
FLAGS = (
    "--d-model 128 --layers 1 --heads 4 --d-ff 256 --seq 16 --batch 4 --checkpoint-every 4 --only fp8 --lr 5e-4".split()
)
STEPS = ["--steps", "8", "--evaluate-every", "8"]

DRIFT = 2e-2
"""Bound on losses after the first: sums in another order round otherwise, Adam's first steps take the sign of gradients
near zero, and FP8 steps from one value to the next. In these steps the loss falls by a third."""


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_two_processes(flags):
    """Two processes of two devices each, on this machine."""
    xla_flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"  # of one flag, the last counts
    environment = {**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "examples/train_lm.py", *flags, "--coordinator", f"127.0.0.1:{free_port()}"]
    processes = [
        subprocess.Popen(
            [*command, "--num-processes", "2", "--process-id", str(i)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


def run_metrics(directory):
    return json.loads((directory / "metrics.json").read_text())["runs"]["fp8"]


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_two_processes_train_as_one_does_and_their_run_is_resumed_on_another_mesh(tmp_path):
    alone, several = tmp_path / "alone", tmp_path / "several"
    expected = train_lm.main([*FLAGS, *STEPS, "--out", str(alone)])["runs"]["fp8"]
    run_two_processes([*FLAGS, *STEPS, "--mesh", "fsdp=2,tp=2", "--out", str(several)])
    got = run_metrics(several)
    assert got["train_losses"][0] == pytest.approx(expected["train_losses"][0], rel=1e-6)
    assert got["train_losses"] == pytest.approx(expected["train_losses"], rel=DRIFT)
    assert got["validation_loss"] == pytest.approx(expected["validation_loss"], rel=DRIFT)

    # As after a kill at step 4, on eight devices.
    (several / "checkpoints_fp8" / "8").rename(tmp_path / "last")
    resumed = train_lm.main([*FLAGS, *STEPS, "--mesh", "fsdp=4,tp=2", "--out", str(several), "--resume"])["runs"]["fp8"]
    assert resumed["train_losses"][:4] == got["train_losses"][:4]
    assert resumed["train_losses"] == pytest.approx(got["train_losses"], rel=DRIFT)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_parameters_are_split_as_documented():
    mesh = placement.make_mesh({"fsdp": 2, "tp": 4})
    shape = {"up": (128, 256), "down": (256, 128), "other": (3, 128)}
    state = {"layer_up": {"kernel": shape["up"], "bias": shape["up"][1:]}, "layer_down": {"kernel": shape["down"]}}
    state = {"mu": {**state, "head": {"kernel": shape["other"]}}}
    arrays = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, "float32"), state, is_leaf=lambda s: isinstance(s, tuple))
    specs = jax.tree.map(lambda s: s.spec, placement.state_shardings(mesh, arrays))["mu"]
    assert specs["layer_up"] == {"kernel": jax.P("fsdp", "tp"), "bias": jax.P("tp")}
    assert specs["layer_down"]["kernel"] == jax.P("tp", "fsdp")
    assert specs["head"]["kernel"] == jax.P(None, "fsdp")


@pytest.mark.parametrize("text", ["fsdp", "fsdp=0", "data=2", "fsdp=2,fsdp=2"])
def test_a_bad_mesh_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        train_lm.main(["--mesh", text])
    assert "must be like fsdp=2,tp=4" in capsys.readouterr().err
