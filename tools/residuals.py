"""Prints the tables of docs/memory.md: what layers keep from the forward to the backward pass, in MiB.

Counted in the program that JAX differentiates, each array once, parameters left out: they stay alive anyway. Nothing
is computed, so this runs anywhere, in seconds:

    python tools/residuals.py
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Var

import jaxgemm
from jaxgemm import layout

MIB = 2**20
NAMES = ("jaxgemm_lhs", "jaxgemm_rhs", "jaxgemm_pre_activation")
KEEP = jax.checkpoint_policies.save_only_these_names

Function = Callable[..., jax.Array]


def kept_mib(function: Function, x: Any, weights: tuple[Any, ...]) -> tuple[float, float]:
    """Returns the MiB that a function keeps for its backward pass: of activations, and of weights in FP8.

    Args:
        function: of x and the weights.
        x: shape and dtype, its rows unlike any size of a weight.
        weights: shapes and dtypes; the arrays themselves are not counted, copies of them are.
    """
    traced = jax.make_jaxpr(lambda *args: jax.tree.leaves(jax.vjp(function, *args)[1]))(x, *weights).jaxpr
    kept = {var for var in traced.outvars if isinstance(var, Var)} - set(traced.invars[1:])
    rows = math.prod(x.shape[:-1])
    sizes = {True: 0, False: 0}
    for var in kept:
        is_activation = bool({rows, layout.cdiv(rows, layout.SCALE_BLOCK)} & set(var.aval.shape))
        sizes[is_activation] += var.aval.size * var.aval.dtype.itemsize
    return sizes[True] / MIB, sizes[False] / MIB


def bf16_dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """A linear layer."""
    return x @ w


def bf16_gated(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A gated MLP."""
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def bf16_plain(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """An MLP without gate."""
    return jax.nn.gelu(x @ up) @ down


def fp8_gated_layers(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A gated MLP of single layers."""
    return jaxgemm.fp8_dot(jax.nn.silu(jaxgemm.fp8_dot(x, gate)) * jaxgemm.fp8_dot(x, up), down)


def fp8_plain_layers(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """An MLP without gate, of single layers."""
    return jaxgemm.fp8_dot(jaxgemm.fp8_dot(x, up, activation="gelu"), down)


def fp8_gated(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """A gated MLP, fused."""
    return jaxgemm.fp8_mlp(x, up, down, gate)


def variants(fused: Function) -> dict[str, Function]:
    """Returns a function as it is, and with one, two or all of its named residuals dropped."""
    choices = [[other for other in NAMES if other != name] for name in NAMES] + [[NAMES[2]], []]
    rows = {"": fused}
    for kept in choices:
        dropped = [f"`{name}`" for name in NAMES if name not in kept]
        what = " and ".join(dropped) if kept else "any"
        rows[f", without {what}"] = jax.checkpoint(fused, policy=KEEP(*kept))
    return rows


def cases() -> dict[str, tuple[tuple[int, ...], list[tuple[int, int]], dict[str, Function]]]:
    """Returns by title: the shape of x, those of the weights, and the functions to compare."""
    saveable = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)
    fused_plain = functools.partial(jaxgemm.fp8_mlp, activation="gelu")
    return {
        "Linear layer, 4096 -> 14336": (
            (8192, 4096),
            [(4096, 14336)],
            {"bfloat16": bf16_dense, "`fp8_dot`": jaxgemm.fp8_dot},
        ),
        "Gated MLP, 4096 -> 14336 -> 4096": (
            (8192, 4096),
            [(4096, 14336), (4096, 14336), (14336, 4096)],
            {
                "bfloat16": bf16_gated,
                "bfloat16, `dots_saveable`": saveable(bf16_gated),
                "`fp8_dot` three times": fp8_gated_layers,
                **{f"`fp8_mlp`{what}": function for what, function in variants(fp8_gated).items()},
            },
        ),
        "MLP with gelu, 7168 -> 2048 -> 7168": (
            (8192, 7168),
            [(7168, 2048), (2048, 7168)],
            {
                "bfloat16": bf16_plain,
                "bfloat16, `dots_saveable`": saveable(bf16_plain),
                "`fp8_dot` twice": fp8_plain_layers,
                **{f"`fp8_mlp`{what}": function for what, function in variants(fused_plain).items()},
            },
        ),
    }


def table() -> str:
    """Returns the tables in Markdown."""
    lines: list[str] = []
    for title, (x_shape, weight_shapes, functions) in cases().items():
        x, *weights = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x_shape, *weight_shapes))
        lines += [f"{title}, {x_shape[0]} rows:", "", "| | activations | weights | sum |", "|---|---|---|---|"]
        for name, function in functions.items():
            activations, copies = kept_mib(function, x, tuple(weights))
            lines.append(f"| {name} | {activations:.0f} | {copies:.0f} | {activations + copies:.0f} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
