"""Explicit sharding: meshes whose axes are of `jax.sharding.AxisType.Explicit`, where a type says how it is split.

The functions of this library run in automatic mode inside, and their results get the sharding that the operands
suggest: rows split as the rows of lhs, columns as the columns of rhs. Gradients get that of what they are gradients of.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Entry = Any
"""How one array axis is split: None, the name of a mesh axis, or a tuple of such names."""


def run_automatic(function: Callable[..., Any], out_entries: Callable[[], Any], *args: Any) -> Any:
    """Calls `function(*args)`, in automatic mode if an argument is explicitly sharded.

    Args:
        function: of `args`.
        out_entries: returns, for each array that the function returns (one tuple, or a list of them), how its axes
            shall be split; called only in explicit mode. Which of these splits cannot be, is dropped.
        args: pytrees of arrays.
    """
    mesh = _explicit_mesh(args)
    if mesh is None:
        return function(*args)
    out_types, tree = jax.tree.flatten(jax.eval_shape(_automatic(function, mesh), *args))
    entries = out_entries()
    entries = entries if isinstance(entries, list) else [entries]
    shardings = [NamedSharding(mesh, _spec(mesh, x.shape, e)) for x, e in zip(out_types, entries, strict=True)]
    return _automatic(function, mesh, jax.tree.unflatten(tree, shardings))(*args)


def entries_of(x: Any) -> tuple[Entry, ...]:
    """Returns how each axis of an array is explicitly split."""
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (len(x.shape) - len(spec)))


def entries_by_label(operands: Sequence[Any], labels: Sequence[Sequence[str]]) -> dict[str, Entry]:
    """Returns how each label is split: as the first operand has it that splits it."""
    found: dict[str, Entry] = {}
    for x, names in zip(operands, labels, strict=True):
        for name, entry in zip(names, entries_of(x), strict=True):
            if entry:
                found.setdefault(name, entry)
    return found


def _explicit_mesh(args: Any) -> Any:
    """Returns the mesh that any of these arrays is explicitly sharded over, or None."""
    for leaf in jax.tree.leaves(args):
        mesh = jax.typeof(leaf).sharding.mesh
        if AxisType.Explicit in (mesh.axis_types or ()):
            return mesh
    return None


def _automatic(function: Callable[..., Any], mesh: Any, out_sharding: Any = None) -> Callable[..., Any]:
    """Returns the function in automatic mode; its results gathered, good for their shapes, unless told otherwise."""
    # Not all axes: inside `shard_map` some may be manual, and have to stay so.
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    out_sharding = NamedSharding(mesh, PartitionSpec()) if out_sharding is None else out_sharding
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=out_sharding)


def _spec(mesh: Any, shape: Sequence[int], entries: Sequence[Entry]) -> PartitionSpec:
    """Returns the part of these splits that can be: no mesh axis serves twice, and shares are even."""
    used: set[Any] = set()
    spec: list[Entry] = []
    for size, entry in zip(shape, entries, strict=True):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        possible = not used & set(axes) and size % math.prod(mesh.shape[axis] for axis in axes) == 0
        used |= set(axes) if possible else set()
        spec.append(entry if possible else None)
    return PartitionSpec(*spec)
