"""How the primitives run on a mesh: each device's share of the work, and the sums over the mesh.

The compiler's automatic SPMD partitioning asks, for each primitive, how to split it; `jaxgemm.split_rule` answers. A
split that would cut a block of scales is not taken: the compiler then moves the operand. Where the contracted axis is
split, float32 partial products are added over the mesh before bias and activation.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import Mesh, NamedSharding

from jaxgemm import dispatch, layout, reference
from jaxgemm.problem import GemmProblem, QuantizeProblem, RowSums
from jaxgemm.row_blocks import take_blocks
from jaxgemm.split_rule import Axes, Dims, Split, SplitRule, gemm_rule, quantize_rule, row_sums_rule

NO_MESH = jax.sharding.AbstractMesh((), ())

KERNEL_CALLS = ("mosaic_gpu_v2", "triton_kernel_call", "triton_kernel_call_ffi")
"""What programs call kernels by; `jax.export` must be told that it will exist where they run: in this process."""


def run_gemm(problem: GemmProblem, platform: str, implementation: str | None, *operands: Any) -> jax.Array:
    """`dispatch.run_gemm`, split over the mesh that the program is compiled for."""
    return _run(problem, platform, implementation, *operands)


def run_quantize(
    problem: QuantizeProblem, platform: str, implementation: str | None, *inputs: jax.Array
) -> list[jax.Array]:
    """`dispatch.run_quantize`, split over the mesh that the program is compiled for."""
    return _run(problem, platform, implementation, *inputs)


def run_row_sums(problem: RowSums, platform: str, implementation: str | None, *operands: jax.Array) -> list[jax.Array]:
    """The given sums, or those that the devices make of their rows, added over the mesh."""
    return _run(problem, platform, implementation, *operands)


def _run(problem: Any, platform: str, implementation: str | None, *operands: Any) -> Any:
    function = _partitioned(problem, platform, implementation, tuple(x.shape for x in operands))
    # A program for several devices names what it calls by an address alone. This tells two of them apart, also to the
    # persistent compilation cache, when that is told to leave addresses out of its keys.
    described = f"{sys.modules[__package__].__version__} {problem} {implementation}"
    with set_xla_metadata(jaxgemm=described):
        return function(*operands)


@functools.lru_cache(maxsize=4096)
def _partitioned(problem: Any, platform: str, implementation: str | None, shapes: tuple) -> Any:
    """Returns the function that computes `problem`, with its rules attached."""
    is_gemm = isinstance(problem, GemmProblem)
    make_rule, choose_split, run, run_local = _STEPS[type(problem)]
    rule = make_rule(problem, shapes)
    choose = functools.partial(choose_split, rule)

    def whole(*operands: Any) -> Any:
        return run(problem, platform, implementation, *operands)

    def partition(mesh: Any, operand_types: Any, result_types: Any) -> Any:
        results = jax.tree.leaves(result_types, is_leaf=lambda x: hasattr(x, "sharding"))
        mesh = _mesh_of_devices(operand_types[0]) if mesh.empty else mesh
        split = choose(mesh, *([_spec(x, mesh) for x in arrays] for arrays in (operand_types, results)))
        specs = [split.operand_spec(dims) for dims in rule.operands]
        if rule.epilogue:
            specs[-rule.epilogue :] = [split.result_spec(dims) for dims in rule.operands[-rule.epilogue :]]
        operand_shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        result_shardings = [NamedSharding(mesh, split.result_spec(dims)) for dims in rule.results]

        def share(*operands: Any) -> Any:
            # One device's arrays have no sharding, also where the whole program is traced in explicit mode.
            with jax.sharding.use_abstract_mesh(NO_MESH):
                return run_local(problem, platform, implementation, rule, split, *operands)

        return mesh, share, result_shardings[0] if is_gemm else result_shardings, operand_shardings

    def infer(mesh: Any, operand_types: Any, result_types: Any) -> Any:
        """For the compiler's older partitioner, GSPMD, which asks in place of reading the rule."""
        del result_types
        unsplit = [[()] * len(dims) for dims in rule.results]
        split = choose(mesh, [_spec(x, mesh) for x in operand_types], unsplit)
        shardings = [NamedSharding(mesh, split.result_spec(dims)) for dims in rule.results]
        return shardings[0] if is_gemm else shardings

    function = custom_partitioning(whole)
    function.def_partition(
        partition, infer_sharding_from_operands=infer, decode_shardings=False, sharding_rule=rule.sharding_rule()
    )
    return function


def local_gemm(
    problem: GemmProblem,
    platform: str,
    implementation: str | None,
    rule: SplitRule,
    split: Split,
    *operands: Any,
) -> jax.Array:
    """One device's share of a product; partial sums over k are added over the mesh in float32."""
    share = dataclasses.replace(
        problem,
        m=problem.m // split.shares("m"),
        n=problem.n // split.shares("n"),
        k=rule.lengths["k"] // split.shares("k") if "k" in split.letters else problem.k,
        num_groups=problem.num_groups // split.shares("g"),
    )
    parts, epilogue = operands[:4], list(operands[4:])
    if problem.kind == "k_grouped":
        epilogue[-1] = _local_segments(problem, epilogue[-1], share.k, split.letters.get("k", ()))
    elif problem.kind == "k_masked":
        epilogue[-1] = _local_mask(epilogue[-1], rule.lengths["k"], split.letters.get("k", ()))
    elif problem.kind != "dense":
        epilogue[-1] = _local_rows(problem, epilogue[-1], problem.m, split.letters.get("m", ()))
    if "k" not in split.letters:
        return _run_once_lowered(dispatch.run_gemm, share, platform, implementation, *parts, *epilogue)

    partial = dataclasses.replace(
        share, has_bias=False, accumulate=False, activation=None, out_dtype=np.dtype(np.float32)
    )
    sizes = epilogue.pop() if problem.kind != "dense" else None
    rest = [] if sizes is None else [sizes]
    total = _run_once_lowered(dispatch.run_gemm, partial, platform, implementation, *parts, *rest)
    total, share, sizes = _sum(share, rule, split, total, sizes)
    addend = epilogue.pop() if epilogue else None
    if problem.kind in ("k_grouped", "k_masked"):
        return (total if addend is None else total + addend).astype(problem.out_dtype)
    return reference.finish_partial_sum(share, total, addend, sizes)


def local_quantize(
    problem: QuantizeProblem,
    platform: str,
    implementation: str | None,
    rule: SplitRule,
    split: Split,
    *inputs: jax.Array,
) -> list[jax.Array]:
    """One device's share of a quantising pass; column sums are added over the mesh."""
    axes = split.letters.get("r", ())
    if problem.rows == "masked":
        inputs = (*inputs[:-1], _local_mask(inputs[-1], rule.lengths["r"], axes))
    outputs = _run_once_lowered(dispatch.run_quantize, problem, platform, implementation, *inputs)
    if not axes:
        return outputs
    # Of all results, a column sum alone has no rows.
    pairs = zip(outputs, rule.results, strict=True)
    return [x if {"r", "r/"} & set(dims) else jax.lax.psum(x, axes) for x, dims in pairs]


def local_row_sums(
    problem: RowSums,
    platform: str,
    implementation: str | None,
    rule: SplitRule,
    split: Split,
    *operands: jax.Array,
) -> list[jax.Array]:
    """One device's share of sums over rows: of blocks that begin with it, added over the mesh; given, if it has all.

    Where they are added, what the given ones are made of is without use, and the compiler drops it, with all that
    would have brought the rows together.
    """
    del platform, implementation
    lhs, rhs, sizes, *given = operands
    axes = split.letters.get("k", ())
    if not axes:
        return given
    (lhs, rhs), sizes = take_blocks([lhs, rhs], sizes, rule.lengths["k"], axes, split.mesh.axis_names)
    totals = problem.function(lhs, rhs, sizes)
    triples = zip(totals, rule.results, given, strict=True)
    return [_add_up(split, total, dims).astype(x.dtype) for total, dims, x in triples]


def _run_once_lowered(run: Any, problem: Any, platform: str, implementation: str | None, *operands: jax.Array) -> Any:
    """`run(problem, platform, implementation, *operands)`, lowered once in a process for equal arguments.

    The compiler asks for the share of each call by itself, also of those that are equal: a model of 14 layers has
    hundreds. To lower a kernel takes a tenth of a second or more, to call what is lowered a few milliseconds.
    """
    is_product = isinstance(problem, GemmProblem) and dispatch.choose(problem, platform, implementation) == "mosaic"
    tile = dispatch.choose_config(problem) if is_product and dispatch.has_work(problem) else None
    types = tuple((x.shape, np.dtype(x.dtype)) for x in operands)
    return _lowered(run, problem, platform, implementation, types, tile, jax.config.read("jax_enable_x64"))(*operands)


@functools.lru_cache(maxsize=1024)
def _lowered(run: Any, problem: Any, platform: str, implementation: str | None, types: Any, *otherwise: Any) -> Any:
    """Returns a function that calls the lowered one; `otherwise` is what else its lowering depends on."""
    del otherwise
    function = jax.jit(functools.partial(run, problem, platform, implementation))
    if platform not in ("cpu", "cuda"):
        return function
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in KERNEL_CALLS]
    exported = jax.export.export(function, platforms=[platform], disabled_checks=unchecked)
    return exported(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in types)).call


def _sum(
    problem: GemmProblem, rule: SplitRule, split: Split, partial: jax.Array, sizes: Any
) -> tuple[jax.Array, GemmProblem, Any]:
    """Adds partial products over the mesh.

    Returns:
        The sum, and problem and sizes of the part of it that this device has.
    """
    total = _add_up(split, partial, rule.results[0])
    for letter, axes in split.scattered.items():
        if letter == "m" and problem.kind in ("grouped", "masked"):
            sizes = _local_rows(problem, sizes, problem.m, axes)
        share: dict[str, Any] = {letter: total.shape[rule.results[0].index(letter)]}
        problem = dataclasses.replace(problem, **share)
    return total, problem, sizes


def _add_up(split: Split, partial: jax.Array, dims: Dims) -> jax.Array:
    """Adds partial sums over k over the mesh, and leaves the sum split where the result shall be."""
    for letter, axes in split.scattered.items():
        if letter in dims:
            return jax.lax.psum_scatter(partial, axes, scatter_dimension=dims.index(letter), tiled=True)
    return jax.lax.psum(partial, split.letters["k"])


def _local_rows(problem: GemmProblem, sizes: jax.Array, rows: int, axes: Axes) -> jax.Array:
    """Returns the sizes that groups have in this device's part of `rows` rows, which are split over `axes`."""
    if not axes:
        return sizes
    if problem.kind == "masked":
        return _local_mask(sizes, rows, axes)
    local_rows = rows // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * local_rows
    return jnp.diff(jnp.clip(layout.group_offsets(sizes, rows) - start, 0, local_rows))


def _local_mask(sizes: jax.Array, rows: int, axes: Axes) -> jax.Array:
    """Returns how many of the first rows that count are in this device's part of `rows` rows, split over `axes`."""
    if not axes:
        return sizes
    local_rows = rows // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * local_rows
    return jnp.clip(jnp.clip(sizes, 0, rows).astype(jnp.int32) - start, 0, local_rows)


def _local_segments(problem: GemmProblem, sizes: jax.Array, local_k: int, axes: Axes) -> jax.Array:
    """Returns how many valid columns of each group are among this device's `local_k`.

    Segments and shares both start at multiples of the alignment, so the part of a segment that a device has is laid
    out there as a segment of its own.
    """
    if not axes:
        return sizes
    sizes = layout.clip_aligned_sizes(sizes, problem.k, problem.segment_alignment)
    starts = layout.aligned_group_offsets(sizes, problem.segment_alignment)[:-1] - jax.lax.axis_index(axes) * local_k
    return jnp.clip(starts + sizes, 0, local_k) - jnp.clip(starts, 0, local_k)


_STEPS: dict[type, Any] = {
    GemmProblem: (gemm_rule, SplitRule.split_product, dispatch.run_gemm, local_gemm),
    QuantizeProblem: (quantize_rule, SplitRule.split_pass, dispatch.run_quantize, local_quantize),
    RowSums: (row_sums_rule, SplitRule.split_row_sums, dispatch.run_row_sums, local_row_sums),
}
"""For each kind of problem: its rule, how a split is chosen by it, what runs unsplit, and what each device's share."""


def _mesh_of_devices(array: Any) -> Mesh:
    """Returns a mesh of one axis, for a program of several devices whose arrays are split over no mesh."""
    places = array.sharding.devices_indices_map(array.shape)
    return Mesh(np.array(list(places)), ("devices",))


def _spec(array: Any, mesh: Any) -> list[Axes]:
    """Returns over which mesh axes the compiler has split each axis of an array, as far as names can say it.

    The compiler may use a part of a mesh axis, where a letter has fewer blocks than the axis has devices, or split
    unevenly. No name says that: such an axis counts as whole, and what is left of it is gathered.
    """
    if array.sharding is None:  # not decided yet
        return [()] * len(array.shape)
    try:
        places = array.sharding.devices_indices_map(array.shape)
    except ValueError:  # an uneven split
        return [()] * len(array.shape)
    return [
        _split_axes(np.vectorize(lambda device, i=i: places[device][i].start or 0, otypes=[int])(mesh.devices), mesh)
        for i in range(len(array.shape))
    ]


def _split_axes(starts: np.ndarray, mesh: Any) -> Axes:
    """Returns the mesh axes, major ones first, that explain where each device's share of an array axis starts."""
    strides = {}
    for dimension, name in enumerate(mesh.axis_names):
        step = np.diff(starts, axis=dimension)
        if step.any():
            strides[name] = step.flat[0]
    axes = tuple(sorted(strides, key=lambda name: strides[name], reverse=True))
    share = min(strides.values(), default=0)
    expected = np.zeros_like(starts)
    for name in reversed(axes):
        if strides[name] != share:
            return ()
        position = np.arange(mesh.shape[name]) * share
        dimension = mesh.axis_names.index(name)
        expected = expected + np.expand_dims(position, [d for d in range(starts.ndim) if d != dimension])
        share *= mesh.shape[name]
    return axes if np.array_equal(starts, expected) else ()
