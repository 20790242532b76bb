"""Where parameters, moments and batches are: on a mesh of two axes, `fsdp` and `tp`.

Batches are split over `fsdp`, and so are all parameters and moments, which are gathered where they are used: in FP8, as
`jaxgemm` quantises a weight before it travels. Over `tp`, the first linear layer of a block is split by columns and the
second by rows, so that a block ends in one sum.
"""

import argparse
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("fsdp", "tp")
COLUMNS = ("_qkv", "_up")
"""Endings of the names of linear layers that are split by columns over `tp`."""
ROWS = ("_out", "_down")


def parse_mesh(text: str) -> dict[str, int]:
    """Reads `fsdp=2,tp=4`; an axis that is not named has one device.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in AXES or name in sizes or not size.isdigit() or int(size) < 1:
            raise argparse.ArgumentTypeError(f"must be like fsdp=2,tp=4, got {text}")
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in AXES}


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """Makes the mesh, of the first devices if there are more.

    Raises:
        ValueError: if there are fewer.
    """
    count = math.prod(sizes.values())
    if count > jax.device_count():
        raise ValueError(f"a mesh of {sizes} needs {count} devices, there are {jax.device_count()}")
    shape = tuple(sizes[name] for name in AXES)
    return jax.make_mesh(shape, AXES, devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * 2)


def split_batch(mesh: Mesh, windows: jax.Array) -> jax.Array:
    """Splits a batch over `fsdp`."""
    return jax.lax.with_sharding_constraint(windows, NamedSharding(mesh, P("fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Says how each array of a state (parameters or moments, by their paths) is split."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        return NamedSharding(mesh, _spec(mesh, names, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def replicate(mesh: Mesh, x: Any) -> Any:
    """Puts the same array on every device, also those of other processes, each of which must call this."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def gather(mesh: Mesh, x: jax.Array) -> np.ndarray:
    """Returns all of a split array, on every process."""
    return np.asarray(jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(x))


def _spec(mesh: Mesh, names: list[str], shape: tuple[int, ...]) -> P:
    """Splits columns or rows of linear layers over `tp`, then the first axis that divides over `fsdp`."""
    entries: list[str | None] = [None] * len(shape)
    layer = names[-2] if len(names) > 1 else ""
    if layer.endswith(COLUMNS):
        entries[-1] = "tp"
    elif layer.endswith(ROWS) and len(shape) == 2:
        entries[0] = "tp"
    entries = [
        entry if entry and size % mesh.shape[entry] == 0 else None for entry, size in zip(entries, shape, strict=True)
    ]
    for axis, size in enumerate(shape):
        if entries[axis] is None and size % mesh.shape["fsdp"] == 0:
            entries[axis] = "fsdp"
            break
    return P(*entries)
