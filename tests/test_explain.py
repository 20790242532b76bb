"""`jaxgemm.explain`: every FP8 problem of a function, how often it runs, and what would compute it."""

import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jaxgemm
from jaxgemm import dispatch, tiles
from jaxgemm.gemm import k_masked_gemm

ROW, SQUARE = (1, 128), (128, 128)
THIS_FILE = __file__


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, W = shape(64, 256), shape(256, 512)


def quantized(*sizes, block=ROW):
    return jax.eval_shape(lambda x: jaxgemm.quantize(x, block), shape(*sizes))


def summary(explanation):
    return [(p.found.kind, p.found.runs, p.found.scope) for p in explanation.problems]


def products(explanation):
    return [p for p in explanation.problems if p.found.kind != "quantize"]


@pytest.fixture
def on_hopper(monkeypatch):
    """Kernels for Hopper, and no others, serve whatever is lowered for CUDA, with any JAX and no GPU."""
    monkeypatch.setattr(dispatch, "_why_not_hopper", lambda platform: None if platform == "cuda" else "no Hopper here")
    monkeypatch.setattr(dispatch, "why_triton_is_missing", lambda: "no Triton here")


# What is found


def test_a_gradient_has_its_three_products_by_name():
    def loss(x, w):
        return (jaxgemm.fp8_dot(x, w).astype(jnp.float32) ** 2).sum()

    found = jaxgemm.explain(jax.grad(loss, (0, 1)), X, W)
    assert summary(found) == [
        ("quantize", 1, "fp8_fprop"),
        ("quantize", 1, "fp8_fprop"),
        ("dense", 1, "fp8_fprop"),
        ("quantize", 1, "fp8_quantize_dout"),
        ("dense", 1, "fp8_dgrad"),
        ("dense", 1, "fp8_wgrad"),
    ]
    fprop, dgrad, wgrad = (p.found.problem for p in products(found))
    assert (fprop.m, fprop.n, fprop.k) == (64, 512, 256)
    assert (dgrad.m, dgrad.n, dgrad.k) == (64, 256, 512)
    assert (wgrad.m, wgrad.n, wgrad.k) == (256, 512, 64)


def test_steps_that_nobody_uses_are_left_out():
    """As the compiler leaves them out: here the gradient of x, and the value of a linear loss."""
    found = jaxgemm.explain(jax.grad(lambda w, x: jaxgemm.fp8_dot(x, w).sum(dtype=jnp.float32)), W, X)
    assert [p.found.scope for p in products(found)] == ["fp8_wgrad"]


def test_every_primitive_is_found():
    sizes = shape(4, dtype=jnp.int32)

    def everything(dense, grouped, masked, segments, masked_columns, sizes):
        return (
            jaxgemm.gemm(*dense),
            jaxgemm.grouped_gemm(*grouped, sizes),
            jaxgemm.masked_grouped_gemm(*masked, sizes),
            jaxgemm.k_grouped_gemm(*segments, sizes),
            k_masked_gemm(*masked_columns, sizes),
            jaxgemm.quantize(jnp.ones((8, 128))),
        )

    found = jaxgemm.explain(
        everything,
        (quantized(8, 256), quantized(16, 256, block=SQUARE)),
        (quantized(8, 256), quantized(4, 16, 256, block=SQUARE)),
        (quantized(4, 8, 256), quantized(4, 16, 256, block=SQUARE)),
        (quantized(8, 512), quantized(16, 512)),
        (quantized(4, 8, 256), quantized(4, 16, 256)),
        sizes,
        platform="cuda",
    )
    kinds = ["dense", "grouped", "masked", "k_grouped", "k_masked", "quantize"]
    assert [p.found.kind for p in found.problems] == kinds
    assert [p.flops for p in found.problems] == [2 * 8 * 16 * k for k in (256, 256, 4 * 256, 512, 4 * 256)] + [0]


@pytest.mark.parametrize(
    ("wrap", "runs", "condition"),
    [
        (jax.jit, 1, None),
        (jax.checkpoint, 1, None),
        (lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=5)[0], 5, None),
        (lambda f: lambda x: jax.lax.fori_loop(0, 3, lambda i, c: jax.lax.map(f, jnp.stack([c, c]))[0], x), 6, None),
        (lambda f: lambda x: jax.lax.while_loop(lambda c: (c < 1).all(), f, x), 1, "in each iteration of a while loop"),
        (lambda f: lambda x: jax.lax.cond((x > 0).all(), f, lambda x: x, x), 1, "if its branch is taken"),
        (lambda f: jax.jit(lambda x: jax.jit(f)(jax.checkpoint(f)(x) * 0)), 1, None),
    ],
    ids=["jit", "checkpoint", "scan", "nested scans", "while", "cond", "nested jit"],
)
def test_functions_inside_functions_are_walked(wrap, runs, condition):
    step = wrap(lambda x: jaxgemm.fp8_dot(x, jnp.ones((256, 256), jnp.bfloat16)))
    found = products(jaxgemm.explain(step, X))
    assert {(p.found.runs, p.found.condition) for p in found} == {(runs, condition)}


def test_custom_derivatives_are_walked():
    @jax.custom_jvp
    def double(x):
        return 2 * jaxgemm.fp8_dot(x, jnp.ones((256, 8), jnp.bfloat16))

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0]))
    assert [p.found.runs for p in products(jaxgemm.explain(double, X))] == [1]


def test_shapes_inside_shard_map_are_one_devices():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.shard_map(jaxgemm.fp8_dot, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    (product,) = products(jaxgemm.explain(split, X, W))
    assert (product.found.problem.m, product.found.devices) == (16, 8)
    assert "on each of 8 devices" in str(product)


def test_a_scan_counts_in_the_sums():
    once = jaxgemm.explain(lambda x: jaxgemm.quantize(x), X)
    many = jaxgemm.explain(lambda x: jax.lax.map(jaxgemm.quantize, x), shape(7, 64, 256))
    assert many.bytes == 7 * once.bytes == 7 * (64 * 256 * (2 + 1) + 2 * 64 * 4)


def test_the_users_line_is_named():
    def layer(x, w):
        return jaxgemm.fp8_dot(x, w)  # the line

    first = layer.__code__.co_firstlineno
    for function in (layer, jax.jit(layer), jax.grad(lambda x, w: layer(x, w).sum(dtype=jnp.float32))):
        for problem in jaxgemm.explain(function, X, W).problems:
            assert problem.found.source.startswith(f"{THIS_FILE}:{first + 1} (")


def test_functions_that_flax_compiles_are_walked():
    nnx = pytest.importorskip("flax.nnx")
    model = jaxgemm.flax.nnx.Linear(256, 64, rngs=nnx.Rngs(0))
    explanation = jaxgemm.explain(nnx.jit(lambda model, x: model(x)), model, shape(64, 256, dtype=jnp.float32))
    assert [p.found.problem.n for p in products(explanation)] == [64]


# What would compute it


def test_refusals_are_those_of_dispatch():
    (product,) = products(jaxgemm.explain(jaxgemm.fp8_dot, X, W, platform="cpu"))
    assert product.implementation == "xla" and product.config is None
    names = ("mosaic", "triton")
    assert product.refused == tuple((name, dispatch.why_not(name, product.found.problem, "cpu")) for name in names)


def test_the_default_platform_is_the_default_backends(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert jaxgemm.explain(jaxgemm.fp8_dot, X, W).platform == "cuda"


def test_a_named_implementation_that_cannot_is_said_not_raised():
    call = functools.partial(jaxgemm.fp8_dot, implementation="mosaic")
    found = jaxgemm.explain(call, X, W, platform="cpu")
    assert [p.implementation for p in found.problems] == [None] * 3
    assert "runs on    nothing: 'mosaic' was asked for, and raises" in str(found)


def test_the_guide_shows_what_is_chosen(on_hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: None)
    (product,) = products(jaxgemm.explain(jaxgemm.fp8_dot, shape(4096, 7168), shape(7168, 4096), platform="cuda"))
    guide = (pathlib.Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
    assert f"    tile       {tiles.describe_config(product.config)} (model)\n" in guide


def test_tiles_and_where_they_come_from(on_hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "device_kind", lambda: "NVIDIA H200")
    rows, columns = shape(64, 7168), shape(7168, 2048)
    found = jaxgemm.explain(jaxgemm.fp8_dot, rows, columns, platform="cuda")
    assert [p.config_source for p in found.problems] == ["default", "default", "measured on NVIDIA H200"]
    assert (found.problems[-1].config.tile_m, found.problems[-1].config.tile_n) == (64, 64)
    described = "tile_m=64, tile_n=64, stages=6, warpgroups=1, swap_operands=True, split_k=2"
    assert f"tile       {described} (measured on NVIDIA H200)" in str(found)
    (other,) = products(jaxgemm.explain(jaxgemm.fp8_dot, shape(63, 7168), columns, platform="cuda"))
    assert other.config_source == tiles.MODEL
    assert other.config == dispatch.choose_config(other.found.problem).config


def test_what_has_no_kernel_is_refused_with_the_reason(on_hopper):
    lhs, rhs = quantized(16, 256, block=(1, 256)), quantized(16, 256, block=SQUARE)
    (product,) = jaxgemm.explain(jaxgemm.gemm, lhs, rhs, platform="cuda").problems
    assert product.implementation == "xla"
    assert product.refused[0][1] == "lhs must have blocks of (1, 128) or (128, 128), and has (1, 256)"


def test_functions_in_front_of_quantizing_are_told(on_hopper):
    """Also where the kernel cannot take them, and XLA computes them first."""

    def loss(w, x):
        return jaxgemm.fp8_mlp(x, w, jnp.ones((512, 64), x.dtype)).sum(dtype=jnp.float32)

    for dtype, source in ((jnp.bfloat16, "default"), (jnp.float32, "default, with silu_backward left to XLA")):
        w, x = shape(256, 512, dtype=dtype), shape(64, 256, dtype=dtype)
        found = jaxgemm.explain(jax.grad(loss), w, x, platform="cuda")
        (backward,) = (p for p in found.problems if getattr(p.found.problem, "function", None) == "silu_backward")
        assert backward.config_source.startswith(source) and len(backward.found.operands) == 2
        assert f"quantize silu_backward of 64x512 and 64x512, {w.dtype} -> float8_e4m3fn 1x128" in str(backward)


def test_rows_that_count_are_told(on_hopper):
    sizes = shape(3, dtype=jnp.int32)
    masked = jaxgemm.explain(
        jaxgemm.masked_grouped_fp8_dot, shape(3, 64, 256), shape(3, 256, 512), sizes, platform="cuda"
    )
    assert "quantize masked rows of 3x64x256, bfloat16 -> float8_e4m3fn 1x128 (natural)" in str(masked)
    (wgrad,) = products(
        jaxgemm.explain(
            jax.grad(lambda w, x, sizes: jaxgemm.masked_grouped_fp8_dot(x, w, sizes).sum(dtype=jnp.float32)),
            shape(3, 256, 512), shape(3, 64, 256), sizes, platform="cuda",
        )
    )  # fmt: skip
    assert str(wgrad).startswith("k_masked 3 groups of 256x512x64, ") and "fp8_wgrad" in str(wgrad)
    segments = jaxgemm.explain(lambda x, sizes: jaxgemm.quantize_grouped(x, sizes), X, sizes, platform="cuda")
    assert "quantize 3 groups of rows of 64x256, bfloat16" in str(segments)
    assert segments.problems[0].config_source == "default"


def test_empty_products_are_not_given_to_a_kernel(on_hopper):
    (product,) = products(jaxgemm.explain(jaxgemm.fp8_dot, shape(0, 256), W, platform="cuda"))
    assert (product.implementation, product.config, product.flops) == ("xla", None, 0)


def test_nothing_is_run_and_nothing_logged(on_hopper, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise AssertionError("it ran")

    monkeypatch.setattr(dispatch, "run_gemm", fail)
    monkeypatch.setattr(dispatch, "run_quantize", fail)
    with caplog.at_level(logging.DEBUG, "jaxgemm"):
        jaxgemm.explain(jaxgemm.fp8_dot, jnp.ones((8, 128)), jnp.ones((128, 8)), platform="cuda")
    assert not [record for record in caplog.records if record.name.startswith("jaxgemm")]


# How it is told


def test_data_is_json(on_hopper):
    found = jaxgemm.explain(jaxgemm.fp8_dot, X, W, shape(512), platform="cuda")
    data = json.loads(json.dumps(found.to_json()))
    assert (data["platform"], data["flops"], data["bytes"]) == ("cuda", found.flops, found.bytes)
    product = data["problems"][-1]
    assert product["problem"]["has_bias"] and product["problem"]["rhs_block_shape"] == [128, 128]
    assert product["operands"][0] == {"shape": [64, 256], "dtype": "float8_e4m3fn"}
    assert product["config"]["tile_m"] and product["config_source"] == "model"


def test_text_has_a_paragraph_a_problem():
    text = str(jaxgemm.explain(jaxgemm.fp8_dot, X, W, platform="cpu"))
    assert text.startswith("3 FP8 problems for cpu: 16.8 MFLOP, ")
    assert text.count("\n\n") == 3
    assert "[3] dense 64x512x256, float8_e4m3fn 1x128 by float8_e4m3fn 128x128 -> bfloat16, fp8_fprop" in text


def test_a_function_without_fp8_says_so():
    assert "0 FP8 problems for cpu: the function calls nothing" in str(jaxgemm.explain(jnp.sin, X, platform="cpu"))


@pytest.mark.parametrize("version", [(0, 10, 2), (0, 11, 0)])
def test_a_jax_too_old_for_the_kernels_is_named(version, monkeypatch):
    text = ".".join(map(str, version))
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setattr(jax, "__version__", text)
    found = str(jaxgemm.explain(jaxgemm.fp8_dot, X, W, platform="cuda"))
    assert f"not mosaic it needs jax >= 0.11.1 (Python >= 3.12), and this is jax {text}" in found
    assert "runs on    mosaic" not in found
