"""Inside `jax.shard_map`: over which mesh axes a value varies from device to device.

JAX tracks this in the type of a value and lets each primitive demand that its operands agree, so that gradients of
replicated values are summed over the mesh where, and only where, they must be.
"""

from collections.abc import Sequence
from typing import Any

import jax


def varying_axes(x: Any) -> frozenset[Any]:
    """Returns the mesh axes that any leaf of `x` varies over; empty outside of `shard_map`."""
    types = [jax.typeof(leaf) for leaf in jax.tree.leaves(x)]
    return frozenset().union(*(t.manual_axis_type.varying for t in types))


def is_manual() -> bool:
    """Says whether what is traced now is inside `shard_map`: split by hand, over some mesh axes at least."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def match_varying(operands: Sequence[Any]) -> list[Any]:
    """Casts every operand to vary over the axes that any of them varies over, as one primitive's operands must."""
    union = varying_axes(list(operands))
    return [_cast_varying(x, union - varying_axes(x)) for x in operands]


def sum_replicated(gradient: Any, axes: frozenset[Any]) -> Any:
    """Sums the gradient of a value that varies over `axes` only, over the other axes that the gradient varies over."""
    extra = varying_axes(gradient) - axes
    return jax.lax.psum(gradient, tuple(sorted(extra, key=str))) if extra else gradient


def result_type(operands: Sequence[Any], shape: Sequence[int], dtype: Any) -> Any:
    """Returns the abstract value of a primitive's result: of this shape and dtype, varying as its operands do."""
    first = operands[0]
    sharding = first.sharding.update(spec=jax.sharding.PartitionSpec(*[None] * len(shape)))
    return first.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


def _cast_varying(x: Any, axes: frozenset[Any]) -> Any:
    return jax.lax.pcast(x, tuple(sorted(axes, key=str)), to="varying") if axes else x
