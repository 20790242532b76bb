"""The fused MLP: the quantised maths in float64, and the same layers one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import E5M2, REQUANTISED, ROW, SAME, SQUARE, activate, assert_close, difference, random

import jaxgemm
from jaxgemm import DEEPSEEK, Recipe

GATED, JOINED, PLAIN = "gate", "gate within w_up", "no gate"
NAMES = ("x", "w_up", "w_down", "w_gate", "bias_up", "bias_down", "bias_gate")


def slope(x, activation):
    """The derivative, by a difference quotient in float64."""
    step = 1e-6
    return (activate(x + step, activation) - activate(x - step, activation)) / (2 * step)


def draw(kind, m, k, h, n, dtype=jnp.float32, bias=True, lead=()):
    """The arguments of an MLP by name."""
    shapes = {"x": (*lead, m, k), "w_up": (k, h), "w_down": (h, n), "bias_up": (h,), "bias_down": (n,)}
    if kind == GATED:
        shapes |= {"w_gate": (k, h), "bias_gate": (h,)}
    if kind == JOINED:
        shapes |= {"w_up": (k, 2, h), "bias_up": (2, h)}
    spread = {"w_up": k**-0.5, "w_gate": k**-0.5, "w_down": h**-0.5}
    drawn = {
        name: random(i, *shape, dtype=dtype, scale=spread.get(name, 1.0))
        for i, (name, shape) in enumerate(shapes.items())
    }
    return {name: a for name, a in drawn.items() if bias or not name.startswith("bias")}


def run(arguments, dout, **keywords):
    """Value and gradients by name."""
    out, pull_back = jax.vjp(lambda a: jaxgemm.fp8_mlp(**a, **keywords), arguments)
    return out, pull_back(dout)[0]


def round_trip(x, block, dtype, power_of_two):
    """What FP8 makes of a matrix, in float64: the definition in numpy, no code of the library."""
    x = np.asarray(x).astype(np.float32)
    grid = [-(-size // edge) for size, edge in zip(x.shape, block, strict=True)]
    blocks = np.zeros((grid[0], block[0], grid[1], block[1]), np.float32)
    flat = blocks.reshape(grid[0] * block[0], -1)
    flat[: x.shape[0], : x.shape[1]] = x
    amax = np.abs(blocks).max((1, 3), keepdims=True)
    scale = np.where(amax == 0, np.float32(1), amax * np.float32(1 / float(jnp.finfo(dtype).max)))
    if power_of_two:
        scale = np.float32(2.0) ** np.ceil(np.log2(np.float64(scale)))
    values = (blocks * (np.float32(1) / scale.astype(np.float32))).astype(dtype).astype(np.float64)
    return (values * scale).reshape(flat.shape)[: x.shape[0], : x.shape[1]]


def quantised_maths(arguments, dout, activation, recipe):
    """Value and gradients of the very same quantised maths, in float64 numpy."""
    a = dict.fromkeys(NAMES) | arguments
    x, k = a["x"], a["x"].shape[1]
    joined = a["w_up"].ndim == 3
    first = [(a["w_up"].reshape(k, -1), a["bias_up"])]
    if a["w_gate"] is not None:
        first = [(a["w_gate"], a["bias_gate"]), *first]

    def operand(a, name, block=None):
        block = block or getattr(recipe, f"{name}_block_shape")
        return round_trip(a, block, getattr(recipe, f"{name}_dtype"), recipe.power_of_two)

    def through(w, x, bias):
        """fprop: x by w, whose blocks may lie along k."""
        out = operand(x, "lhs") @ operand(np.asarray(w).T, "rhs").T
        return out if bias is None else out + np.asarray(bias, np.float64).reshape(-1)

    def back(w, dout):
        return operand(dout, "dout") @ operand(w, "rhs").T

    def weight_gradient(x, dout):
        if recipe.wgrad_dtype == "bf16":
            return np.float64(x.T.astype(jnp.bfloat16)) @ np.float64(dout.astype(jnp.bfloat16))
        return operand(x.T, "lhs", ROW) @ operand(dout.T, "dout", ROW).T

    def stored(a):
        return np.asarray(a).astype(x.dtype)

    pre = [np.float64(stored(through(w, x, bias))) for w, bias in first]
    *gate, up = np.split(pre[0], 2, 1) if joined else pre
    hidden = stored(activate(gate[0], activation) * up if gate else activate(up, activation))
    dhidden = np.float64(stored(back(a["w_down"], dout)))
    if gate:
        dpre = [dhidden * up * slope(gate[0], activation), dhidden * activate(gate[0], activation)]
    else:
        dpre = [dhidden * slope(up, activation)]
    dpre = [stored(d) for d in ([np.concatenate(dpre, 1)] if joined else dpre)]
    dw = [weight_gradient(x, d) for d in dpre]
    db = [np.float64(d).sum(0) for d in dpre]
    gradients = {
        "x": sum(back(w, d) for (w, _), d in zip(first, dpre, strict=True)),
        "w_down": weight_gradient(hidden, dout),
        "bias_down": np.float64(dout).sum(0),
        "w_up": dw[-1], "bias_up": db[-1], "w_gate": dw[0], "bias_gate": db[0],
    }  # fmt: skip
    out = through(a["w_down"], hidden, a["bias_down"])
    return out, {name: gradients[name].reshape(value.shape) for name, value in arguments.items()}


MIXED = Recipe(power_of_two=True, dout_dtype=E5M2)


@pytest.mark.parametrize(
    "kind, activation, sizes, recipe",
    [
        (GATED, "silu", (7, 13, 9, 5), DEEPSEEK),
        (GATED, "gelu", (33, 200, 70, 40), MIXED),
        (GATED, "silu", (70, 130, 130, 130), Recipe(wgrad_dtype="bf16")),
        (JOINED, "silu", (130, 64, 256, 130), DEEPSEEK),
        (JOINED, "silu", (33, 40, 70, 40), Recipe(lhs_block_shape=SQUARE, dout_block_shape=SQUARE)),
        (PLAIN, "gelu", (130, 64, 200, 7), DEEPSEEK),
    ],
)
def test_value_and_gradients_are_the_quantised_maths(kind, activation, sizes, recipe, implementation):
    arguments, dout = draw(kind, *sizes), random(9, sizes[0], sizes[3])
    options = {"activation": activation, "recipe": recipe, "implementation": implementation}
    out, gradients = jax.jit(functools.partial(run, **options))(arguments, dout)
    expected, expected_gradients = quantised_maths(
        jax.tree.map(np.asarray, arguments), np.asarray(dout), activation, recipe
    )
    assert_close(out, expected, REQUANTISED)
    assert gradients.keys() == arguments.keys()
    for name, gradient in gradients.items():
        assert_close(np.atleast_2d(gradient), np.atleast_2d(expected_gradients[name]), REQUANTISED)
    assert_close(jax.jit(lambda a: jaxgemm.fp8_mlp(**a, **options))(arguments), out, SAME)


def layer_by_layer(x, w_up, w_down, w_gate=None, bias_up=None, bias_down=None, bias_gate=None):
    """The same MLP as calls of fp8_dot."""
    up = jaxgemm.fp8_dot(x, w_up, bias_up).astype(jnp.float32)
    gate = jaxgemm.fp8_dot(x, w_gate, bias_gate).astype(jnp.float32)
    return jaxgemm.fp8_dot((jax.nn.silu(gate) * up).astype(x.dtype), w_down, bias_down)


def test_equals_the_layers_one_by_one():
    """Rounded to bfloat16 where they are."""
    dtype = jnp.bfloat16
    arguments, dout = draw(GATED, 30, 200, 140, 130, dtype, lead=(2,)), random(9, 2, 30, 130, dtype=dtype)
    out, gradients = jax.jit(run)(arguments, dout)

    @jax.jit
    def in_turn(arguments, dout):
        out, pull_back = jax.vjp(lambda a: layer_by_layer(**a), arguments)
        return out, pull_back(dout)[0]

    expected, expected_gradients = in_turn(arguments, dout)
    in_float32 = functools.partial(jaxgemm.fp8_mlp, **arguments, preferred_element_type=jnp.float32)
    assert jax.eval_shape(in_float32).dtype == jnp.float32
    assert out.dtype == dtype and {g.dtype for g in gradients.values()} == {np.dtype(dtype)}
    assert difference(out, expected) < 1e-5
    for name, want in expected_gradients.items():
        assert difference(gradients[name], want) < 1e-5


def test_gate_within_w_up_is_the_same_layer():
    arguments, dout = draw(GATED, 20, 64, 128, 32), random(9, 20, 32)
    joined = {name: arguments[name] for name in ("x", "w_down", "bias_down")}
    joined["w_up"] = jnp.stack([arguments["w_gate"], arguments["w_up"]], 1)
    joined["bias_up"] = jnp.stack([arguments["bias_gate"], arguments["bias_up"]])
    (out, gradients), (expected, apart) = jax.jit(run)(joined, dout), jax.jit(run)(arguments, dout)
    np.testing.assert_array_equal(out, expected)
    assert_close(gradients["x"], apart["x"], SAME)
    np.testing.assert_array_equal(gradients["w_up"][:, 0], apart["w_gate"])
    np.testing.assert_array_equal(gradients["w_up"][:, 1], apart["w_up"])
    np.testing.assert_allclose(gradients["bias_up"][0], apart["bias_gate"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead, m", [((), 0), ((2, 3), 1)])
def test_any_leading_axes_also_without_rows(lead, m):
    arguments = draw(JOINED, m, 20, 12, 7, lead=lead)
    out, gradients = jax.jit(run)(arguments, random(9, *lead, m, 7))
    assert out.shape == (*lead, m, 7)
    assert {name: g.shape for name, g in gradients.items()} == {name: a.shape for name, a in arguments.items()}


@pytest.mark.parametrize(
    "frozen, bias",
    [(("w_up", "w_gate", "w_down"), True), (("w_up", "w_gate"), False), (("w_down",), True), (("w_gate",), False)],
)
def test_quantised_weights_are_constants(frozen, bias):
    """All other gradients are what they are with float weights."""
    arguments, dout = draw(GATED, 20, 130, 70, 40, bias=bias), random(9, 20, 40)
    out, expected = jax.jit(run)(arguments, dout)
    constants = {name: jaxgemm.quantize_transposed(arguments[name], SQUARE) for name in frozen}
    rest = {name: a for name, a in arguments.items() if name not in frozen}
    got, gradients = jax.jit(functools.partial(run, **constants))(rest, dout)
    np.testing.assert_array_equal(got, out)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind, recipe", [(GATED, MIXED), (JOINED, DEEPSEEK), (PLAIN, DEEPSEEK)])
def test_low_memory_gives_the_same_bits_in_one_pass_more(kind, recipe):
    arguments, dout = draw(kind, 20, 130, 128, 40), random(9, 20, 40)
    in_one = functools.partial(run, recipe=recipe)
    in_two = functools.partial(run, recipe=recipe, low_memory=True)
    expected, got = jax.jit(in_one)(arguments, dout), jax.jit(in_two)(arguments, dout)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    programs = [str(jax.make_jaxpr(f)(arguments, dout)) for f in (in_one, in_two)]
    assert programs[1].count("fp8_quantize[") == programs[0].count("fp8_quantize[") + 1
    barriers = [program.count("optimization_barrier") for program in programs]
    assert barriers[1] > barriers[0], "XLA may make both copies at once"
    batched = jax.jit(jax.vmap(in_two, (dict.fromkeys(arguments) | {"x": 0}, None)))
    out, _ = batched({**arguments, "x": arguments["x"][None]}, dout)
    assert_close(out[0], expected[0], SAME)


@pytest.mark.parametrize("frozen", [("w_up",), ("w_up", "w_gate")])
def test_low_memory_is_no_matter_where_no_one_pass_serves(frozen):
    arguments, dout = draw(GATED, 20, 130, 70, 40), random(9, 20, 40)
    constants = {name: jaxgemm.quantize_transposed(arguments[name], SQUARE) for name in frozen}
    rest = {name: a for name, a in arguments.items() if name not in frozen}
    got = jax.jit(functools.partial(run, low_memory=True, **constants))(rest, dout)
    jax.tree.map(np.testing.assert_array_equal, got, jax.jit(functools.partial(run, **constants))(rest, dout))


def test_vmap_over_a_weight():
    arguments, dout = draw(GATED, 9, 40, 24, 16, bias=False), random(9, 9, 16)
    many = jnp.stack([arguments["w_gate"], 2 * arguments["w_gate"]])
    axes = dict.fromkeys(arguments) | {"w_gate": 0}
    batched = jax.jit(jax.vmap(run, (axes, None)))({**arguments, "w_gate": many}, dout)
    one = jax.jit(run)
    for i in range(2):
        expected = one({**arguments, "w_gate": many[i]}, dout)
        jax.tree.map(lambda a, b, i=i: assert_close(a[i], b, SAME), batched, expected)


def residual_bytes(function, *args):
    """Bytes of what is kept for the backward pass, by dtype, arguments included."""
    kept = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    sizes = {}
    for leaf in jax.tree.leaves(kept):
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.size * leaf.dtype.itemsize
    return sizes


@pytest.mark.parametrize("kind", [GATED, JOINED])
def test_residuals_are_fp8_but_for_gate_and_up(kind):
    """One byte an element of x and of each weight once, two of gate and up; the hidden activations are not kept."""
    m, k, h, n = 256, 512, 384, 640
    arguments = draw(kind, m, k, h, n, jnp.bfloat16, bias=False)
    sizes = residual_bytes(lambda a: jaxgemm.fp8_mlp(**a), arguments)
    assert sizes.keys() == {"float8_e4m3fn", "bfloat16", "float32"}
    assert sizes["float8_e4m3fn"] == m * k + 2 * k * h + h * n
    assert sizes["bfloat16"] == 2 * (2 * m * h)
    assert sizes["float32"] <= 4 * (m * k / 128 + (2 * k * h + h * n) / 128**2 + 1)


ONE = jnp.ones((4, 6)), jnp.ones((6, 8)), jnp.ones((8, 5))
x1, up1, down1 = ONE


@pytest.mark.parametrize(
    "error, call, message",
    [
        (ValueError, lambda f: f(x1, up1, down1, activation=None), "activation must be one of 'relu', .* got None"),
        (ValueError, lambda f: f(x1[:, :5], up1, down1), r"x must be \[..., k\] = \[..., 6\] to match w_up"),
        (ValueError, lambda f: f(x1, up1, down1[:7]), r"w_down must be \[h, n\] = \[8, n\] to match w_up"),
        (ValueError, lambda f: f(x1, up1, down1, up1[:, :7]), r"w_gate must be \[k, h\] = \[6, 8\] as w_up is"),
        (ValueError, lambda f: f(x1, jnp.ones((6, 3, 8)), down1), r"w_up must be \[k, 2, h\] of gate and up"),
        (ValueError, lambda f: f(x1, jnp.ones((6, 2, 8)), down1, up1), "w_gate then None, .* got a w_gate beside"),
        (ValueError, lambda f: f(x1, up1, down1, bias_gate=jnp.ones(8)), "bias_gate must be None without w_gate"),
        (ValueError, lambda f: f(x1, up1, down1, bias_up=jnp.ones(7)), r"bias_up must be \[h\] = \[8\], got \[7\]"),
        (ValueError, lambda f: f(x1, up1, down1, bias_down=jnp.ones(8)), r"bias_down must be \[n\] = \[5\]"),
        (ValueError, lambda f: f(x1, up1, jnp.ones(8)), r"w_down must be \[h, n\], got shape \[8\]"),
        (TypeError, lambda f: f(x1, up1.astype(int), down1), "w_up.dtype must be bfloat16, float16 or float32"),
        (TypeError, lambda f: f(x1, up1, down1, recipe="deepseek"), "recipe must be a jaxgemm.Recipe, got str"),
        (ValueError, lambda f: f(x1, up1, down1, implementation="x"), "implementation must be one of"),
    ],
)  # fmt: skip
def test_errors(error, call, message):
    with pytest.raises(error, match=message):
        call(jaxgemm.fp8_mlp)
