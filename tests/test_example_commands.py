"""What the examples' commands refuse, and that only runs of equal settings are ever compared."""

import pytest

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import jax  # noqa: E402
import moe  # noqa: E402
import train_lm  # noqa: E402
from lm import command  # noqa: E402

TINY = "--d-model 32 --layers 1 --heads 2 --d-ff 48 --seq 16 --batch 2 --steps 2 --dtype float32".split()


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class Killed(BaseException):
    """Stands for what ends a process."""


def start(example, *flags):
    """Begins a run that ends as its first training would begin."""

    def stop(*arguments, **keywords):
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(command, "train", stop)
        example.main([*TINY, *flags])


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_a_run_killed_before_its_second_training_is_not_resumed_with_an_older_runs_checkpoint(tmp_path):
    out = ["--out", str(tmp_path)]
    first = train_lm.main([*TINY, *out, "--only", "fp8"])["runs"]["fp8"]
    assert names(tmp_path) == {"settings.json", "checkpoints_fp8", "metrics.json", "loss.png"}
    start(train_lm, *out, "--seed", "1")
    assert names(tmp_path) == {"settings.json"}

    # One by one, those of equal settings are compared; the last command only reads.
    resume = [*TINY, *out, "--seed", "1", "--resume"]
    one_by_one = {name: train_lm.main([*resume, "--only", name])["runs"][name] for name in ("f32", "fp8")}
    assert one_by_one["fp8"]["parameters_sha256"] != first["parameters_sha256"]
    both = train_lm.main(resume)
    for name, run in one_by_one.items():
        assert both["runs"][name]["step_seconds"] == run["step_seconds"]
    assert set(both["relative_gap"]) == {"train_loss", "validation_loss"}


@pytest.mark.parametrize(
    "started, resumed, flags, message",
    [
        (train_lm, train_lm, ["--seed", "1"], "seed was 0, is 1$"),
        (train_lm, train_lm, ["--only", "fp8", "--dtype", "bfloat16"], "dtype was float32, is bfloat16$"),
        (moe, train_lm, [], "experts was 8, is absent; top_k was 2, is absent; balance_weight was 0.01, is absent; "),
        (train_lm, moe, [], "experts was absent, is 8; "),
    ],
)
def test_other_settings_are_not_resumed(tmp_path, started, resumed, flags, message):
    out = ["--out", str(tmp_path)]
    start(started, *out)
    before = (tmp_path / "settings.json").read_text()
    with pytest.raises(SystemExit, match=rf"--resume needs the settings that .* was started with: {message}"):
        resumed.main([*TINY, *out, *flags, "--resume"])
    assert (tmp_path / "settings.json").read_text() == before


def test_checkpoints_without_settings_are_not_resumed(tmp_path):
    """As a kill while an earlier run is removed leaves them."""
    (tmp_path / "checkpoints_fp8").mkdir()
    with pytest.raises(SystemExit, match=r"--resume needs .*settings.json, .*; it is not there"):
        train_lm.main([*TINY, "--out", str(tmp_path), "--resume"])
    assert names(tmp_path) == {"checkpoints_fp8"}
    start(train_lm, "--out", str(tmp_path))
    start(train_lm, "--out", str(tmp_path), "--resume")
    assert names(tmp_path) == {"settings.json"}
