"""The parts of the benchmark: suites, measuring, accuracy, peers, reports."""

import json
import sys

import jax
import jax.numpy as jnp
import pytest
from bench_support import SteadyTimer, sample_report

import jaxgemm
from jaxgemm.bench import accuracy, grouped, hlo, moe, peers, quantize, report, roofline, suites, torch_peers
from jaxgemm.bench.measure import Call, Timing, Unavailable, fitting_iterations, measure_together
from jaxgemm.bench.rows import Setup

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
    mixtral = [case.name for case in suites.gemm_cases("mixtral")]
    assert "large 2048x28672x4096" in mixtral and "small 16x4096x14336" in mixtral and len(mixtral) == 4 + 12


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
    setup = Setup(SteadyTimer())
    assert setup.weight_copies(100_000_000, is_small=True) * 100_000_000 > 2e8
    assert setup.weight_copies(100_000_000, is_small=False) == 1
    assert Setup(SteadyTimer(), temperature="cold").weight_copies(10**9, is_small=False) == 2
    assert Setup(SteadyTimer(), temperature="warm").weight_copies(10**7, is_small=True) == 1
    assert setup.weight_copies(100, is_small=True) == 1  # millions of them would be needed


def test_groups_have_the_sizes_they_say():
    known = suites.deepgemm_figures()["rates"]
    *cases, layer = grouped.grouped_cases()
    assert set(known) == {case.name for case in cases if case.spread == "random"}
    *mixtral, same_layer = grouped.grouped_cases("mixtral")
    assert layer == same_layer == moe.MoeCase(8192, 8, 2, 4096, 14336)
    assert {case.kind for case in mixtral} == {"masked", "contiguous", "k-grouped"}
    assert {case.groups for case in mixtral} == {8}
    for case in [*cases, *mixtral]:
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
        calls, missing = peers.prepare_peers(["xla-bf16", "xla-fp8"], operands, SteadyTimer())
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
        torch_peers.tensorwise(None, SteadyTimer())
    monkeypatch.setattr(torch_peers, "enabled", False)
    with pytest.raises(Unavailable, match="left out"):
        torch_peers.blockwise(None, SteadyTimer())


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


# Compiled programs


HLO = """
%fused_computation (p.1: bf16[8,16]) -> bf16[8,24] {
  %p.1 = bf16[8,16]{1,0} parameter(0)
  %p.2 = bf16[24,16]{1,0} parameter(1)
  ROOT %inside.3 = bf16[8,24]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main (a: f8e4m3fn[8,128]) -> bf16[8,16] {
  %hidden.4 = bf16[8,24]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused_computation
  %down.5 = bf16[24,16]{1,0} copy(%c)
  %contracted.6 = (bf16[8,16]{1,0}, s8[1024]{0}) custom-call(%hidden.4, %down.5), custom_call_target="__cublas$gemm"
  %kernel.7 = (bf16[8,24]{1,0}) custom-call(%a, %b), custom_call_target="mosaic_gpu_v2"
  %fp8.8 = (bf16[8,24]{1,0}, s8[8]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul$f8"
  %attention.9 = bf16[8,8]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %copied.10 = bf16[8,24]{1,0} copy(%hidden.4)
  ROOT %shown.11 = bf16[8,16]{1,0} dot(bf16[8,24]{1,0} %x, bf16[24,16]{1,0} %y), lhs_contracting_dims={1}
}
"""


def test_products_beside_the_kernels_are_found_in_a_program():
    assert hlo.plain_products(HLO, {24}) == ["inside.3", "contracted.6", "shown.11"]
    assert hlo.plain_products(HLO, {16}) == ["inside.3", "contracted.6", "attention.9", "shown.11"]
    assert hlo.plain_products(HLO, {48}) == hlo.plain_products(HLO, set()) == []


def test_products_of_a_real_program_are_found():
    x, w = jnp.ones((4, 6), jnp.bfloat16), jnp.ones((6, 10), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda w: jnp.sin(x @ w).sum().astype(jnp.float32)))
    program = gradient.lower(w).compile().as_text()
    assert len(hlo.plain_products(program, {10})) == 2 and hlo.plain_products(program, {7}) == []


def test_bytes_between_devices_are_counted():
    program = """
  %a = bf16[4,8]{1,0} parameter(0)
  %g = (f8e4m3fn[32,8]{1,0}, f32[2]{0}) all-gather(%a, %a), dimensions={0}
  %s = (bf16[4,8], bf16[32,8]) all-gather-start(%a), dimensions={0}
  %d = bf16[32,8]{1,0} all-gather-done(%s)
  ROOT %r = f32[4]{0} reduce-scatter(%a), to_apply=%add
"""
    assert hlo.collective_bytes(program) == {"all-gather": 32 * 8 + 2 * 4 + 32 * 8 * 2, "reduce-scatter": 16}
