import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgemm import layout

TOTAL, GROUPS = 900, 6
sizes_lists = st.lists(st.integers(0, TOTAL // GROUPS), min_size=GROUPS, max_size=GROUPS)  # one shape: one compilation


@pytest.mark.parametrize("k", [128, 300])
def test_scale_shapes_and_inverse_for_every_m(k):
    """The bug this project starts from: for odd m the stored shape was taken for the logical one."""
    k_blocks = -(-k // 128)
    rows = range(1, 301)
    scales = [np.arange(m * k_blocks, dtype=np.float32).reshape(m, k_blocks) + 1 for m in rows]

    @jax.jit  # all in one program, since each shape on its own would be compiled on its own
    def there_and_back(scales):
        stored = [layout.to_mn_major_tma_aligned(s) for s in scales]
        return stored, [layout.from_mn_major_tma_aligned(s, m) for s, m in zip(stored, rows, strict=True)]

    for m, logical, stored, back in zip(rows, scales, *there_and_back(scales), strict=True):
        stored = np.asarray(stored)
        assert stored.shape == (k_blocks, -(-m // 4) * 4)
        np.testing.assert_array_equal(stored[:, :m], logical.T)
        np.testing.assert_array_equal(stored[:, m:], 0)
        np.testing.assert_array_equal(back, logical)


@settings(deadline=None, max_examples=6)
@given(lead=st.lists(st.integers(1, 3), max_size=2), m=st.integers(1, 40), k_blocks=st.integers(1, 4))
def test_layouts_invert_each_other_with_groups_under_jit_and_vmap(lead, m, k_blocks):
    scales = jax.random.normal(jax.random.key(m), (*lead, m, k_blocks))
    there = layout.to_mn_major_tma_aligned
    for convert in [jax.jit(there)] + ([jax.vmap(there)] if lead else []):
        stored = convert(scales)
        assert stored.shape == (*lead, k_blocks, layout.align_up(m, 4))
        np.testing.assert_array_equal(layout.from_mn_major_tma_aligned(stored, m), scales)


def test_alignment():
    assert [layout.align_up(x, 4) for x in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [layout.tma_aligned_size(7, b) for b in (1, 2, 4, 8, 16)] == [16, 8, 8, 8, 7]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layout.align_up(-1, 4), "size >= 0 and alignment > 0, got size=-1, alignment=4"),
        (lambda: layout.tma_aligned_size(4, 0), "element_bytes must be positive, got 0"),
        (lambda: layout.to_mn_major_tma_aligned(jnp.ones(3)), "scales must have at least two axes"),
        (
            lambda: layout.from_mn_major_tma_aligned(jnp.ones((1, 7)), 7),
            r"stored must be \[..., ceil\(k/128\), align_up\(m, 4\)\] = \[..., 1, 8\] for m = 7, got \[1, 7\]",
        ),
        (lambda: layout.aligned_group_offsets(jnp.ones(3)), "group_sizes must be integers"),
        (
            lambda: layout.aligned_group_offsets(jnp.ones(3, jnp.int32), 0),
            "alignment must be positive, got 0",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


jit_group_offsets = jax.jit(layout.group_offsets, static_argnums=1)
jit_clip_aligned_sizes = jax.jit(layout.clip_aligned_sizes, static_argnums=(1, 2))


@functools.partial(jax.jit, static_argnums=1)
def aligned_layout(sizes, alignment):
    offsets = layout.group_offsets(sizes, TOTAL)
    capacity = layout.aligned_capacity(TOTAL, GROUPS, alignment)
    return layout.aligned_group_offsets(sizes, alignment), layout.aligned_source_rows(offsets, capacity, alignment)


@settings(deadline=None, max_examples=60)
@given(sizes=sizes_lists, alignment=st.sampled_from([1, 8, 128]))
def test_aligned_rows_hold_each_contiguous_row_once(sizes, alignment):
    starts, (source, group, valid) = jax.tree.map(np.asarray, aligned_layout(jnp.array(sizes), alignment))
    assert (starts % alignment == 0).all() and starts[-1] <= len(valid) and len(valid) % alignment == 0
    assert sorted(source[valid]) == list(range(sum(sizes)))
    for g, size in enumerate(sizes):
        assert valid[starts[g] : starts[g + 1]].sum() == size
        assert valid[starts[g] : starts[g] + size].all()
        assert (group[starts[g] : starts[g + 1]] == g).all()


def test_capacity_is_enough_for_the_worst_sizes():
    for total in (0, 1, 5, 127, 128, 129, 1000):
        for groups in (1, 2, 7):
            singles = [1] * min(groups - 1, max(total - 1, 0))
            worst = [*singles, total - len(singles)]
            needed = sum(layout.align_up(size, 128) for size in worst)
            assert layout.aligned_capacity(total, groups) >= needed


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=6, max_size=6),
    limit=st.sampled_from([0, 1, 1000, 2**31 - 1]),
)
def test_offsets_of_any_int32_sizes_are_valid(sizes, limit):
    offsets = np.asarray(jit_group_offsets(jnp.array(sizes, jnp.int32), limit)).astype(np.int64)
    expected = np.minimum(np.cumsum([0] + [max(s, 0) for s in sizes]), limit)
    np.testing.assert_array_equal(offsets, expected)


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(-5, 400), min_size=6, max_size=6), blocks=st.sampled_from([0, 1, 5]))
def test_clipped_aligned_sizes_fit(sizes, blocks):
    limit = 128 * blocks
    clipped = np.asarray(jit_clip_aligned_sizes(jnp.array(sizes), limit, 128))
    start = 0
    for size, got in zip(sizes, clipped, strict=True):
        assert got == min(max(size, 0), limit - start)
        start = min(start + -(-max(size, 0) // 128) * 128, limit)


@pytest.mark.parametrize("size", [1, 7, layout.MOST_SUMMED_AT_ONCE, layout.MOST_SUMMED_AT_ONCE + 1])
def test_running_sums_of_few_and_of_many(size):
    numbers = np.random.default_rng(size).integers(0, 1000, size).astype(np.int32)
    sums = layout.running_sum(jnp.asarray(numbers))
    assert sums.dtype == jnp.int32
    np.testing.assert_array_equal(sums, np.cumsum(numbers))


@pytest.mark.parametrize("groups", [5, 2000])
def test_offsets_of_few_and_of_many_groups(groups):
    sizes = np.random.default_rng(groups).integers(-5, 300, groups)
    limit = int(np.maximum(sizes, 0).sum()) - 100
    expected = np.minimum(np.cumsum(np.maximum(sizes, 0)), limit)
    np.testing.assert_array_equal(layout.group_offsets(jnp.asarray(sizes), limit), [0, *expected])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64])
def test_sizes_of_any_dtype_are_counted_right(dtype):
    """More rows than the dtype can count once made every size wrap."""
    sizes = jnp.asarray([100, 50, 120], np.dtype(dtype) if dtype != np.int64 else np.int32)
    assert layout.group_offsets(sizes, 40000).tolist() == [0, 100, 150, 270]
    assert layout.clip_aligned_sizes(sizes, 384, 128).tolist() == [100, 50, 120]
    assert layout.clip_to_int32(np.array([100, 50, 120], dtype)).tolist() == [100, 50, 120]


def test_wide_sizes_are_clipped_at_both_ends():
    sizes = np.array([5 - 2**33, 2**40, 7])
    expected = [-(2**31), 2**31 - 1, 7]
    assert layout.clip_to_int32(sizes).tolist() == expected
    with jax.enable_x64(True):
        assert layout.clip_to_int32(jnp.asarray(sizes)).tolist() == expected
        assert layout.group_offsets(jnp.asarray(sizes), 9).tolist() == [0, 0, 9, 9]
