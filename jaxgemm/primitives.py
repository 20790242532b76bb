"""The JAX primitives: one equation each in a jaxpr, lowered per platform.

`fp8_gemm`, `fp8_grouped_gemm`, `fp8_masked_grouped_gemm`, `fp8_k_grouped_gemm`, `fp8_k_masked_gemm` and `fp8_quantize`
work on the stored arrays of `ScaledArray`; `jaxgemm.gemm` and `jaxgemm.quantize` wrap them. They have batching rules
for any choice of batched operands, and no derivatives: those exist above quantisation, in `jaxgemm.dot`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import dispatch as jax_dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxgemm import dispatch, layout, partition
from jaxgemm.explicit_axes import entries_by_label, run_automatic
from jaxgemm.layout import clip_to_int32
from jaxgemm.manual_axes import match_varying, result_type
from jaxgemm.problem import GemmProblem, QuantizeProblem, RowSums
from jaxgemm.scaled_array import stored_scales_shape, stored_values_shape, transposed_block_shape
from jaxgemm.scopes import kernel_label
from jaxgemm.split_rule import gemm_rule, quantize_rule, row_sums_rule

fp8_gemm_p = Primitive("fp8_gemm")
fp8_grouped_gemm_p = Primitive("fp8_grouped_gemm")
fp8_masked_grouped_gemm_p = Primitive("fp8_masked_grouped_gemm")
fp8_k_grouped_gemm_p = Primitive("fp8_k_grouped_gemm")
fp8_k_masked_gemm_p = Primitive("fp8_k_masked_gemm")
fp8_quantize_p = Primitive("fp8_quantize")
fp8_quantize_p.multiple_results = True
fp8_row_sums_p = Primitive("fp8_row_sums")
fp8_row_sums_p.multiple_results = True

GEMM_PRIMITIVES = {
    "dense": fp8_gemm_p,
    "grouped": fp8_grouped_gemm_p,
    "masked": fp8_masked_grouped_gemm_p,
    "k_grouped": fp8_k_grouped_gemm_p,
    "k_masked": fp8_k_masked_gemm_p,
}


def bind_gemm(problem: GemmProblem, implementation: str | None, *operands: Any) -> jax.Array:
    """Binds the primitive of `problem.kind`; `operands` as in `dispatch.run_gemm`."""
    problem = replace(problem, label=problem.label or kernel_label())
    matched = match_varying(operands)
    rule = gemm_rule(problem, [x.shape for x in operands])

    def bind(*operands: Any) -> jax.Array:
        return GEMM_PRIMITIVES[problem.kind].bind(*operands, problem=problem, implementation=implementation)

    def out_entries() -> Any:
        by_label = entries_by_label(operands, rule.operands)
        return tuple(by_label.get(label) for label in rule.results[0])

    return run_automatic(bind, out_entries, *matched)


def bind_quantize(problem: QuantizeProblem, implementation: str | None, *inputs: jax.Array) -> list[jax.Array]:
    """Binds `fp8_quantize`; results as in `reference.quantize`."""
    problem = replace(problem, label=problem.label or kernel_label())
    matched = match_varying(inputs)
    rule = quantize_rule(problem, [x.shape for x in inputs])

    def bind(*inputs: jax.Array) -> list[jax.Array]:
        return fp8_quantize_p.bind(*inputs, problem=problem, implementation=implementation)

    def out_entries() -> Any:
        by_label = entries_by_label(inputs, rule.operands)
        return [tuple(by_label.get(label.removesuffix("/")) for label in labels) for labels in rule.results]

    return run_automatic(bind, out_entries, *matched)


def bind_row_sums(
    problem: RowSums, given: Sequence[jax.Array], lhs: jax.Array, rhs: jax.Array, sizes: jax.Array
) -> list[jax.Array]:
    """Binds `fp8_row_sums`: the `given` sums over rows, or the same from where the rows lie.

    Args:
        problem: how they are computed.
        given: `problem.function(lhs, rhs, sizes)`, but for rounding and dtypes.
        lhs: float `[m, k]`.
        rhs: float `[m, n]`.
        sizes: integer `[g]`: how many rows each contiguous group has.

    Returns:
        As `given`.
    """
    operands = (lhs, rhs, clip_to_int32(sizes), *given)
    rule = row_sums_rule(problem, [x.shape for x in operands])

    def bind(*operands: jax.Array) -> list[jax.Array]:
        return fp8_row_sums_p.bind(*operands, problem=problem, implementation=None)

    def out_entries() -> Any:
        by_label = entries_by_label(operands, rule.operands)
        return [tuple(by_label.get(label) for label in labels) for labels in rule.results]

    return run_automatic(bind, out_entries, *operands)


# Abstract evaluation: shapes and dtypes of the results.


def _gemm_abstract(*operands: Any, problem: GemmProblem, implementation: str | None) -> Any:
    del implementation
    return result_type(operands, problem.out_shape, problem.out_dtype)


def _quantize_abstract(*inputs: Any, problem: QuantizeProblem, implementation: str | None) -> list[Any]:
    del implementation
    outputs: list[Any] = []
    arrays, _ = problem.split_inputs(inputs)
    for plain, (*lead, rows, cols) in problem.results([x.shape for x in arrays]):
        if plain.natural:
            outputs += _stored_types(inputs, rows, cols, plain.block_shape, plain.dtype)
        if plain.transposed:
            block_shape = transposed_block_shape(plain.block_shape, rows, cols)
            outputs += _stored_types(inputs, cols, rows, block_shape, plain.dtype)
        if plain.column_sum:
            lead = [problem.num_groups] if problem.rows == "segments" else lead
            outputs.append(result_type(inputs, (*lead, cols), jnp.float32))
    return outputs


def _stored_types(inputs: Sequence[Any], rows: int, cols: int, block_shape: tuple[int, int], dtype: Any) -> list[Any]:
    lead = inputs[0].shape[:-2]
    return [
        result_type(inputs, (*lead, *stored_values_shape(rows, cols)), dtype),
        result_type(inputs, (*lead, *stored_scales_shape(rows, cols, block_shape)), jnp.float32),
    ]


def _row_sums_abstract(*operands: Any, problem: RowSums, implementation: str | None) -> Any:
    del problem, implementation
    return operands[3:]


# Batching: mapped axes are moved to the front, then folded into what the primitives can do by themselves.


def _batch_dense(
    operands: Sequence[Any], axes: Sequence[int | None], *, problem: GemmProblem, implementation: str | None
) -> tuple[jax.Array, int]:
    size, operands = _axes_to_front(operands, axes)
    rhs_is_shared = all(axis is None for axis in axes[2:])
    if rhs_is_shared:
        return _batch_rows(operands, size, problem, implementation), 0
    # One group for each mapped index, every row of it valid.
    groups = [_broadcast_front(x, size, axis) for x, axis in zip(operands, axes, strict=True)]
    masked_m = jnp.full(size, problem.m, jnp.int32)
    masked = replace(problem, kind="masked", num_groups=size, fill="unspecified")
    return bind_gemm(masked, implementation, *groups, masked_m), 0


def _batch_rows(operands: list[Any], size: int, problem: GemmProblem, implementation: str | None) -> jax.Array:
    """A batch of lhs alone is one product of more rows, if each is scaled by itself."""
    lhs_values, lhs_scales, *rest = operands
    lhs_values = _broadcast_front(lhs_values, size, 0 if lhs_values.ndim == 3 else None)
    lhs_scales = _broadcast_front(lhs_scales, size, 0 if lhs_scales.ndim == 3 else None)
    if problem.lhs_block_shape[0] != 1:
        return jax.lax.map(lambda lhs: bind_gemm(problem, implementation, *lhs, *rest), (lhs_values, lhs_scales))
    stored_m = lhs_values.shape[1]
    logical_scales = layout.from_mn_major_tma_aligned(lhs_scales, problem.m)
    logical_scales = layout.pad_trailing(logical_scales, (stored_m, logical_scales.shape[-1]))
    rows = replace(problem, m=size * stored_m)
    scales = layout.to_mn_major_tma_aligned(logical_scales.reshape(size * stored_m, logical_scales.shape[-1]))
    out = bind_gemm(rows, implementation, lhs_values.reshape(size * stored_m, lhs_values.shape[-1]), scales, *rest)
    return out.reshape(size, stored_m, problem.n)[:, : problem.m]


def _batch_masked(
    operands: Sequence[Any], axes: Sequence[int | None], *, problem: GemmProblem, implementation: str | None
) -> tuple[jax.Array, int]:
    """A batch of groups is more groups."""
    size, operands = _axes_to_front(operands, axes)
    batched = [_broadcast_front(x, size, axis) for x, axis in zip(operands, axes, strict=True)]
    groups = [x.reshape(size * problem.num_groups, *x.shape[2:]) for x in batched]
    out = bind_gemm(replace(problem, num_groups=size * problem.num_groups), implementation, *groups)
    return out.reshape(size, *problem.out_shape), 0


def _batch_in_turn(
    operands: Sequence[Any], axes: Sequence[int | None], *, problem: GemmProblem, implementation: str | None
) -> tuple[jax.Array, int]:
    """Runs the products of a batch one after the other: each has its own partition into groups."""
    return _map(functools.partial(bind_gemm, problem, implementation), operands, axes), 0


def _batch_quantize(
    operands: Sequence[Any],
    axes: Sequence[int | None],
    *,
    problem: QuantizeProblem,
    implementation: str | None,
) -> tuple[list[jax.Array], list[int]]:
    bind = functools.partial(bind_quantize, problem, implementation)
    if problem.rows == "segments":  # of which each array has its own
        outputs = _map(bind, operands, axes)
    else:
        size, operands = _axes_to_front(operands, axes)
        outputs = bind(*(_broadcast_front(x, size, axis) for x, axis in zip(operands, axes, strict=True)))
    return outputs, [0] * len(outputs)


def _batch_row_sums(
    operands: Sequence[Any], axes: Sequence[int | None], *, problem: RowSums, implementation: str | None
) -> tuple[Sequence[Any], Sequence[int | None]]:
    """A batch has the sums that it was given: each element's groups would be split in their own way."""
    del problem, implementation
    return operands[3:], axes[3:]


def _map(bind: Callable[..., Any], operands: Sequence[Any], axes: Sequence[int | None]) -> Any:
    """Binds a primitive for each element of a batch, one after the other."""
    _, operands = _axes_to_front(operands, axes)
    mapped = [x for x, axis in zip(operands, axes, strict=True) if axis is not None]

    def one(slices: list[Any]) -> Any:
        remaining = iter(slices)
        return bind(*(x if axis is None else next(remaining) for x, axis in zip(operands, axes, strict=True)))

    return jax.lax.map(one, mapped)


def _axes_to_front(operands: Sequence[Any], axes: Sequence[int | None]) -> tuple[int, list[Any]]:
    """Returns the size of the mapped axis, and the operands with it in front."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    return size, [x if a is None else jnp.moveaxis(x, a, 0) for x, a in zip(operands, axes, strict=True)]


def _broadcast_front(x: Any, size: int, axis: int | None) -> Any:
    return jnp.broadcast_to(x, (size, *x.shape)) if axis is None else x


# Derivatives: there are none at this level, and the error says where they are.


def _refuse_jvp(name: str, advice: str, primals: Any, tangents: Any, **params: Any) -> Any:
    del primals, tangents, params
    raise NotImplementedError(f"{name} has no derivative: it takes or makes FP8 values. {advice}")


# Lowering, and evaluation outside of jit.


def _register(primitive: Primitive, abstract: Any, batch: Any, run: Any, advice: str) -> None:
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = functools.partial(_refuse_jvp, primitive.name, advice)
    primitive.def_impl(functools.partial(_run_compiled, primitive))
    # NOTE: private, and without a public way: tells JAX that the lowering must know its devices, as that of any
    # custom_partitioning function must, which this lowering has inside.
    jax_dispatch.prim_requires_devices_during_lowering.add(primitive)
    for platform in (None, "cpu", "cuda"):
        mlir.register_lowering(primitive, functools.partial(_lower, primitive, run, platform), platform=platform)


def _lower(primitive: Primitive, run: Any, platform: str | None, ctx: Any, *operands: Any, **params: Any) -> Any:
    """Lowers to a function that the compiler may split over several devices; inside `shard_map`, to that of one.

    The compiler asks this process how to split, so an exported program, which outlives it, gets that of one device
    too, as does a `shard_map` that is manual over some mesh axes only. Splitting is left to the compiler alone there:
    it knows how to split the plain operations, and gathers the operands of a kernel.
    """
    module = ctx.module_context  # NOTE: its attributes are not documented; what may be missing counts as one device
    context = module.axis_context
    is_local = getattr(context, "manual_axes", ()) or getattr(context, "num_devices", 1) == 1
    exported = getattr(getattr(module, "lowering_parameters", None), "for_export", False)
    local = functools.partial(run, dispatch if is_local or exported else partition, platform or "default")
    return mlir.lower_fun(local, multiple_results=primitive.multiple_results)(ctx, *operands, **params)


def _run_compiled(primitive: Primitive, *operands: Any, **params: Any) -> Any:
    with jax.disable_jit(False):  # one primitive is one program, also where the user's functions are not compiled
        return _compiled(primitive, tuple(params.items()))(*operands)


@functools.lru_cache(maxsize=4096)
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(functools.partial(primitive.bind, **dict(params)))


def _run_gemm(
    runner: Any, platform: str, *operands: Any, problem: GemmProblem, implementation: str | None
) -> jax.Array:
    return runner.run_gemm(problem, platform, implementation, *operands)


def _run_quantize(
    runner: Any, platform: str, *inputs: Any, problem: QuantizeProblem, implementation: str | None
) -> list[jax.Array]:
    return runner.run_quantize(problem, platform, implementation, *inputs)


def _run_row_sums(
    runner: Any, platform: str, *operands: Any, problem: RowSums, implementation: str | None
) -> list[jax.Array]:
    return runner.run_row_sums(problem, platform, implementation, *operands)


_GEMM_ADVICE = "Differentiate jaxgemm.fp8_dot, grouped_fp8_dot or masked_grouped_fp8_dot of the originals instead."
_register(fp8_gemm_p, _gemm_abstract, _batch_dense, _run_gemm, _GEMM_ADVICE)
_register(fp8_grouped_gemm_p, _gemm_abstract, _batch_in_turn, _run_gemm, _GEMM_ADVICE)
_register(fp8_masked_grouped_gemm_p, _gemm_abstract, _batch_masked, _run_gemm, _GEMM_ADVICE)
_register(fp8_k_grouped_gemm_p, _gemm_abstract, _batch_in_turn, _run_gemm, _GEMM_ADVICE)
_register(fp8_k_masked_gemm_p, _gemm_abstract, _batch_masked, _run_gemm, _GEMM_ADVICE)
_register(
    fp8_quantize_p, _quantize_abstract, _batch_quantize, _run_quantize,
    "Differentiate jaxgemm.fp8_dot of the originals, or stop the gradient before quantizing.",
)  # fmt: skip
_register(fp8_row_sums_p, _row_sums_abstract, _batch_row_sums, _run_row_sums, _GEMM_ADVICE)
