"""The benchmark's commands on a CPU: everything but CUPTI, with a timer that needs no clock in its place."""

import pathlib
import re
import shlex
import subprocess
import sys
import types

import jax
import pytest
from bench_support import SteadyTimer, bench, sample_report

from jaxgemm.bench import block, dense, fsdp, grouped, moe, quantize, readme, report, train
from jaxgemm.bench.__main__ import make_parser, selected_cases
from jaxgemm.bench.measure import Call
from jaxgemm.bench.rows import Setup

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(quantize, "ACTIVATIONS", ((10, 300),))
    monkeypatch.setattr(quantize, "WEIGHTS", ((200, 130),))
    tiny_block = block.BlockCase(2, 8, 32, 24, heads=4, kv_heads=2, attention="xla")
    monkeypatch.setattr(
        dense, "dense_cases", lambda: [dense.DenseCase(16, (40, 24, 40)), block.MlpCase(16, 32, 24), tiny_block]
    )
    cases = [
        grouped.GroupedCase("masked", 2, 9, 20, 140),
        grouped.GroupedCase("contiguous", 3, 12, 20, 140),
        grouped.GroupedCase("k-grouped", 2, 100, 20, m=12),
    ]
    cases.append(moe.MoeCase(tokens=10, experts=3, top_k=2, width=40, hidden=24))
    monkeypatch.setattr(grouped, "grouped_cases", lambda suite="deepgemm": cases)


# Refusal


def test_without_a_gpu_it_says_so_in_one_line():
    code = [sys.executable, "-m", "jaxgemm.bench", "quantize"]
    result = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
    if jax.default_backend() != "gpu":
        assert result.returncode == 2
        assert result.stderr.strip().count("\n") == 0
        assert "NVIDIA GPU" in result.stderr
        assert not result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gemm", "--m", "1"], "--m, --n and --k go together"),
        (["gemm", "--suite", "nowhere.json"], "must be deepgemm, llama, mixtral, deepseek-v3 or a JSON file"),
        (["gemm", "--only", "nothing like it"], "no case matches"),
        (["train", "--width", "30", "--heads", "4"], "--width must be a multiple of --heads"),
        (["gemm", "--vs", "xla-bf16,other"], "got other"),
        (["gemm", "--m", "1", "--n", "1", "--k", "1", "--compare", "nowhere.json"], "holds no report"),
        (["readme", "--file", str(ROOT / "README.md"), "--results", "nowhere"], "gemm-h100.json holds no report"),
        (["readme", "--file", "nowhere.md"], "there is no nowhere.md here"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    assert bench(*arguments) == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


# The whole way


@pytest.mark.parametrize("kind", ["dense", "wgrad"])
def test_gemm(kind, tmp_path, capsys):
    path = tmp_path / "out" / "gemm.json"
    sizes = ["--m", "5,130", "--n", "24", "--k", "300", "--kind", kind]
    code = bench("gemm", *sizes, "--bias", "--vs", "xla-bf16,xla-fp8", "--cold-megabytes", "0.01", "--json", str(path))
    assert code == 0
    made = report.read(path)
    assert made["environment"]["jax"] == jax.__version__
    assert made["environment"]["commit"] or not (ROOT / ".git").exists()
    assert made["limits"]["copy_gbps"] == 21.0 and made["method"]["timer"] == "steady clock"
    assert [(row["m"], row["cold"]) for row in made["rows"]] == [(5, kind == "dense"), (130, False)]
    for row in made["rows"]:
        assert set(row["times"]) == {"jaxgemm", "jaxgemm+bias", "xla-bf16"} and "xla-fp8" in row["missing"]
        assert row["checks"]["difference"] < 1e-5 and row["checks"]["difference with bias"] < 1e-5
        assert row["flops"] == 2 * row["m"] * 24 * 300
        assert row["times"]["jaxgemm"]["kernels"] and row["times"]["jaxgemm"]["samples"] == 2
    out = capsys.readouterr().out
    assert "130x24x300" in out and "x xla-bf16" in out and "xla-fp8: XLA's program holds no" in out


def test_quantize(tiny_cases, tmp_path):
    assert bench("quantize", "--json", str(tmp_path / "a.json")) == 0
    rows = report.read(tmp_path / "a.json")["rows"]
    assert len(rows) == len(quantize.OPERATIONS) and all(row["checks"]["identical"] is True for row in rows)
    natural, both = rows[0], rows[1]
    assert natural["bytes"] == 10 * 300 * 2 + 16 * 384 + 3 * 12 * 4
    assert both["bytes"] == natural["bytes"] + 304 * 128 + 1 * 300 * 4


def test_dense(tiny_cases, tmp_path):
    assert bench("dense", "--json", str(tmp_path / "a.json")) == 0
    train, forward, mlp, whole = report.read(tmp_path / "a.json")["rows"]
    assert set(whole["times"]) == set(mlp["times"]) == {"jaxgemm", block.LAYERS, "xla-bf16"}
    assert (mlp["group"], whole["group"]) == ("mlp", "block") and mlp["flops"] == 6 * 16 * 3 * 32 * 24
    assert whole["flops"] == 6 * 2 * 8 * (32 * 64 + 32 * 32 + 32 * 48 + 24 * 32)
    assert train["flops"] == 3 * forward["flops"] == 3 * 2 * 16 * 2 * 40 * 24
    for row in (train, forward, mlp, whole):
        assert 1e-6 < row["checks"]["largest difference from bf16"] < 1e-2
        assert row["checks"]["temp MiB"] >= 0
    for row in (train, forward):
        assert set(row["times"]) == {"jaxgemm", "jaxgemm, products alone", "xla-bf16"}


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_fsdp(monkeypatch, tmp_path):
    monkeypatch.setattr(fsdp, "fsdp_cases", lambda: [fsdp.FsdpCase(1024, (1024, 2048))])
    assert bench("fsdp", "--json", str(tmp_path / "a.json")) == 0
    [row] = report.read(tmp_path / "a.json")["rows"]
    assert set(row["times"]) == {"jaxgemm", "xla-bf16"} and row["devices"] == 8
    assert row["flops"] == 6 * 1024 * 1024 * 2048
    checks = row["checks"]
    assert 1e-6 < checks["largest difference from bf16"] < 1e-2
    assert checks["all-gather MiB"] >= 2 and checks["xla-bf16 all-gather MiB"] >= 4  # of weights of 2 Mi elements
    assert checks["temp MiB"] > 0


@pytest.fixture
def fake_tokamax(monkeypatch):
    """A module of that name, whose product is JAX's own; what it was asked for is in `asked`."""
    fake = types.ModuleType("tokamax")
    fake.asked = set()

    def ragged_dot(lhs, rhs, group_sizes, *, implementation):
        fake.asked.add(implementation)
        return jax.lax.ragged_dot(lhs, rhs, group_sizes)

    fake.ragged_dot = ragged_dot
    monkeypatch.setitem(sys.modules, "tokamax", fake)
    return fake


def test_grouped(tiny_cases, fake_tokamax, tmp_path):
    assert bench("grouped", "--json", str(tmp_path / "a.json")) == 0
    *rows, layer = report.read(tmp_path / "a.json")["rows"]
    assert [row["group"] for row in rows] == ["masked", "contiguous", "k-grouped"]
    for row, case in zip(rows, grouped.grouped_cases()[:3], strict=True):
        assert row["checks"]["difference"] < 1e-5 and {"jaxgemm", "xla-bf16"} <= set(row["times"])
        assert row["flops"] == 2 * int(case.sizes.sum()) * 20 * (12 if case.kind == "k-grouped" else 140)
        assert ("tokamax" in row["times"]) == (case.kind == "contiguous") == ("tokamax" not in row["missing"])
    assert set(layer["times"]) == {"jaxgemm", "xla-bf16", "tokamax"} and layer["group"] == "layer"
    assert layer["flops"] == 3 * 2 * 10 * 2 * 3 * 40 * 24
    assert 1e-6 < layer["checks"]["largest difference from bf16"] < 1e-2
    assert fake_tokamax.asked == {("mosaic", "triton")}  # never its plain XLA product


def test_tokamax_is_missing_with_its_own_words(tiny_cases, fake_tokamax, tmp_path, monkeypatch):
    command = ["grouped", "--only", "contiguous", "--vs", "tokamax", "--json", str(tmp_path / "a.json")]

    def refuses(lhs, rhs, group_sizes, *, implementation):
        raise NotImplementedError("not on this chip")

    fake_tokamax.ragged_dot = refuses
    for reason in ("NotImplementedError: not on this chip", "tokamax cannot be imported"):
        assert bench(*command) == 0
        (row,) = report.read(tmp_path / "a.json")["rows"]
        assert reason in row["missing"]["tokamax"] and set(row["times"]) == {"jaxgemm"}
        monkeypatch.setitem(sys.modules, "tokamax", None)


TINY_MODEL = "--batch 2 --length 8 --width 32 --hidden 24 --heads 4 --kv-heads 2 --layers 2 --vocabulary 50 --attention xla".split()


def test_train(tmp_path):
    assert bench("train", *TINY_MODEL, "--json", str(tmp_path / "a.json")) == 0
    (row,) = report.read(tmp_path / "a.json")["rows"]
    assert set(row["times"]) == {"jaxgemm", "xla-bf16"}
    checks = row["checks"]
    assert checks["tokens/s"] == checks["xla-bf16 tokens/s"] == 16 * 10**4  # 16 tokens in 100 us
    assert 0 < abs(checks["first loss, from bf16"]) < 0.02
    assert checks["MiB"] > 3 * 4 * (2 * 50 * 32 + 2 * (32 * 64 + 32 * 32 + 32 * 48 + 24 * 32)) / 2**20 - 0.05
    # Plain JAX multiplies in float32: forward, data and weight gradient of two products in each of two blocks.
    if jax.default_backend() != "gpu":
        assert checks["MLP products that are not FP8"] == 12
    assert row["flops"] == 6 * 16 * (2 * (32 * 64 + 32 * 32 + 32 * 48 + 24 * 32) + 32 * 50)


def test_training_calls_train():
    case = train.TrainCase(2, 8, 32, 24, 4, 2, "xla", layers=1, vocabulary=50)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 50)
    call = train.training_call(case, tokens, train.bf16_dot)
    losses = [float(call()) for _ in range(20)]
    assert losses[0] == pytest.approx(4, abs=0.6) and losses[-1] < losses[0] - 0.05


def test_the_oracle_of_groups_sees_a_wrong_group(tiny_cases):
    for case in grouped.grouped_cases()[:3]:
        prepare = {"masked": grouped._masked, "contiguous": grouped._contiguous, "k-grouped": grouped._k_grouped}
        prepared = prepare[case.kind](case, Setup(SteadyTimer()))
        call = Call.jitted(prepared.own, prepared.scaled)
        right = call.function
        wrong = Call(lambda *a, f=right: f(*a) * 1.02, *call.argument_sets)
        oracle = grouped._k_oracle if case.kind == "k-grouped" else grouped._group_oracle
        oracle.clear_cache()
        assert grouped._difference(case, call) < 1e-5 < grouped._difference(case, wrong)
        assert oracle._cache_size() == 1, "one program for groups of all sizes: dozens would take minutes"


def test_a_case_that_fails_is_a_row_and_fails_the_run(tmp_path):
    path = tmp_path / "a.json"
    code = bench("gemm", "--m", "8", "--n", "8", "--k", "8", "--implementation", "mosaic", "--json", str(path))
    if jax.default_backend() != "gpu":
        assert code == 1
        (row,) = report.read(path)["rows"]
        assert row["missing"]["jaxgemm"].startswith("NotImplementedError") and not row["times"]


@pytest.mark.parametrize("most", [0, 1])
def test_an_interrupted_run_prints_what_it_has(tiny_cases, monkeypatch, capsys, most):
    run_case, seen = quantize.run_case, []

    def run_one(case, setup):
        if len(seen) == most:
            raise KeyboardInterrupt
        seen.append(case.name)
        return run_case(case, setup)

    monkeypatch.setattr(quantize, "run_case", run_one)
    assert bench("quantize") == 130
    out = capsys.readouterr().out
    assert all(name in out for name in seen) and "interrupted" in out


@pytest.mark.parametrize("factor, code", [(1e9, 0), (1e-9, 1)])
def test_compare_on_the_command_line(factor, code, tmp_path, capsys):
    path, shape = tmp_path / "old.json", ["--m", "8", "--n", "8", "--k", "8", "--vs", "", "--cold-megabytes", "0"]
    assert bench("gemm", *shape, "--json", str(path)) == 0
    old = report.read(path)
    old["rows"][0]["times"]["jaxgemm"]["us"] *= factor
    report.write(old, path)
    assert bench("gemm", *shape, "--compare", str(path)) == code
    assert ("slower than before" in capsys.readouterr().out) == bool(code)


# README


def test_readme_tables_are_rendered_and_checked(tmp_path, capsys):
    file, results = tmp_path / "README.md", tmp_path / "results"
    report.write(sample_report(), results / "gemm-h100.json")
    file.write_text("before\n<!-- table: gemm-h100 -->\nold\n<!-- end -->\nafter\n")
    options = ["readme", "--file", str(file), "--results", str(results)]
    assert bench(*options, "--check") == 1 and "out of date" in capsys.readouterr().err
    assert "old" in file.read_text()
    assert bench(*options) == 0 and bench(*options, "--check") == 0
    text = file.read_text()
    assert text.startswith("before\n<!-- table: gemm-h100 -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| large 1x1x1 | 100.0 |" in text and "old" not in text
    report.write(sample_report(us=120.0), results / "gemm-h100.json")
    assert bench(*options, "--check") == 1


def test_readme_with_wrong_markers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="end"):
        readme.render("<!-- table: x -->\nno end", tmp_path)
    with pytest.raises(ValueError, match="no report"):
        readme.render("<!-- table: x -->\n<!-- end -->", tmp_path)


def test_commands_of_readme_can_be_run_as_they_stand():
    commands = re.findall(r"`python -m jaxgemm\.bench ([^`]*)` on ", (ROOT / "README.md").read_text())
    assert len(commands) >= 7
    for command in commands:
        options = make_parser().parse_args(shlex.split(command))
        if options.command != "readme":
            assert selected_cases(options)


def test_a_report_has_its_command_as_a_shell_takes_it(tmp_path):
    path = tmp_path / "a.json"
    command = ["--only", "^large 8x8x8|8x8x8", "--m", "8", "--n", "8", "--k", "8", "--vs", "", "--json", str(path)]
    assert bench("gemm", *command) == 0
    assert shlex.split(report.read(path)["arguments"])[: len(command)] == command


def test_readme_of_this_project_is_up_to_date():
    assert readme.update(ROOT / "README.md", ROOT / "benchmarks" / "results", check=True)


def test_what_was_not_asked_for_is_not_compiled(tiny_cases, monkeypatch):
    """XLA tunes its products when it compiles them, which takes longer than to measure ours."""
    compiled = []
    monkeypatch.setattr(Call, "jitted", classmethod(lambda cls, f, *sets: compiled.append(f) or cls(jax.jit(f), *sets)))
    monkeypatch.setattr(grouped, "_difference", lambda case, call: 0.0)
    for case in grouped.grouped_cases()[:3]:
        grouped.run_case(case, Setup(SteadyTimer()))
    assert len(compiled) == 3
