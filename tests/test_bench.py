"""The benchmark's machinery on a CPU: everything but CUPTI, with a timer by the host's clock in its place."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest

import jaxgemm
from jaxgemm.bench import (
    accuracy,
    block,
    dense,
    grouped,
    peers,
    quantize,
    readme,
    report,
    roofline,
    suites,
    torch_peers,
)
from jaxgemm.bench.__main__ import main
from jaxgemm.bench.measure import Call, Timing, Unavailable, fitting_iterations, measure_together
from jaxgemm.bench.rows import Row, Setup

ROOT = pathlib.Path(__file__).parent.parent


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


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(quantize, "ACTIVATIONS", ((10, 300),))
    monkeypatch.setattr(quantize, "WEIGHTS", ((200, 130),))
    tiny_block = block.BlockCase(2, 8, 32, 24, heads=4, kv_heads=2, attention="xla")
    monkeypatch.setattr(dense, "dense_cases", lambda: [dense.DenseCase(16, (40, 24, 40)), tiny_block])
    cases = [
        grouped.GroupedCase("masked", 2, 9, 20, 140),
        grouped.GroupedCase("contiguous", 3, 12, 20, 140),
        grouped.GroupedCase("k-grouped", 2, 100, 20, m=12),
    ]
    monkeypatch.setattr(grouped, "grouped_cases", lambda: cases)


def sample_report(case="large 1x1x1", us=100.0, peer_us=150.0, **changes):
    """A report as a file would hold it."""
    row = Row(case, dict(group=case.split()[0], m=1, n=1, k=1, cold=changes.pop("cold", False)), 2e9, 1e6)
    row.times = {"jaxgemm": Timing((us,), us), "xla-bf16": Timing((peer_us,), peer_us)}
    row.checks["difference"] = 1.5e-6
    setup = Setup(HostTimer())
    made = report.new_report("gemm", "--suite x", "host clock", {"copy_gbps": 1000.0}, setup)
    return {**made, "rows": [row.to_json()], **changes}


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
        (["gemm", "--suite", "nowhere.json"], "must be deepgemm, llama, deepseek-v3 or a JSON file"),
        (["gemm", "--only", "nothing like it"], "no case matches"),
        (["gemm", "--vs", "xla-bf16,other"], "got other"),
        (["gemm", "--m", "1", "--n", "1", "--k", "1", "--compare", "nowhere.json"], "holds no report"),
        (["readme", "--file", str(ROOT / "README.md"), "--results", "nowhere"], None),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    assert bench(*arguments) == (2 if message else 0)
    assert message is None or message in capsys.readouterr().err


# Suites


def test_suites_hold_the_shapes_they_name():
    cases = suites.gemm_cases("deepgemm")
    names = [case.name for case in cases]
    assert len(names) == len(set(names)) == 14 + 1 + 5 + 4 + 35
    assert "large 4096x7168x16384" in names and "small 7x576x7168" in names and "dgrad 4096x512x32768" in names
    assert {case.kind for case in cases if case.group == "wgrad"} == {"wgrad"}
    assert [case.is_small for case in cases] == [case.group == "small" for case in cases]
    ratios = {case.name: suites.deepgemm_ratio(case) for case in cases}
    assert ratios["large 4096x4096x7168"] == pytest.approx(178.7 / 170.5, abs=1e-3)
    assert ratios["wgrad 4096x4096x7168"] == pytest.approx(202.2 / 258.2, abs=1e-3)
    assert sum(ratio is not None for ratio in ratios.values()) == 8 + 5 + 4 + 21
    assert suites.gemm_cases("llama") and suites.gemm_cases("deepseek-v3")


def test_suite_of_a_file(tmp_path):
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([dict(m=3, n=4, k=5), dict(m=300, n=4, k=5, kind="wgrad", group="mine")]))
    first, second = suites.gemm_cases(str(path))
    assert (first.name, second.name, second.kind) == ("file 3x4x5", "mine 300x4x5", "wgrad")
    for wrong in ("{", '[{"m": 3}]', '[{"m": 0, "n": 1, "k": 1}]', '[{"m": 1, "n": 1, "k": 1, "kind": "x"}]'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="cases.json"):
            suites.gemm_cases(str(path))


def test_small_products_are_cold_and_large_ones_warm():
    setup = Setup(HostTimer())
    assert setup.weight_copies(100_000_000, is_small=True) * 100_000_000 > 2e8
    assert setup.weight_copies(100_000_000, is_small=False) == 1
    assert Setup(HostTimer(), temperature="cold").weight_copies(10**9, is_small=False) == 2
    assert Setup(HostTimer(), temperature="warm").weight_copies(10**7, is_small=True) == 1
    assert setup.weight_copies(100, is_small=True) == 1  # millions of them would be needed


def test_groups_have_the_sizes_they_say():
    known = suites.deepgemm_figures()["rates"]
    cases = grouped.grouped_cases()
    assert set(known) == {case.name for case in cases if case.spread == "random"}
    for case in cases:
        assert case.sizes.shape == (case.groups,)
        if case.spread == "random":
            assert case.sizes.min() >= int(0.7 * case.rows) and case.sizes.max() <= 1.3 * case.rows
        else:
            assert case.sizes.sum() == case.groups * case.rows
    zipf = next(case for case in cases if case.spread == "zipf").sizes
    assert zipf[0] == pytest.approx(8 * zipf[7], rel=0.01)


# Measuring


def test_call_rotates_through_its_arguments():
    call = Call.jitted(lambda x: x + 1, [jnp.zeros(())], [jnp.ones(())])
    assert [float(call()) for _ in range(3)] == [1, 2, 1]
    assert float(call.first()) == 1


def test_a_call_passes_for_a_jitted_function():
    """JAX's profiler wraps whatever else in `jax.jit`, which would trace the rotation away."""
    assert isinstance(Call(jax.jit(jnp.sin), [1.0]), jax.stages.Wrapped)


def test_columns_take_turns_and_failures_are_kept():
    order = []

    def timer(call, iterations):
        order.append(call.function.__name__)
        return Timing((1.0,) * iterations, 1.0, {"kernel": 1.0})

    def good():
        return jnp.zeros(())

    def fine():
        return jnp.zeros(())

    def broken():
        raise RuntimeError("no such kernel\nsecond line")

    calls = {"good": Call(good, []), "broken": Call(broken, []), "fine": Call(fine, [])}
    timings, failures = measure_together(timer, calls, iterations=4, rounds=3)
    assert order == ["good", "fine"] * 3
    assert {name: len(timing.samples_us) for name, timing in timings.items()} == {"good": 12, "fine": 12}
    assert failures == {"broken": "RuntimeError: no such kernel"}


def test_median_and_spread():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), 9.0, {"a": 1.0}).joined(Timing((3.0,), 8.0, {"a": 3.0, "b": 5.0}))
    assert timing.median_us == 3.0 and timing.wall_us == 8.0 and timing.kernels == {"a": 2.0, "b": 5.0}
    assert Timing((10.0,) * 9, 1.0).spread == 0


def test_large_results_get_fewer_iterations(monkeypatch):
    monkeypatch.setattr("jaxgemm.bench.measure.OUTPUT_BYTES", 4 * 8.0)
    assert fitting_iterations(Call(lambda: jnp.zeros(1), []), 20) == 8
    assert fitting_iterations(Call(lambda: jnp.zeros(1000), []), 20) == 3
    assert fitting_iterations(Call(lambda: jnp.zeros(1000), []), 1) == 1


# Accuracy


def test_difference_sees_one_wrong_block_of_scales():
    x = jax.random.normal(jax.random.key(0), (300, 256))
    lhs, rhs = jaxgemm.quantize(x), jaxgemm.quantize(x[:200] * 2, (128, 128))
    out = jaxgemm.gemm(lhs, rhs, implementation="xla")
    assert accuracy.dense_difference(out, lhs, rhs) < 1e-5
    wrong = jaxgemm.ScaledArray.from_parts(rhs.values, rhs.scales.at[0, 1].multiply(1.1), (128, 128))
    assert accuracy.dense_difference(jaxgemm.gemm(lhs, wrong, implementation="xla"), lhs, rhs) > 1e-4
    assert accuracy.dense_difference(out + 1, lhs, rhs, jnp.ones(200)) < 1e-5


def test_sampled_rows_hold_the_ends():
    assert accuracy.sampled_rows(7).tolist() == list(range(7))
    rows = accuracy.sampled_rows(5000)
    assert len(set(rows)) == accuracy.SAMPLED_ROWS and rows[0] == 0 and rows[-1] == 4999


def test_bits_are_compared():
    q = jaxgemm.quantize(jnp.ones((4, 256)))
    assert quantize.identical(q, jaxgemm.quantize(jnp.ones((4, 256))))
    assert not quantize.identical(q, jaxgemm.quantize(jnp.ones((4, 256)).at[0, 0].set(0.9)))


# Peers


def test_xla_fp8_is_refused_where_xla_would_upcast():
    x = jnp.ones((16, 128), jnp.bfloat16)
    q = jaxgemm.quantize(x)
    operands = peers.GemmOperands(x, (x,), q, (q,), jnp.bfloat16)
    if jax.default_backend() != "gpu":
        calls, missing = peers.prepare_peers(["xla-bf16", "xla-fp8"], operands, HostTimer())
        assert list(calls) == ["xla-bf16"] and "upcast" in missing["xla-fp8"]


def test_the_fastest_form_that_xla_recognises_counts(monkeypatch):
    """Of several ways to write a product, one that XLA makes slow must not stand for XLA."""
    x = jnp.ones((16, 128), jnp.bfloat16)
    operands = peers.GemmOperands(x, (x,), jaxgemm.quantize(x), (jaxgemm.quantize(x),), jnp.bfloat16)
    times = iter([9.0, 5.0])
    tried = []

    def timer(call, iterations):
        tried.append(call)
        return Timing((next(times),), 1.0)

    monkeypatch.setattr(peers, "FP8_CALL", "ENTRY")  # every program has one
    assert peers.xla_fp8(operands, timer) is tried[1] and len(tried) == 2


def test_both_forms_of_xla_fp8_are_the_product():
    lhs, rhs = (jax.random.normal(jax.random.key(i), (48, 256), jnp.bfloat16) for i in range(2))
    operands = *peers.quantize_tensorwise(lhs), *peers.quantize_tensorwise(rhs)
    exact = lhs.astype(jnp.float32) @ rhs.astype(jnp.float32).T
    with_scales = peers._scaled_operands(*operands, jnp.float32)
    without = peers._plain_product(*operands, jnp.float32) * operands[1] * operands[3]
    assert 1e-5 < accuracy.difference(with_scales, exact) < 2e-3
    assert 1e-5 < accuracy.difference(without, exact) < 2e-3


def test_torch_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_peers.version() is None and torch_peers.copy_bandwidth(8) is None
    with pytest.raises(Unavailable, match="not installed"):
        torch_peers.tensorwise(None, HostTimer())
    monkeypatch.setattr(torch_peers, "enabled", False)
    with pytest.raises(Unavailable, match="left out"):
        torch_peers.blockwise(None, HostTimer())


# The whole way


@pytest.mark.parametrize("kind", ["dense", "wgrad"])
def test_gemm(kind, tmp_path, capsys):
    path = tmp_path / "out" / "gemm.json"
    sizes = ["--m", "5,130", "--n", "24", "--k", "300", "--kind", kind]
    code = bench("gemm", *sizes, "--bias", "--vs", "xla-bf16,xla-fp8", "--cold-megabytes", "0.01", "--json", str(path))
    assert code == 0
    made = report.read(path)
    assert made["environment"]["jax"] == jax.__version__ and made["environment"]["commit"]
    assert made["limits"]["copy_gbps"] > 0 and made["method"]["timer"] == "host clock"
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
    train, forward, whole = report.read(tmp_path / "a.json")["rows"]
    assert set(whole["times"]) == {"jaxgemm", "xla-bf16"}
    assert whole["flops"] == 6 * 2 * 8 * (32 * 64 + 32 * 32 + 32 * 48 + 24 * 32)
    assert train["flops"] == 3 * forward["flops"] == 3 * 2 * 16 * 2 * 40 * 24
    for row in (train, forward, whole):
        assert 1e-6 < row["checks"]["largest difference from bf16"] < 1e-2
        assert row["checks"]["temp MiB"] >= 0
    for row in (train, forward):
        assert set(row["times"]) == {"jaxgemm", "jaxgemm, products alone", "xla-bf16"}


def test_grouped(tiny_cases, tmp_path):
    assert bench("grouped", "--json", str(tmp_path / "a.json")) == 0
    rows = report.read(tmp_path / "a.json")["rows"]
    assert [row["group"] for row in rows] == ["masked", "contiguous", "k-grouped"]
    for row, case in zip(rows, grouped.grouped_cases(), strict=True):
        assert row["checks"]["difference"] < 1e-5 and set(row["times"]) == {"jaxgemm", "xla-bf16"}
        assert row["flops"] == 2 * int(case.sizes.sum()) * 20 * (12 if case.kind == "k-grouped" else 140)


def test_the_oracle_of_groups_sees_a_wrong_group(tiny_cases):
    for case in grouped.grouped_cases():
        prepare = {"masked": grouped._masked, "contiguous": grouped._contiguous, "k-grouped": grouped._k_grouped}
        calls, _, _ = prepare[case.kind](case, Setup(HostTimer()))
        call = calls["jaxgemm"]
        right = call.function
        wrong = Call(lambda *a, f=right: f(*a) * 1.02, *call.argument_sets)
        assert grouped._difference(case, call) < 1e-5 < grouped._difference(case, wrong)


def test_a_case_that_fails_is_a_row_and_fails_the_run(tmp_path):
    path = tmp_path / "a.json"
    code = bench("gemm", "--m", "8", "--n", "8", "--k", "8", "--implementation", "mosaic", "--json", str(path))
    if jax.default_backend() != "gpu":
        assert code == 1
        (row,) = report.read(path)["rows"]
        assert row["missing"]["jaxgemm"].startswith("NotImplementedError") and not row["times"]


# Reports


def test_compare_fails_on_more_than_five_percent(tmp_path):
    old, same, slow = sample_report(us=100.0), sample_report(us=104.0), sample_report(us=106.0)
    assert report.regressions(same, old) == []
    (line,) = report.regressions(slow, old)
    assert "106.0 us" in line and "+6.0%" in line
    with pytest.raises(ValueError, match="GPU was H9, is"):
        report.regressions(old, sample_report(environment={"gpu": "H9"}))
    with pytest.raises(ValueError, match="command was dense"):
        report.regressions(old, sample_report(command="dense"))
    with pytest.raises(ValueError, match="no case in common"):
        report.regressions(old, sample_report(cold=True))


@pytest.mark.parametrize("factor, code", [(1e9, 0), (1e-9, 1)])
def test_compare_on_the_command_line(factor, code, tmp_path, capsys):
    path, shape = tmp_path / "old.json", ["--m", "8", "--n", "8", "--k", "8", "--vs", "", "--cold-megabytes", "0"]
    assert bench("gemm", *shape, "--json", str(path)) == 0
    old = report.read(path)
    old["rows"][0]["times"]["jaxgemm"]["us"] *= factor
    report.write(old, path)
    assert bench("gemm", *shape, "--compare", str(path)) == code
    assert ("slower than before" in capsys.readouterr().out) == bool(code)


def test_table_shows_ratios_and_what_is_missing():
    made = sample_report(cold=True)
    header, (line,) = report.table(made)
    shown = dict(zip(header, line, strict=True))
    assert shown["case"].endswith("cold") and shown["us"] == "100.0" and shown["x xla-bf16"] == "1.500"
    assert shown["TFLOP/s"] == "20.0" and shown["of copy"] == "1 %" and shown["difference"] == "1.5e-06"
    assert report.means(made) == ["large: 1.500 x xla-bf16 (least 1.500, 1 cases)"]
    assert len(report.plain(header, [line]).splitlines()) == 3
    del made["rows"][0]["times"]["jaxgemm"]
    assert dict(zip(*(lambda h, c: (h, c[0]))(*report.table(made)), strict=True))["x xla-bf16"] == ""


def test_files_that_are_no_reports_are_refused(tmp_path):
    path = tmp_path / "a.json"
    for text in ("", "[]", '{"format": 0}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no report"):
            report.read(path)


def test_roofline_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for command in ("gemm", "quantize"):
        roofline.plot(sample_report(command=command), tmp_path / f"{command}.png")
        assert (tmp_path / f"{command}.png").stat().st_size > 1000


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


def test_readme_of_this_project_is_up_to_date():
    assert readme.update(ROOT / "README.md", ROOT / "benchmarks" / "results", check=True)
