"""The examples: the language model resumes to the same bits after a kill, README shows what is printed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import moe  # noqa: E402
import train_lm  # noqa: E402
from lm import text  # noqa: E402

ROOT = Path(__file__).parents[1]
TINY = "--d-model 32 --layers 1 --heads 2 --d-ff 48 --seq 16 --batch 2 --checkpoint-every 20".split()


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def wait_for(path, process, seconds):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name} was there"
        assert time.monotonic() < deadline, f"{path.name} is not there after {seconds} s"
        time.sleep(0.01)


def test_language_model_resumes_to_the_same_bits_after_a_kill(tmp_path):
    flags = [*TINY, "--steps", "200", "--only", "fp8"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "examples/train_lm.py", *flags, "--out", str(killed)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(killed / "checkpoints_fp8" / "20", process, seconds=300)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()

    resumed = train_lm.main([*flags, "--out", str(killed), "--resume"])["runs"]["fp8"]
    uninterrupted = train_lm.main([*flags, "--out", str(whole)])["runs"]["fp8"]
    assert len(resumed["train_losses"]) == 200
    for key in ("train_losses", "validation_losses", "parameters_sha256"):
        assert resumed[key] == uninterrupted[key]


def test_language_model_compares_two_runs(tmp_path, capsys):
    out = tmp_path / "out"
    metrics = train_lm.main([*TINY, "--steps", "60", "--lr", "1e-2", "--out", str(out)])
    assert set(metrics["runs"]) == {"f32", "fp8"}
    f32, fp8 = metrics["runs"]["f32"], metrics["runs"]["fp8"]
    # The first loss is of equal parameters, and differs by the rounding to FP8 alone.
    assert f32["train_losses"][0] == pytest.approx(fp8["train_losses"][0], rel=1e-2)
    assert f32["train_losses"] != fp8["train_losses"]
    assert abs(metrics["relative_gap"]["validation_loss"]) < 0.05
    assert f32["validation_loss"] < f32["train_losses"][0] - 1
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "validation loss" in printed and "byte entropy" in printed

    with pytest.raises(SystemExit, match="batch was 2, is 3"):
        train_lm.main([*TINY, "--steps", "60", "--lr", "1e-2", "--batch", "3", "--out", str(out), "--resume"])


def test_text_is_split_by_file_and_entropy_is_that_of_its_bytes():
    train, validation = text.load_standard_library()
    assert 0.02 < validation.num_files / train.num_files < 0.3
    assert train.data.dtype == np.uint8
    # A file is on one side only, whole.
    json_source = Path(json.__file__).read_bytes()
    assert (json_source in train.data.tobytes()) != (json_source in validation.data.tobytes())
    assert text.Text(np.array([1, 1, 2, 2], np.uint8), 1).order0_entropy() == pytest.approx(np.log(2))


def test_windows_stay_in_the_text():
    data = jnp.arange(20, dtype=jnp.uint8)
    even = text.even_windows(data, 4, 7)
    assert even[:, 0].tolist() == [0, 4, 8, 12] and even[:, -1].tolist() == [7, 11, 15, 19]
    starts = text.random_windows(data, jax.random.key(0), 500, 7)[:, 0]
    assert set(starts.tolist()) == set(range(13))


def test_quickstart_prints_what_readme_shows():
    readme = (ROOT / "README.md").read_text()
    shown_code, shown_output = re.search(r"```python\n(import jax\n.*?)```.*?```text\n(.*?)```", readme, re.S).groups()
    source = (ROOT / "examples/quickstart.py").read_text()
    assert source.endswith("\n\n" + shown_code)
    command = [sys.executable, "examples/quickstart.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == shown_output


def test_moe_layer_is_the_weighted_sum_of_each_tokens_experts():
    sizes = moe.Sizes(num_experts=4, top_k=2, d_model=32, d_ff=48)
    params = moe.init_params(sizes, jax.random.key(0))
    params = params._replace(up_bias=jax.random.normal(jax.random.key(2), params.up_bias.shape))
    x = jax.random.normal(jax.random.key(1), (21, 32))
    y, routing = moe.moe_layer(params, x, sizes.top_k)

    probabilities = jax.nn.softmax(x @ params.router)
    top, experts = jax.lax.top_k(probabilities, 2)
    hidden = jax.nn.silu(jnp.einsum("td,gdf->tgf", x, params.up) + params.up_bias)
    every_expert = jnp.einsum("tgf,gfd->tgd", hidden, params.down)
    chosen = jnp.take_along_axis(every_expert, experts[..., None], axis=1)
    expected = jnp.einsum("tkd,tk->td", chosen, top / top.sum(axis=1, keepdims=True))
    assert np.linalg.norm(y - expected) / np.linalg.norm(expected) < 0.08
    assert routing.group_sizes.tolist() == np.bincount(np.ravel(experts), minlength=4).tolist()


def test_moe_learns(capsys):
    _, errors = moe.train(moe.Sizes(num_experts=4, d_model=32, d_ff=32), steps=60, num_tokens=128, seed=0)
    assert errors[-1] < 0.5 * errors[0]
    assert capsys.readouterr().out.startswith("step    0  error")
