"""`jaxgemm.autotune` with a clock and kernels of the tests' own: the search, the cache, and who reads it."""

import dataclasses
import functools
import importlib.resources
import json
import logging
import os
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgemm
from jaxgemm import autotune_trial, dispatch, tile_candidates, tiles, tuned_rows, tuning, tuning_cache
from jaxgemm.autotune import Tuner
from jaxgemm.bench import tune as tune_command
from jaxgemm.bench.__main__ import main, make_parser
from jaxgemm.bench.measure import Call, Timing
from jaxgemm.gemm_config import GemmConfig, why_invalid
from jaxgemm.problem import GemmProblem
from jaxgemm.tuned_rows import TunedRow, TunedTable, tuned_key

GPU = "Test GPU"
E4M3, BF16, F32 = (np.dtype(d) for d in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32))
ROW, SQUARE = (1, 128), (128, 128)
ORACLE = autotune_trial.oracle


def problem(m=16, n=136, k=256, kind="dense", rhs=SQUARE, out=BF16, **options):
    return GemmProblem(kind, m, n, k, E4M3, E4M3, ROW, rhs, out, **options)


def operand_shapes(m=16, n=136, k=256):
    lhs = jax.eval_shape(lambda: jaxgemm.quantize(jnp.ones((m, k))))
    return lhs, jax.eval_shape(lambda: jaxgemm.quantize(jnp.ones((n, k)), SQUARE))


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    """A Hopper GPU, and a cache of its own."""
    monkeypatch.setenv(tuning_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "device_kind", lambda: GPU)
    monkeypatch.setattr(dispatch, "_why_not_hopper", lambda platform: None)


class Clock:
    """Says how long a call takes by its configuration, and counts what it is asked."""

    method = "a clock by hand"

    def __init__(self, microseconds=lambda config: 100.0 + config.stages):
        self.microseconds = microseconds
        self.asked = []

    def __call__(self, call, iterations):
        self.asked.append(call.config)
        return Timing((self.microseconds(call.config),) * iterations, 1.0)


def tuner(clock=None, spoil=lambda config, out: out, **options):
    """Computes every configuration in plain JAX; `spoil` may change a result or raise."""

    def compile_config(problem, config, sets):
        call = Call(lambda *operands: spoil(config, ORACLE(problem, operands)), *sets)
        call.config = config
        return call

    return Tuner(timer=clock or Clock(), compile=compile_config, **{"most_configs": 24, **options})


def run(clock=None, retune=False, sizes=(16, 136, 256), **options):
    (tuned,) = jaxgemm.autotune(
        jaxgemm.gemm, *operand_shapes(*sizes), retune=retune, tuner=tuner(clock, **options)
    ).problems
    return tuned


def explained():
    (found,) = jaxgemm.explain(jaxgemm.gemm, *operand_shapes(), platform="cuda").problems
    return found.config, found.config_source


# The search


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: None)
    with pytest.raises(NotImplementedError, match=r"autotune times kernels on an NVIDIA GPU, and JAX sees none here"):
        jaxgemm.autotune(jaxgemm.gemm, *operand_shapes())


def test_the_fastest_wins_and_is_used_from_then_on():
    wanted = list(tile_candidates.candidates(problem()))[3]
    assert explained() != (wanted, tiles.AUTOTUNED)
    tuned = run(Clock(lambda config: 50.0 if config == wanted else 100.0))
    assert tuned.winner.config == wanted and tuned.winner.microseconds == 50.0
    assert dispatch.choose_config(problem()) == (wanted, tiles.AUTOTUNED) == explained()
    assert dispatch.choose_config(problem(m=17)).source == tiles.MODEL


def test_neighbours_of_the_fastest_are_tried_until_none_is_faster():
    """The fastest is one that no candidate is: reached step by step."""
    found = run(Clock(lambda config: 100.0 + config.stages), most_configs=500)
    assert found.winner.config.stages == 2
    assert found.winner.config not in list(tile_candidates.candidates(problem()))


def test_a_difference_within_the_noise_changes_nothing():
    chosen = dispatch.choose_config(problem()).config
    tuned = run(Clock(lambda config: 100.0 if config == chosen else 99.5))
    assert tuned.winner.config == chosen
    assert dispatch.choose_config(problem()) == (chosen, tiles.AUTOTUNED)
    assert "as before (model)" in str(tuned)


def test_the_final_turn_decides():
    """One lucky measurement does not win: the fastest are measured again, side by side."""
    chosen = dispatch.choose_config(problem()).config
    lucky = next(config for config in tile_candidates.candidates(problem()) if config != chosen)
    seen = []

    def microseconds(config):
        seen.append(config)
        return 50.0 if config == lucky and seen.count(lucky) == 1 else 100.0

    assert run(Clock(microseconds)).winner.config == chosen


def test_wrong_and_failing_configurations_never_win():
    wrong, failing = list(tile_candidates.candidates(problem()))[:2]

    def spoil(config, out):
        if config == failing:
            raise RuntimeError("no such luck")
        return out.at[3, 130].set(7) if config == wrong else out

    clock = Clock(lambda config: 1.0 if config in (wrong, failing) else 100.0)
    tuned = run(clock, spoil=spoil)
    assert tuned.winner.config not in (wrong, failing)
    reasons = {trial.config: trial.rejected for trial in tuned.rejected}
    assert set(reasons) == {wrong, failing}
    assert reasons[wrong].startswith("its result differs from the dequantised product by ")
    assert reasons[failing] == "RuntimeError: no such luck"
    assert wrong not in clock.asked


def test_a_tile_in_use_that_is_wrong_is_warned_of(caplog):
    chosen = dispatch.choose_config(problem()).config
    tuned = run(spoil=lambda config, out: out * 2 if config == chosen else out)
    assert tuned.winner.config != chosen and "which was rejected" in str(tuned)
    assert [r.name for r in caplog.records] == ["jaxgemm.autotune"] and "its result differs" in caplog.text


def test_where_everything_fails_nothing_is_stored():
    def spoil(config, out):
        raise RuntimeError("broken")

    tuned = run(spoil=spoil)
    assert tuned.winner is None and "no configuration is right; the first: RuntimeError: broken" in str(tuned)
    assert not tuning_cache.rows(GPU)


def test_without_memory_for_the_oracle_results_must_agree(monkeypatch):
    def no_memory(problem, operands):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(autotune_trial, "oracle", no_memory)
    chosen = dispatch.choose_config(problem()).config
    tuned = run(spoil=lambda config, out: out if config == chosen else out + 1)
    assert tuned.winner.config == chosen
    assert all("from the first configuration that ran" in trial.rejected for trial in tuned.rejected)
    assert len(tuned.rejected) == len(tuned.trials) - 1 > 5


def test_no_more_configurations_are_tried_than_allowed():
    assert len(run(most_configs=7).trials) == 7


def test_what_has_a_row_is_not_measured_again_unless_asked():
    run(Clock(lambda config: 100.0))
    again = Clock(lambda config: 1.0)
    assert "has a row already" in str(run(again)) and not again.asked
    assert run(again, retune=True).before.source == tiles.AUTOTUNED and again.asked


def test_each_product_is_tuned_once_with_the_most_that_must_fit():
    """Bias and activation share a row with the bare product: it is measured with the bias."""

    def step(lhs, rhs, bias):
        return [jaxgemm.gemm(lhs, rhs), jaxgemm.gemm(lhs, rhs, bias, activation="gelu"), jaxgemm.gemm(lhs, rhs)]

    report = jaxgemm.autotune(step, *operand_shapes(), jnp.ones(136), tuner=tuner(most_configs=3))
    assert [(tuned.problem.has_bias, tuned.problem.activation) for tuned in report.problems] == [(True, "gelu")]
    assert dispatch.choose_config(problem()).source == tiles.AUTOTUNED


def test_what_cannot_be_tuned_is_reported_with_the_reason():
    def step(lhs, rhs):
        plain = functools.partial(jaxgemm.gemm, lhs, rhs, implementation="xla")
        return plain(), jaxgemm.gemm(jaxgemm.quantize(jnp.ones((8, 256)), (1, 256)), rhs)

    report = jaxgemm.autotune(step, *operand_shapes(), tuner=tuner())
    assert "not tuned: the call asks for implementation='xla'" in str(report)
    assert "not tuned: lhs must have blocks of (1, 128) or (128, 128), and has (1, 256)" in str(report)
    assert not tuning_cache.rows(GPU)


def test_a_training_step_is_tuned_in_all_its_products():
    def loss(x, w):
        return (jaxgemm.fp8_dot(x, w) ** 2).sum()

    report = jaxgemm.autotune(jax.grad(loss, (0, 1)), jnp.ones((16, 256)), jnp.ones((256, 136)), tuner=tuner())
    assert [tuple(tuned.winner.key[1:4]) for tuned in report.problems] == [
        (16, 136, 256),
        (16, 256, 136),
        (256, 136, 16),
    ]
    assert f"3 products on {GPU}; winners are stored in {tuning_cache.path(GPU)}" in str(report)


def test_groups_are_tuned_where_their_kernel_is_asked_for():
    sizes = jnp.array([9, 7], jnp.int32)
    lhs = jaxgemm.quantize(jnp.ones((16, 256)), implementation="xla")
    rhs = jaxgemm.quantize(jnp.ones((2, 136, 256)), SQUARE, implementation="xla")
    segments = [jaxgemm.quantize_grouped(jnp.ones((16, n)), sizes, implementation="xla") for n in (24, 136)]

    def products(implementation):
        def step(lhs, rhs, segments, sizes, total):
            product = functools.partial(jaxgemm.k_grouped_gemm, *segments, sizes, implementation=implementation)
            return (
                jaxgemm.grouped_gemm(lhs, rhs, sizes, implementation=implementation),
                product(preferred_element_type=jnp.bfloat16, accumulate=total),
            )

        return jaxgemm.autotune(step, lhs, rhs, segments, sizes, jnp.ones((2, 24, 136)), tuner=tuner(most_configs=4))

    by_name = products("mosaic")
    assert [len(tuned.trials) for tuned in by_name.problems] == [4, 4] and all(p.winner for p in by_name.problems)
    for tuned in by_name.problems:
        assert dispatch.choose_config(tuned.problem) == (tuned.winner.config, tiles.AUTOTUNED)
    summed = dataclasses.replace(by_name.problems[1].problem, out_dtype=BF16)  # as the call describes it
    assert dispatch.choose_config(summed).source == tiles.AUTOTUNED
    assert all("it has a row already" in str(tuned) for tuned in products(None).problems)


# The real runner, but for the kernel


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that computes in plain JAX and remembers its configurations."""
    seen = []

    def hopper_gemm(*operands, problem, config, **options):
        seen.append(config)
        return dispatch._run_xla(problem, *(operand for operand in operands if operand is not None))

    module = types.SimpleNamespace(hopper_gemm=hopper_gemm)
    monkeypatch.setitem(sys.modules, "jaxgemm.kernels.hopper_gemm", module)
    return seen


def test_each_configuration_reaches_the_kernel(kernel):
    one_at_a_time = threading.Lock()  # several are compiled at once, and the kernel does not know for whom

    def compile_config(problem, config, sets):
        with one_at_a_time:
            call = autotune_trial.compile_config(problem, config, sets)
            call.config = kernel[-1]
        return call

    clock = Clock()
    run_tuner = Tuner(timer=clock, compile=compile_config, most_configs=4)
    (tuned,) = jaxgemm.autotune(jaxgemm.gemm, *operand_shapes(), tuner=run_tuner).problems
    assert [trial.rejected for trial in tuned.trials] == [None] * 4
    assert {trial.config for trial in tuned.trials} == set(clock.asked) == set(kernel)


def test_compiled_functions_keep_their_tile_until_the_caches_are_cleared(kernel):
    """What the documentation of `autotune` says, of functions under jit and of single calls."""
    quantize = functools.partial(jaxgemm.quantize, implementation="xla")
    lhs, rhs = quantize(jnp.ones((16, 256)), ROW), quantize(jnp.ones((136, 256)), SQUARE)
    compiled = jax.jit(jaxgemm.gemm)
    compiled(lhs, rhs), jaxgemm.gemm(lhs, rhs)
    before = kernel[-1]
    other = next(config for config in tile_candidates.candidates(problem()) if config != before)
    tuning_cache.add(GPU, [TunedRow(tuned_key(problem()), other)])
    compiled(lhs, rhs), jaxgemm.gemm(lhs, rhs)
    assert other not in kernel
    jax.clear_caches()
    for call in (compiled, jaxgemm.gemm):
        kernel.clear()
        call(lhs, rhs)
        assert kernel == [other]


# Operands and their comparison


@pytest.mark.parametrize(
    "described",
    [
        problem(7, 9, 200, has_bias=True),
        problem(7, 9, 200, rhs=ROW, out=F32),
        problem(7, 9, 200, "grouped", num_groups=3, has_bias=True),
        problem(7, 9, 200, "masked", num_groups=3, expected_m=2, has_bias=True, fill="unspecified"),
        problem(7, 9, 500, "k_grouped", rhs=ROW, out=F32, num_groups=3, accumulate=True),
        problem(7, 9, 640, "k_grouped", rhs=ROW, out=F32, num_groups=3, segment_alignment=128),
        problem(7, 9, 200, "k_masked", rhs=ROW, out=F32, num_groups=3),
    ],
    ids=lambda p: p.kind,
)
def test_operands_suit_their_problem(described):
    (operands,) = autotune_trial.operand_sets(described)
    assert [x.dtype for x in operands[:4]] == [E4M3, F32, E4M3, F32]
    out = autotune_trial.oracle(described, operands)
    assert (out.shape, out.dtype) == (described.out_shape, described.out_dtype)
    sizes = autotune_trial.group_sizes(described)
    if sizes is not None:
        total = {"grouped": 7, "masked": 6, "k_grouped": described.k, "k_masked": 3 * 200}[described.kind]
        assert sizes.sum() == total and np.ptp(sizes) <= described.segment_alignment
    assert float(jnp.abs(out[..., :2, :].astype(jnp.float32)).mean()) > 1
    assert autotune_trial.difference(described, out, out) == 0


def test_weights_of_few_rows_are_cold():
    """As many in turn as exceed the bytes asked for, all different; those of many rows are one."""
    sets = autotune_trial.operand_sets(problem(128, 64, 256), cold_bytes=3 * 64 * 256)
    assert len(sets) == 4
    assert all(one[0] is sets[0][0] and (one[2] != sets[0][2]).any() for one in sets[1:])
    assert len(autotune_trial.operand_sets(problem(129, 64, 256), cold_bytes=3 * 64 * 256)) == 1
    grouped = problem(512, 64, 256, "grouped", num_groups=4)
    assert len(autotune_trial.operand_sets(grouped, cold_bytes=3 * 4 * 64 * 256)) == 4


def test_one_wrong_tile_stands_out():
    described = problem(300, 300, 128)
    right = jax.random.normal(jax.random.key(0), (300, 300))
    assert autotune_trial.difference(described, right.astype(BF16), right) < autotune_trial.BOUND
    assert autotune_trial.difference(described, right.at[256:, 256:].multiply(1.01), right) > autotune_trial.BOUND
    assert autotune_trial.difference(described, right.at[299, 0].set(jnp.nan), right) == np.inf
    masked = problem(8, 8, 128, "masked", num_groups=2, expected_m=5, fill="unspecified")
    ones = jnp.ones((2, 8, 8))
    assert autotune_trial.difference(masked, ones.at[:, 5:].set(jnp.nan), ones) == 0
    assert autotune_trial.difference(masked, ones.at[:, 4].set(3), ones) > 0.1


# The cache

CONFIG = GemmConfig(64, 32, 4, 1)


def row(m=16, config=CONFIG):
    return TunedRow(tuned_key(problem(m)), config, 12.5, "by hand")


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    assert tuning_cache.folder() == tmp_path / "cache"
    monkeypatch.delenv(tuning_cache.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning_cache.folder() == tmp_path / "jaxgemm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning_cache.folder() == tmp_path / "home" / ".cache" / "jaxgemm"


def test_files_are_of_a_device_and_of_versions(monkeypatch):
    names = {tuning_cache.path(GPU).name, tuning_cache.path("NVIDIA H200").name}
    monkeypatch.setattr(jax, "__version__", "9.9")
    names.add(tuning_cache.path(GPU).name)
    monkeypatch.setattr(jaxgemm, "__version__", "8.8")
    names.add(tuning_cache.path(GPU).name)
    assert len(names) == 4 and "tuned-test-gpu-jax-9.9-jaxgemm-8.8.json" in names


def test_files_are_readable_and_rows_replace_those_of_the_same_problem():
    tuning_cache.add(GPU, [row(16), row(8)])
    file = tuning_cache.add(GPU, [row(16, GemmConfig(64, 64, 5, 1))])
    assert {key.m: found.config.stages for key, found in tuning_cache.rows(GPU).items()} == {8: 4, 16: 5}
    content = json.loads(file.read_text())
    assert (content["device"], content["jax"], content["jaxgemm"]) == (GPU, jax.__version__, jaxgemm.__version__)
    assert [one["m"] for one in content["rows"]] == [8, 16]
    assert len(file.read_text().splitlines()) == 10  # a row a line
    assert not list(file.parent.glob("*.partial"))


@pytest.mark.parametrize(
    "damage", ["{", "[]", '{"format": 1}', "\0\xff", '{"format": 1, "device": "Other", "rows": []}', ""]
)
def test_a_damaged_file_is_reported_once_kept_and_built_anew(damage, caplog):
    file = tuning_cache.add(GPU, [row()])
    file.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.WARNING, "jaxgemm"):
        assert [dispatch.choose_config(problem()).source for _ in range(3)] == [tiles.MODEL] * 3
    assert len(caplog.records) == 1 and f"{file} held no table of tuned tiles" in caplog.text
    assert file.with_name(file.name + ".damaged").read_bytes() == damage.encode("latin-1")
    tuning_cache.add(GPU, [row()])
    assert dispatch.choose_config(problem()) == (CONFIG, tiles.AUTOTUNED)
    assert len(caplog.records) == 1


def test_a_file_that_is_damaged_when_it_is_written_to_is_kept_too(caplog):
    file = tuning_cache.add(GPU, [row()])
    file.write_text("{")
    tuning_cache.add(GPU, [row(8)])
    assert [key.m for key in tuning_cache.rows(GPU)] == [8]
    assert "is kept as" in caplog.text


def test_rows_that_are_not_valid_today_are_ignored():
    invalid = dataclasses.replace(CONFIG, stages=100)
    assert why_invalid(problem(), invalid)
    file = tuning_cache.add(GPU, [row(config=invalid), row(8)])
    assert dispatch.choose_config(problem()).source == tiles.MODEL
    assert "has a row already" not in str(run(most_configs=2))
    content = json.loads(file.read_text())
    content["rows"] += [{"m": 1}, 3, {**content["rows"][0], "config": {"tile_q": 1}}, {**content["rows"][0], "m": 9}]
    file.write_text(json.dumps(content))
    assert sorted(key.m for key in tuning_cache.rows(GPU)) == [8, 9, 16]


def test_a_cache_that_cannot_be_read_is_empty(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuning_cache, "_warned", set())
    tuning_cache.path(GPU).mkdir(parents=True)
    assert [tuning_cache.rows(GPU) for _ in range(3)] == [{}] * 3
    assert len(caplog.records) == 1 and "cannot be read" in caplog.text


def test_rows_are_read_again_only_when_the_file_changes(monkeypatch):
    tuning_cache.add(GPU, [row()])
    read = []
    monkeypatch.setattr(tuned_rows, "from_text", lambda text, real=tuned_rows.from_text: read.append(1) or real(text))
    for _ in range(3):
        assert len(tuning_cache.rows(GPU)) == 1
    assert len(read) <= 1
    tuning_cache.add(GPU, [row(8)])
    assert len(tuning_cache.rows(GPU)) == 2


WRITER = """
import sys, time
from jaxgemm import tuning_cache
from jaxgemm.tuned_rows import TunedKey, TunedRow
from jaxgemm.gemm_config import GemmConfig

replace = tuning_cache._replace
def slowly(file, text):  # a process that does not hold the lock would lose what the other writes meanwhile
    time.sleep(0.02)
    replace(file, text)
tuning_cache._replace = slowly
print("ready", flush=True)
sys.stdin.readline()
for i in range(10):
    key = TunedKey("dense", 2 * i + int(sys.argv[1]), 8, 8, 1, 1, 128, 2)
    tuning_cache.add("Test GPU", [TunedRow(key, GemmConfig(64, 32, 4, 1))])
"""


def test_two_processes_lose_none_of_each_others_rows():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, parity], **pipes) for parity in "01"]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert sorted(key.m for key in tuning_cache.rows(GPU)) == list(range(20))


# Tables that are shipped


def test_the_shipped_tables_are_of_the_commands_form():
    """Up to choices that configurations did not have yet when a row was measured: they have their defaults."""
    folder = importlib.resources.files("jaxgemm") / "tuned"
    for table in tuned_rows.shipped_tables():
        text = (folder / (table.device.lower().replace(" ", "-") + ".json")).read_text("utf-8")
        rewritten = tuned_rows.to_text(table)
        assert tuned_rows.from_text(rewritten) == tuned_rows.from_text(text) == table
        for one, other in zip(text.splitlines(), rewritten.splitlines(), strict=True):
            assert other.startswith(one.rstrip("},")) and one.endswith(other[-2:])
        assert table.source and table.rows


def test_rows_count_on_the_device_that_they_were_measured_on(monkeypatch):
    tables = [TunedTable(name).merged([row(config=GemmConfig(64, 32, s, 1))]) for name, s in (("A", 3), ("B", 5))]
    monkeypatch.setattr(tuned_rows, "shipped_tables", lambda: tables)
    found = {device: tiles.choose(problem(), 132, device) for device in ("A", "B", "C", None)}
    assert [found[device].config.stages for device in "AB"] == [3, 5]
    assert found["B"].source == "measured on B"
    assert found["C"] == found[None] == (tuning.choose_config(problem(), 132), tiles.MODEL)


def export(*arguments):
    return main([tune_command.EXPORT, *map(str, arguments)])


def test_rows_can_be_exported_and_merged(tmp_path, capsys):
    tuning_cache.add(GPU, [row(16), row(8)])
    assert export() == 0
    printed = tuned_rows.from_text(capsys.readouterr().out)
    assert (printed.device, printed.jax, len(printed.rows)) == (GPU, None, 2)
    assert printed.rows[row().key] == row()

    table = tmp_path / "test-gpu.json"
    old = TunedTable(GPU, source="older").merged([row(16, GemmConfig(64, 64, 3, 1)), row(4)])
    table.write_text(tuned_rows.to_text(old))
    assert export("--table", table) == 0
    merged = tuned_rows.from_text(table.read_text())
    assert merged.source == "older"
    assert {key.m: found.config.stages for key, found in merged.rows.items()} == {4: 4, 8: 4, 16: 4}


def test_exports_that_make_no_sense_are_refused(tmp_path, capsys):
    assert export() == 2 and "no rows in the cache" in capsys.readouterr().err
    tuning_cache.add(GPU, [row()])
    tuning_cache.add("Other GPU", [row()])
    assert export("--device", "Third GPU") == 2 and "no rows of Third GPU" in capsys.readouterr().err
    assert export("--table", tmp_path / "new.json") == 2 and "a table is of one device" in capsys.readouterr().err
    assert export("--cache", tmp_path / "none.json") == 2 and "holds no table" in capsys.readouterr().err
    assert export("--table", tmp_path / "new.json", "--device", GPU) == 0
    assert export("--table", tmp_path / "new.json", "--device", "Other GPU") == 2


def test_a_suite_is_tuned_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(jaxgemm, "autotune", functools.partial(jaxgemm.autotune, tuner=tuner(most_configs=2)))
    options = make_parser().parse_args(["tune", "--m", "16,8", "--n", "136", "--k", "256"])
    from jaxgemm.bench.__main__ import selected_cases

    assert tune_command.run(options, selected_cases(options)) == 0
    assert f"2 products on {GPU}" in capsys.readouterr().out
    assert sorted(key.m for key in tuning_cache.rows(GPU)) == [8, 16]
    options = make_parser().parse_args(["tune", "--m", "16", "--n", "136", "--k", "256", "--kind", "wgrad"])
    assert tune_command.run(options, selected_cases(options)) == 0
    assert {key.rhs_block_rows: key.out_bytes for key in tuning_cache.rows(GPU)} == {128: 2, 1: 4}
