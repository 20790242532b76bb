"""Rows of contiguous groups, split over a mesh, in the blocks of 128 rows that they have on one device.

A group's blocks start at its first row and at every 128th after it. Where the border between two devices cuts a block,
its scale depends on the rows of both. So that every block is quantised as it is on one device, the device that has a
block's first row takes all of it: it leaves rows of a block begun before to the device before it, and gets those that
end its last block, at most 127, from the next one.

    rows of device 0 |<----------------->|         device 1 |<------------------>|
    blocks of a group    |-----|-----|-----|-----|-----|
    taken by         |<------------------->|<-------- device 1, moved to the front
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgemm import layout
from jaxgemm.layout import SCALE_BLOCK


def take_blocks(
    arrays: Sequence[jax.Array], group_sizes: jax.Array, num_rows: int, axes: tuple, mesh_axes: tuple
) -> tuple[list[jax.Array], jax.Array]:
    """Exchanges rows at the borders of devices, such that each has whole blocks of groups.

    Args:
        arrays: `[num_rows / devices, ...]`, at least 128 rows each: the part of this device.
        group_sizes: integer `[g]`, of the groups of all rows.
        num_rows: rows of all devices.
        axes: names of the mesh axes that the rows are split over, the major one first.
        mesh_axes: names of all axes of the mesh, in its order.

    Returns:
        Arrays of 128 rows more, and the int32 sizes `[g]` of the groups among their first rows. What lies past these
        may be anything.
    """
    local_rows = num_rows // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * local_rows
    offsets = layout.group_offsets(group_sizes, num_rows)
    first, last = (row + rows_of_begun_block(offsets, row) for row in (start, start + local_rows))
    sizes = jnp.diff(jnp.clip(offsets, first, last))
    return [_from_row(x, first - start, axes, mesh_axes) for x in arrays], sizes


def rows_of_begun_block(offsets: jax.Array, row: jax.Array) -> jax.Array:
    """Returns how many rows from a row on belong to a block of a group that begins before it.

    Args:
        offsets: int32 `[g + 1]`, from `layout.group_offsets`.
        row: int32 scalar.

    Returns:
        int32 scalar, at most 127.

    Example:
        >>> offsets = jnp.array([0, 10, 300])  # blocks of the second group start at rows 10, 138 and 266
        >>> [rows_of_begun_block(offsets, jnp.int32(row)).item() for row in (10, 11, 266, 267, 300)]
        [0, 127, 0, 33, 0]
    """
    starts, ends = offsets[:-1], offsets[1:]
    block_ends = jnp.minimum(starts + (row - starts + (SCALE_BLOCK - 1)) // SCALE_BLOCK * SCALE_BLOCK, ends)
    return jnp.where((starts < row) & (row < ends), block_ends - row, 0).max()


def _from_row(x: jax.Array, row: jax.Array, axes: tuple, mesh_axes: tuple) -> jax.Array:
    """Returns the rows of a device and the first 128 of the next one, without this device's rows before `row`."""
    # NOTE: `ppermute` counts devices in the order of the mesh, whatever the order in which it is told the axes.
    ordered = tuple(sorted(axes, key=mesh_axes.index))
    ranks = np.arange(jax.lax.axis_size(axes)).reshape([jax.lax.axis_size(axis) for axis in ordered])
    ranks = ranks.transpose([ordered.index(axis) for axis in axes]).ravel()
    following = jax.lax.ppermute(x[:SCALE_BLOCK], ordered, list(zip(ranks[1:], ranks[:-1], strict=True)))
    extended = jnp.concatenate([x, following, jnp.zeros_like(following)])
    return jax.lax.dynamic_slice_in_dim(extended, row, x.shape[0] + SCALE_BLOCK)
