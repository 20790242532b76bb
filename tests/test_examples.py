"""The examples: language models resume to the same bits after a kill, experts get their tokens, README shows what is
printed."""

import dataclasses
import functools
import json
import os
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

import jaxgemm
from jaxgemm.problem import QuantizeProblem

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import decode_moe  # noqa: E402
import moe  # noqa: E402
import train_lm  # noqa: E402
from lm import command, mixture, text  # noqa: E402

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
    arguments = [sys.executable, "examples/train_lm.py", *flags, "--out", str(killed)]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
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


def test_a_run_that_is_lost_stops_and_leaves_what_came_before_it(tmp_path, monkeypatch):
    """At this rate the weights overflow at once; what the first run measured is there already."""
    flags = [*TINY, "--steps", "30", "--out", str(tmp_path)]
    train, seen = command.train, []

    def train_the_second_too_fast(name, settings, *rest, **keywords):
        seen.append(name)
        rate = settings.lr if len(seen) == 1 else 1e30
        return train(name, dataclasses.replace(settings, lr=rate), *rest, **keywords)

    monkeypatch.setattr(command, "train", train_the_second_too_fast)
    with pytest.raises(FloatingPointError, match=r"fp8: the loss of step \d+ is (nan|inf), where it must be finite"):
        train_lm.main(flags)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["runs"]) == {"f32"} and len(metrics["runs"]["f32"]["train_losses"]) == 30


def test_language_model_compares_two_runs(tmp_path, capsys):
    out = tmp_path / "out"
    metrics = train_lm.main([*TINY, "--steps", "60", "--lr", "1e-2", "--out", str(out)])
    assert set(metrics["runs"]) == {"f32", "fp8"}
    f32, fp8 = metrics["runs"]["f32"], metrics["runs"]["fp8"]
    # The first loss is of equal parameters, and differs by the rounding to FP8 alone.
    assert f32["train_losses"][0] == pytest.approx(fp8["train_losses"][0], rel=1e-2)
    assert f32["train_losses"] != fp8["train_losses"]
    assert abs(metrics["relative_gap"]["validation_loss"]) < 0.05
    assert f32["train_loss"] == pytest.approx(sum(f32["train_losses"][-3:]) / 3)  # the last 5 % of 60 steps
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
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as a user compiles it
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == shown_output


# Mixtures of experts


@pytest.mark.parametrize("fp8, bound", [(False, 1e-5), (True, 0.08)])
def test_moe_layer_is_the_weighted_sum_of_each_tokens_experts(fp8, bound):
    layer = mixture.MixtureOfExperts(4, 2, d_ff=48, balance_weight=0.5, dtype=jnp.float32, fp8=fp8)
    x = jax.random.normal(jax.random.key(1), (21, 32))
    params = layer.init(jax.random.key(0), x)["params"]
    y, sown = layer.apply({"params": params}, x, mutable=["losses", "metrics"])

    probabilities = jax.nn.softmax(x @ params["router"]["kernel"])
    top, experts = jax.lax.top_k(probabilities, 2)
    gate, up = jnp.split(jnp.einsum("td,gdf->tgf", x, params["gate_up"]), 2, axis=-1)
    every_expert = jnp.einsum("tgf,gfd->tgd", jax.nn.silu(gate) * up, params["down"])
    chosen = jnp.take_along_axis(every_expert, experts[..., None], axis=1)
    expected = jnp.einsum("tkd,tk->td", chosen, top / top.sum(axis=1, keepdims=True))
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error < bound and (error > 1e-3) == fp8
    counts = np.bincount(np.ravel(experts), minlength=4)
    np.testing.assert_allclose(sown["metrics"]["load"][0], counts / 42, rtol=1e-6)
    balance = 0.5 * 4 * np.sum(counts / 42 * np.asarray(probabilities).mean(0))
    assert float(sown["losses"]["balance"][0]) == pytest.approx(balance, rel=1e-5)


def test_balance_loss_tells_even_from_collapsed_routing():
    even = 20 * jnp.tile(jnp.eye(4), (6, 1))
    assert float(mixture.route(even, 1).balance_loss) == pytest.approx(1, abs=1e-3)
    collapsed = mixture.route(even[:1].repeat(24, axis=0), 1)
    assert float(collapsed.balance_loss) == pytest.approx(4, abs=1e-3)
    assert collapsed.group_sizes.tolist() == [24, 0, 0, 0]


MIXTURE = [*TINY, "--experts", "4", "--top-k", "2"]


def test_moe_learns_in_fp8_as_with_ragged_dot(tmp_path, capsys):
    metrics = moe.main([*MIXTURE, "--steps", "40", "--lr", "1e-2", "--out", str(tmp_path)])
    f32, fp8 = metrics["runs"]["f32"], metrics["runs"]["fp8"]
    assert f32["train_losses"][0] == pytest.approx(fp8["train_losses"][0], rel=1e-2)
    assert f32["train_losses"] != fp8["train_losses"]
    assert f32["validation_loss"] < f32["train_losses"][0] - 1
    assert abs(metrics["relative_gap"]["validation_loss"]) < 0.05
    (load,) = fp8["metrics"]["feed_forward_0_experts"]["load"]
    assert len(load) == 4 and sum(load) == pytest.approx(1, rel=1e-5)
    assert "  fp8 feed_forward_0_experts" in capsys.readouterr().out


def test_training_heeds_the_balance_loss_and_may_leave_checkpoints_out(tmp_path):
    flags = [*MIXTURE, "--steps", "2", "--only", "f32", "--out", str(tmp_path), "--checkpoint-every", "0"]
    without, with_loss = (moe.main([*flags, "--balance-weight", w])["runs"]["f32"] for w in ("0", "1"))
    assert without["train_losses"][0] == with_loss["train_losses"][0]
    assert without["parameters_sha256"] != with_loss["parameters_sha256"]
    assert not any((tmp_path / "checkpoints_f32").iterdir())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU may have it")
@pytest.mark.parametrize("example", [moe, decode_moe])
def test_the_implementation_that_is_asked_for_is_taken(example, tmp_path):
    flags = [*MIXTURE, "--only", "fp8", "--out", str(tmp_path)] if example is moe else []
    with pytest.raises(NotImplementedError, match="mosaic"):
        example.main([*flags, "--implementation", "mosaic"])


def test_decoding_compiles_once_and_is_each_token_by_itself(capsys):
    sizes = "--experts 4 --d-model 40 --d-ff 24 --batch 6 --steps 4".split()
    result = decode_moe.main(sizes)
    assert result["compilations"] == 0
    assert result["error"] < 1e-2
    counts = [step["masked_m"].tolist() for step in result["steps"]]
    assert [sum(count) for count in counts] == [2 * int(step["is_active"].sum()) for step in result["steps"]]
    assert len({tuple(count) for count in counts}) == 4
    assert "compilations after the first step: 0" in capsys.readouterr().out


def test_decoding_quantises_the_rows_that_hold_a_token():
    weights = decode_moe.init_weights(3, 40, 24, jax.random.key(0))
    x, is_active = jnp.ones((5, 40), jnp.bfloat16), jnp.arange(5) < 2
    layer = functools.partial(decode_moe.moe_layer, top_k=1)
    problems = [problem.found.problem for problem in jaxgemm.explain(layer, weights, x, is_active).problems]
    quantising = [problem for problem in problems if isinstance(problem, QuantizeProblem)]
    assert [problem.rows for problem in quantising] == ["masked", "masked"] and len(problems) == 4


def test_the_check_of_decoding_sees_a_wrong_row():
    weights = decode_moe.init_weights(3, 40, 24, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (5, 40)).astype(jnp.bfloat16)
    steps, _ = decode_moe.decode(weights, x, np.full(5, 1), top_k=1)
    assert decode_moe.largest_error(weights, steps, 1) < 1e-2
    steps[0]["y"] = steps[0]["y"].at[4].set(0)
    assert decode_moe.largest_error(weights, steps, 1) > 0.1


# Published checkpoints


def test_a_checkpoint_in_deepseeks_format_is_used_as_it_is(tmp_path, capsys):
    pytest.importorskip("safetensors")
    import load_deepseek

    errors = load_deepseek.main("--d-model 140 --d-ff 200 --experts 3".split())
    assert set(errors) == {"dense layer", "experts"} and all(0.01 < error < 0.09 for error in errors.values())

    original = load_deepseek.write_checkpoint(tmp_path, 140, 200, 2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    weights = load_deepseek.load_weights(tmp_path)
    assert set(weights) == {*original, "model.norm.weight"}
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    quantized = jaxgemm.quantize(original[name], (128, 128))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), weights[name], quantized))
    stacked = load_deepseek.stack_experts(weights, "model.layers.1")
    assert stacked["gate_proj"].shape == (2, 200, 140)
    assert bool((stacked["down_proj"].values[1] == quantized.values).all())

    load_deepseek.main(["--from", str(tmp_path)])
    assert "model.norm.weight: bfloat16[140]" in capsys.readouterr().out


QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def write_checkpoint(directory, config, tensors):
    from safetensors.flax import save_file

    (directory / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_scales_of_16_bits_are_widened(dtype, tmp_path):
    pytest.importorskip("safetensors")
    import load_deepseek

    values = jax.random.normal(jax.random.key(0), (200, 300)).astype(jnp.float8_e4m3fn)
    scales = np.geomspace(1e-7, 1, 6).reshape(2, 3).astype(dtype)  # the first is subnormal in float16
    assert (scales > 0).all()
    write_checkpoint(tmp_path, {"quantization_config": QUANTIZATION}, {"a": values, "a_scale_inv": scales, "b": scales})
    weights = load_deepseek.load_weights(tmp_path)
    assert weights["a"].scales.dtype == jnp.float32 and weights["b"].dtype == dtype
    np.testing.assert_array_equal(weights["a"].scales, scales.astype(np.float32))
    assert (weights["a"].values == values).all()


@pytest.mark.parametrize(
    "quantization, tensors, message",
    [
        (None, {}, "quantization_config of .*config.json must have quant_method fp8, .* and fmt e4m3, got None"),
        ({"fmt": None}, {}, r"quantization_config of .* and fmt e4m3, got \{'quant_method': 'fp8', "),
        ({"fmt": "ue8m0"}, {}, "quantization_config of .* and fmt e4m3, got .*'fmt': 'ue8m0'"),
        ({"weight_block_size": None}, {}, r"quantization_config of .* weight_block_size \[rows, columns\] .*, got "),
        ({}, {}, r"got no \*.safetensors"),
        (
            {},
            {"ids": jnp.arange(3)},
            "ids in .*model.safetensors must be one of F8_E4M3, F8_E5M2, BF16, F16, F32, got I32",
        ),
        (
            {},
            {"a": jnp.ones((3, 4), jnp.float8_e4m3fn), "a_scale_inv": jnp.ones((2, 1))},
            r"a in .*model.safetensors: scales must be \[ceil\(m/128\), ceil\(k/128\)\] = \[1, 1\], got \[2, 1\]",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_refused_by_name(quantization, tensors, message, tmp_path, capsys):
    pytest.importorskip("safetensors")
    import load_deepseek

    changed = {key: value for key, value in {**QUANTIZATION, **(quantization or {})}.items() if value is not None}
    write_checkpoint(tmp_path, {} if quantization is None else {"quantization_config": changed}, tensors)
    with pytest.raises(ValueError, match=message):
        load_deepseek.load_weights(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        load_deepseek.main(["--from", str(tmp_path)])
    assert re.search(f"error: --from: .*{message}", capsys.readouterr().err)


def test_files_that_are_missing_or_broken_are_named(tmp_path):
    pytest.importorskip("safetensors")
    import load_deepseek

    with pytest.raises(ValueError, match="nothing must be a folder with config.json and .*, got no .*config.json"):
        load_deepseek.load_weights(tmp_path / "nothing")
    write_checkpoint(tmp_path, {"quantization_config": QUANTIZATION}, {})
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="a.safetensors must be a whole safetensors file"):
        load_deepseek.load_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json must be JSON"):
        load_deepseek.load_weights(tmp_path)
