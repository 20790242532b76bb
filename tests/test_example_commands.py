"""What the examples' commands refuse, and that only runs of equal settings are ever compared."""

import pytest

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(module)

import decode_moe  # noqa: E402
import expert_parallel  # noqa: E402
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


# Flags


@pytest.mark.parametrize(
    "example, flags, message",
    [
        (train_lm, "--steps 0", "argument --steps: must be a positive integer, got 0"),
        (train_lm, "--steps 1.5", "argument --steps: must be a positive integer, got 1.5"),
        (train_lm, "--batch 0", "argument --batch: must be a positive integer, got 0"),
        (train_lm, "--evaluate-every 0", "argument --evaluate-every: must be a positive integer, got 0"),
        (train_lm, "--checkpoint-every -1", "argument --checkpoint-every: must be 0 or a positive integer, got -1"),
        (train_lm, "--heads 0", "argument --heads: must be a positive integer, got 0"),
        (train_lm, "--heads 3", "--d-model must be a multiple of 2 * --heads = 6, got 32"),
        (train_lm, "--d-model 66", "--d-model must be a multiple of 2 * --heads = 4, got 66"),
        (train_lm, "--attention cudnn", "--attention cudnn must compute in bfloat16 on a gpu, got float32 on a"),
        (train_lm, "--only bf16", "--only bf16 and --dtype float32 do not go together"),
        (train_lm, "--process-id 0", "--num-processes and --process-id need --coordinator"),
        (train_lm, "--mesh fsdp=1000", "--mesh: a mesh of {'fsdp': 1000, 'tp': 1} needs 1000 devices"),
        (moe, "--experts 4 --top-k 5", "--top-k must be from 1 to --experts 4, got 5"),
        (decode_moe, "--experts 4 --top-k 5", "--top-k must be from 1 to --experts 4, got 5"),
        (decode_moe, "--top-k 0", "argument --top-k: must be a positive integer, got 0"),
    ],
)
def test_bad_flags_are_refused_in_one_line(example, flags, message, tmp_path, capsys):
    first = [*TINY, "--out", str(tmp_path)] if example in (train_lm, moe) else []
    with pytest.raises(SystemExit) as error:
        example.main([*first, *flags.split()])
    assert error.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_file_is_no_folder_to_write_to(name, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        train_lm.main([*TINY, "--out", str(tmp_path / name)])
    message = f"argument --out: must be a folder, got {tmp_path / name}, where {tmp_path / 'file'} is a file"
    assert message in capsys.readouterr().err


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices")
@pytest.mark.parametrize("flag, value", [("--tokens", 1001), ("--experts", 17)])
def test_tokens_and_experts_are_split_evenly(flag, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        expert_parallel.main([flag, str(value)])
    message = f"error: {flag} must be a multiple of the number of devices, {jax.device_count()}, got {value}"
    assert message in capsys.readouterr().err
