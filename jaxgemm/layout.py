"""Pure functions between the logical and the stored layouts of values, scales and groups.

Scales are *logical* as `[..., m, ceil(k/128)]`: one row per row of the values. Kernels read them *stored*: transposed
to `[..., ceil(k/128), align_up(m, 4)]` with zero padding, so that every row is a multiple of 16 bytes, as the tensor
memory accelerator (TMA) of a Hopper GPU demands. JAX arrays have no strides, so the two layouts are two shapes, and
each conversion has an exact inverse.

Groups of rows are *contiguous* (row `i` belongs to the group whose cumulative sizes enclose `i`) or *aligned*: each
group starts at a multiple of 128 and ends in padding, as the weight gradient's contracted axis needs it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SCALE_BLOCK = 128
"""Elements of the contracted axis that share a scale, and the kernels' tile of that axis (DeepSeek-V3, 3.3.2)."""

TMA_ALIGNMENT_BYTES = 16
"""Strides of a TMA transfer must be multiples of this (CUDA driver API, `cuTensorMapEncodeTiled`)."""

MOST_SUMMED_AT_ONCE = 1024
"""Most numbers whose running sums are taken as sums of n by n numbers."""

VALUE_ROW_ALIGNMENT = 8
"""Stored values are padded to a multiple of this many rows: the height of a swizzled shared-memory tile."""


def cdiv(size: int, divisor: int) -> int:
    """Returns `ceil(size / divisor)`.

    Example:
        >>> cdiv(300, 128)
        3
    """
    return -(-size // divisor)


def align_up(size: int, alignment: int) -> int:
    """Returns the smallest multiple of `alignment` that is at least `size`.

    Raises:
        ValueError: if `size` is negative or `alignment` is not positive.

    Example:
        >>> align_up(7, 4)
        8
    """
    if size < 0 or alignment <= 0:
        raise ValueError(f"align_up needs size >= 0 and alignment > 0, got size={size}, alignment={alignment}")
    return cdiv(size, alignment) * alignment


def tma_aligned_size(size: int, element_bytes: int) -> int:
    """Returns the length of a row of `size` elements of `element_bytes` bytes, padded to a multiple of 16 bytes.

    Raises:
        ValueError: if `element_bytes` is not positive or `size` is negative.

    Example:
        >>> tma_aligned_size(7, 4)  # float32 scales: a multiple of four
        8
    """
    if element_bytes <= 0:
        raise ValueError(f"element_bytes must be positive, got {element_bytes}")
    return align_up(size, TMA_ALIGNMENT_BYTES // math.gcd(TMA_ALIGNMENT_BYTES, element_bytes))


def pad_trailing(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zero-pads the trailing axes of `array` at their ends up to `shape`; no copy where they have it already."""
    lead = array.ndim - len(shape)
    widths = [(0, 0)] * lead + [(0, new - old) for new, old in zip(shape, array.shape[lead:], strict=True)]
    return jnp.pad(array, widths) if any(high for _, high in widths) else array


def to_mn_major_tma_aligned(scales: jax.Array) -> jax.Array:
    """Transposes logical scales into the stored layout: `stored[..., j, i] = scales[..., i, j]`, padding zero.

    Args:
        scales: `[..., m, kb]`, any number of leading (group) axes; float32 in this library, any dtype works.

    Returns:
        `[..., kb, tma_aligned_size(m)]` of the same dtype.

    Raises:
        ValueError: if `scales` has fewer than two axes.

    Example:
        >>> to_mn_major_tma_aligned(jnp.ones((7, 1), jnp.float32)).shape
        (1, 8)
    """
    _require_matrix("scales", scales)
    m, k_blocks = scales.shape[-2:]
    stored_m = tma_aligned_size(m, scales.dtype.itemsize)
    return pad_trailing(jnp.swapaxes(scales, -1, -2), (k_blocks, stored_m))


def from_mn_major_tma_aligned(stored: jax.Array, m: int) -> jax.Array:
    """Inverts `to_mn_major_tma_aligned`: drops the padding and transposes back.

    Args:
        stored: `[..., kb, tma_aligned_size(m)]`.
        m: the logical number of rows.

    Returns:
        `[..., m, kb]` of the same dtype.

    Raises:
        ValueError: if the last axis of `stored` is not `tma_aligned_size(m)`.

    Example:
        >>> from_mn_major_tma_aligned(jnp.ones((1, 8), jnp.float32), 7).shape
        (7, 1)
    """
    _require_matrix("stored", stored)
    expected = tma_aligned_size(m, stored.dtype.itemsize)
    if stored.shape[-1] != expected:
        raise ValueError(
            f"stored must be [..., ceil(k/128), align_up(m, 4)] = [..., {stored.shape[-2]}, {expected}] for m = {m}, "
            f"got {list(stored.shape)}"
        )
    return jnp.swapaxes(stored[..., :m], -1, -2)


def group_offsets(group_sizes: jax.Array, limit: int) -> jax.Array:
    """Returns where each contiguous group starts, and where the last one ends.

    Sizes are made valid first, since under `jit` a bad one cannot raise: a negative size counts as zero, and whatever
    lies past `limit` rows is cut off.

    Args:
        group_sizes: integer `[g]`.
        limit: the number of rows there are.

    Returns:
        int32 `[g + 1]`, not decreasing, from 0 to at most `limit`.

    Example:
        >>> group_offsets(jnp.array([3, -2, 9]), limit=10).tolist()
        [0, 3, 3, 10]
    """
    # Clipping each size first keeps the running sum of g sizes below g * limit.
    sizes = jnp.clip(clip_to_int32(group_sizes), 0, limit)
    ends = jnp.minimum(_saturating_cumsum(sizes, limit, limit), limit)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends])


def aligned_group_offsets(group_sizes: jax.Array, alignment: int = SCALE_BLOCK) -> jax.Array:
    """Returns where each group starts when every group is padded to a multiple of `alignment`, and the total.

    Args:
        group_sizes: integer `[g]`; a negative size counts as zero. The total must fit in int32.
        alignment: positive.

    Returns:
        int32 `[g + 1]`; group `i` owns the rows from entry `i` to entry `i + 1`.

    Raises:
        ValueError: if `group_sizes` is not one axis of integers or `alignment` is not positive.

    Example:
        >>> aligned_group_offsets(jnp.array([1, 0, 128, 129])).tolist()
        [0, 128, 128, 256, 512]
    """
    if group_sizes.ndim != 1 or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers [g], got {group_sizes.dtype}{list(group_sizes.shape)}")
    if alignment <= 0:
        raise ValueError(f"alignment must be positive, got {alignment}")
    sizes = jnp.maximum(clip_to_int32(group_sizes), 0)
    aligned = (sizes + (alignment - 1)) // alignment * alignment
    return jnp.concatenate([jnp.zeros(1, jnp.int32), running_sum(aligned)])


def aligned_capacity(size: int, num_groups: int, alignment: int = SCALE_BLOCK) -> int:
    """Returns a static bound on the rows that `num_groups` aligned groups of `size` rows in all can take.

    Example:
        >>> aligned_capacity(300, 2)
        512
    """
    # At most min(g, size) groups hold a row, each wasting up to alignment - 1 rows, and the sum is a multiple.
    return (size + min(num_groups, size) * (alignment - 1)) // alignment * alignment


def aligned_source_rows(
    offsets: jax.Array, capacity: int, alignment: int = SCALE_BLOCK
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maps every row of the aligned layout to the contiguous row it holds.

    Args:
        offsets: int32 `[g + 1]`, from `group_offsets`.
        capacity: the aligned layout's rows, at least what `aligned_capacity` returns.
        alignment: positive.

    Returns:
        `(source, group, valid)`, each `[capacity]`: the contiguous row (0 where there is none), its group, and whether
        the aligned row holds a row at all.

    Example:
        >>> source, group, valid = aligned_source_rows(jnp.array([0, 1, 3]), capacity=6, alignment=2)
        >>> source.tolist(), valid.tolist()
        ([0, 0, 1, 2, 0, 0], [True, False, True, True, False, False])
    """
    sizes = jnp.diff(offsets)
    starts = aligned_group_offsets(sizes, alignment)
    position = jnp.arange(capacity, dtype=jnp.int32)
    group = group_of_row(starts, capacity)
    within = position - starts[group]
    valid = (within < sizes[group]) & (position < starts[-1])
    return jnp.where(valid, offsets[group] + within, 0), group, valid


def clip_to_int32(sizes: Any) -> jax.Array:
    """Returns integers as int32. Wider ones are clipped, not wrapped: too large a size stays too large.

    Example:
        >>> clip_to_int32(np.array([7, 2**40, -(2**40)])).tolist()
        [7, 2147483647, -2147483648]
    """
    given, kept = jnp.iinfo(sizes.dtype), np.iinfo(np.int32)  # numpy does not know int4
    low, high = max(given.min, kept.min), min(given.max, kept.max)
    if isinstance(sizes, (np.ndarray, np.generic)):  # before JAX makes int32 of it, as it does without x64
        return jnp.asarray(sizes.clip(low, high).astype(np.int32))
    if (low, high) != (given.min, given.max):
        sizes = jnp.clip(sizes, jnp.asarray(low, sizes.dtype), jnp.asarray(high, sizes.dtype))
    return sizes.astype(jnp.int32)


def clip_aligned_sizes(group_sizes: jax.Array, limit: int, alignment: int) -> jax.Array:
    """Makes the sizes of aligned groups valid: what lies past `limit` rows of the aligned layout is cut off.

    Args:
        group_sizes: integer `[g]`; a negative size counts as zero.
        limit: rows of the aligned layout.
        alignment: positive; 1 for contiguous groups.

    Returns:
        int32 `[g]`.

    Example:
        >>> clip_aligned_sizes(jnp.array([100, -1, 200]), limit=256, alignment=128).tolist()
        [100, 0, 128]
    """
    sizes = jnp.clip(clip_to_int32(group_sizes), 0, limit)
    aligned = (sizes + (alignment - 1)) // alignment * alignment
    ends = _saturating_cumsum(aligned, limit, limit + alignment - 1)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.minimum(ends, limit)[:-1]])
    return jnp.minimum(sizes, limit - starts)


def group_of_row(offsets: jax.Array, num_rows: int) -> jax.Array:
    """Returns the group of each of `num_rows` rows, int32; rows past the last group count to it.

    Example:
        >>> group_of_row(jnp.array([0, 2, 2, 3]), num_rows=4).tolist()
        [0, 0, 2, 2]
    """
    position = jnp.arange(num_rows, dtype=jnp.int32)
    # As jnp.searchsorted, which cannot be split over the mesh axes that a `shard_map` leaves to the compiler.
    group = jnp.sum(offsets[None, 1:] <= position[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(group, offsets.shape[0] - 2)


def running_sum(numbers: jax.Array) -> jax.Array:
    """Returns the sum of each of int32 `[n]` and of all before it.

    A few numbers take one reduction; a scan, which does less work, takes a chain of kernels on a GPU.

    Example:
        >>> running_sum(jnp.array([3, 0, 2])).tolist()
        [3, 3, 5]
    """
    if numbers.shape[0] > MOST_SUMMED_AT_ONCE:
        return jnp.cumsum(numbers)
    index = jnp.arange(numbers.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(index[None] <= index[:, None], numbers[None], 0), axis=1, dtype=numbers.dtype)


def _saturating_cumsum(sizes: jax.Array, limit: int, largest: int) -> jax.Array:
    """Sums up int32 sizes of at most `largest` each without wrapping: a sum is right, or at least `limit`."""
    if sizes.shape[0] * largest <= jnp.iinfo(jnp.int32).max:
        return running_sum(sizes)
    return jax.lax.associative_scan(lambda a, b: jnp.where(a > limit - b, limit, a + b), sizes)


def _require_matrix(name: str, array: jax.Array) -> None:
    if array.ndim < 2:
        raise ValueError(f"{name} must have at least two axes, got shape {list(array.shape)}")
