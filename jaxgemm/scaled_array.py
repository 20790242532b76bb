"""`ScaledArray`: FP8 values with one float32 scale a block, as one pytree."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from jaxgemm import layout
from jaxgemm.explicit_axes import entries_of, run_automatic

FP8_DTYPES = (np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2))

ROW_BLOCK = (1, layout.SCALE_BLOCK)
"""Scaling block of activations and gradients: 128 consecutive elements of one row."""

SQUARE_BLOCK = (layout.SCALE_BLOCK, layout.SCALE_BLOCK)
"""Scaling block of weights."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ScaledArray:
    """An array kept as FP8 values times one float32 scale per block: `original ~ values * scales`, block by block.

    The last axis is the one that a product contracts. Build one with `jaxgemm.quantize` or `ScaledArray.from_parts`;
    `values` and `scales` read it. It is a pytree whose leaves are the two *stored* arrays, laid out and padded as the
    kernels need them (see `jaxgemm.layout`); leading axes (groups, layers, `vmap`) may come and go freely, so it
    passes through `jit`, `scan`, `vmap`, `device_put` and checkpointing.

    Attributes:
        stored_values: FP8 `[..., align_up(rows, 8), align_up(cols, 128)]`, zero padded.
        stored_scales: float32. For blocks of one row `[..., ceil(cols / block), align_up(rows, 4)]`, transposed and
            zero padded; otherwise `[..., ceil(rows / block), ceil(cols / block)]`.
        rows: logical length of the last axis but one.
        cols: logical length of the last axis.
        block_shape: `(1, 128)`, `(128, 128)`, `(1, cols)` (one scale a row) or `(rows, cols)` (one scale in all).
        segment_alignment: 1, or 128 if `cols` is made of groups that each start at a multiple of 128 and are padded
            with zeros, as `jaxgemm.quantize_grouped` writes them for `jaxgemm.k_grouped_gemm`.
    """

    stored_values: jax.Array
    stored_scales: jax.Array
    rows: int = dataclasses.field(metadata={"static": True})
    cols: int = dataclasses.field(metadata={"static": True})
    block_shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    segment_alignment: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def from_parts(
        cls, values: jax.Array, scales: jax.Array, block_shape: tuple[int, int] = SQUARE_BLOCK
    ) -> "ScaledArray":
        """Joins the values and scales of a published FP8 checkpoint, checked.

        Args:
            values: FP8 `[..., rows, cols]`, the contracted axis last: a linear layer's weight as `[n, k]`.
            scales: float32 `[..., ceil(rows / block_rows), ceil(cols / block_cols)]`, to multiply the values with
                (DeepSeek-V3's `weight_scale_inv`).
            block_shape: as in `jaxgemm.quantize`.

        Returns:
            The `ScaledArray` of these parts.

        Raises:
            TypeError: if `values` is not FP8 or `scales` is not float32.
            ValueError: if the shapes do not belong together or the block shape is not supported.

        Example:
            >>> weight = jnp.ones((200, 300), jnp.float8_e4m3fn)
            >>> ScaledArray.from_parts(weight, jnp.ones((2, 3), jnp.float32), (128, 128))
            ScaledArray(shape=(200, 300), dtype=float8_e4m3fn, block_shape=(128, 128))
        """
        values, scales = jnp.asarray(values), jnp.asarray(scales)
        if values.dtype not in FP8_DTYPES:
            raise TypeError(f"values must be float8_e4m3fn or float8_e5m2, got {values.dtype}")
        if scales.dtype != jnp.float32:
            raise TypeError(f"scales must be float32, got {scales.dtype}")
        if values.ndim < 2:
            raise ValueError(f"values must be [..., rows, cols], got shape {list(values.shape)}")
        *lead, rows, cols = values.shape
        block = resolve_block_shape(block_shape, rows, cols)
        expected = (*lead, layout.cdiv(rows, block[0]), layout.cdiv(cols, block[1]))
        if scales.shape != expected:
            names = [f"ceil(m/{block[0]})" if block[0] > 1 else "m", f"ceil(k/{block[1]})"]
            raise ValueError(
                f"scales must be [{', '.join(['...'] * bool(lead) + names)}] = {list(expected)}, "
                f"got {list(scales.shape)}"
            )
        return cls(store_values(values), store_scales(scales, block), rows, cols, block)

    @property
    def shape(self) -> tuple[int, ...]:
        """The logical shape, leading axes included."""
        return (*self.stored_values.shape[:-2], self.rows, self.cols)

    @property
    def ndim(self) -> int:
        """The number of logical axes."""
        return len(self.stored_values.shape)

    @property
    def dtype(self) -> np.dtype:
        """The FP8 dtype of the values."""
        return np.dtype(self.stored_values.dtype)

    @property
    def values(self) -> jax.Array:
        """The logical FP8 values, `[..., rows, cols]`."""
        return _logical(lambda v: v[..., : self.rows, : self.cols], entries_of, self.stored_values)

    @property
    def scales(self) -> jax.Array:
        """The logical float32 scales, `[..., ceil(rows / block_rows), ceil(cols / block_cols)]`."""
        if is_mn_major(self.block_shape):
            view = functools.partial(layout.from_mn_major_tma_aligned, m=self.rows)
            return _logical(view, _transposed_entries, self.stored_scales)
        return self.stored_scales

    @property
    def is_transposable(self) -> bool:
        """Whether blocks turn with the array: square ones, and one scale in all."""
        return self.block_shape in (SQUARE_BLOCK, (max(self.rows, 1), max(self.cols, 1)))

    @property
    def T(self) -> "ScaledArray":
        """The transpose of the last two axes: exact, and only for blocks that are their own transpose.

        Raises:
            ValueError: for blocks of one row. Their transpose would scale along the wrong axis: quantise the
                transposed original instead.
        """
        if not self.is_transposable:
            raise ValueError(
                f"only an array with square blocks (128, 128) or one scale in all can be transposed, block_shape is "
                f"{self.block_shape}: quantize the transposed original instead"
            )
        if isinstance(self.stored_values, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda q: q.T, self)
        block = (self.block_shape[1], self.block_shape[0])
        values = jnp.swapaxes(self.values, -1, -2)
        return type(self).from_parts(values, jnp.swapaxes(self.scales, -1, -2), block)

    def __repr__(self) -> str:
        if not all(hasattr(leaf, "shape") for leaf in (self.stored_values, self.stored_scales)):
            return f"ScaledArray({self.stored_values!r}, {self.stored_scales!r})"  # a tree_map put other leaves in
        segments = f", segment_alignment={self.segment_alignment}" if self.segment_alignment != 1 else ""
        return f"ScaledArray(shape={self.shape}, dtype={self.dtype}, block_shape={self.block_shape}{segments})"


def _from_serialized(aux_data: Any, children: Any) -> ScaledArray:
    stored_values, stored_scales = children
    rows, cols, block_shape, segment_alignment = aux_data
    return ScaledArray(stored_values, stored_scales, rows, cols, tuple(block_shape), segment_alignment)


# For programs that take or return one and are stored by `jax.export`.
jax.export.register_pytree_node_serialization(
    ScaledArray,
    serialized_name="jaxgemm.ScaledArray",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(text)),
    from_children=_from_serialized,
)


def resolve_block_shape(block_shape: tuple[int, int], rows: int, cols: int) -> tuple[int, int]:
    """Checks a scaling block against the two axes it divides.

    Raises:
        ValueError: if it is none of `(1, 128)`, `(128, 128)`, `(1, cols)`, `(rows, cols)`.
    """
    allowed = (ROW_BLOCK, SQUARE_BLOCK, (1, max(cols, 1)), (max(rows, 1), max(cols, 1)))
    block = tuple(block_shape) if isinstance(block_shape, (tuple, list)) else block_shape
    if block in ((1, cols), (rows, cols)):  # of an empty axis, one element
        block = tuple(max(size, 1) for size in block)
    if block not in allowed:
        raise ValueError(
            f"block_shape must be (1, 128), (128, 128), (1, k) = (1, {cols}) or (m, k) = ({rows}, {cols}), "
            f"got {block_shape}"
        )
    return block


def transposed_block_shape(block_shape: tuple[int, int], rows: int, cols: int) -> tuple[int, int]:
    """Returns the block that the transpose of a `[rows, cols]` array quantised with `block_shape` is scaled by.

    Square blocks and one scale in all turn with the array; blocks of one row go on lying along the last axis.
    """
    if block_shape in (ROW_BLOCK, SQUARE_BLOCK):
        return block_shape
    rows, cols = max(rows, 1), max(cols, 1)
    return (cols, rows) if block_shape == (rows, cols) else (1, rows)


def is_mn_major(block_shape: tuple[int, int]) -> bool:
    """Says whether scales of these blocks are stored transposed: those with one scale or more for every row."""
    return block_shape[0] == 1


def store_values(values: jax.Array) -> jax.Array:
    """Zero-pads logical values `[..., rows, cols]` to the stored shape; no copy where they have it already."""
    return layout.pad_trailing(values, stored_values_shape(*values.shape[-2:]))


def store_scales(scales: jax.Array, block_shape: tuple[int, int]) -> jax.Array:
    """Lays logical scales out as the kernels read them."""
    return layout.to_mn_major_tma_aligned(scales) if is_mn_major(block_shape) else scales


def stored_values_shape(rows: int, cols: int) -> tuple[int, int]:
    """Returns the stored shape of values of the logical shape `[rows, cols]`."""
    return layout.align_up(rows, layout.VALUE_ROW_ALIGNMENT), layout.align_up(cols, layout.SCALE_BLOCK)


def stored_scales_shape(rows: int, cols: int, block_shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the stored shape of the scales of values of the logical shape `[rows, cols]`."""
    row_blocks, col_blocks = layout.cdiv(rows, block_shape[0]), layout.cdiv(cols, block_shape[1])
    if is_mn_major(block_shape):
        return col_blocks, layout.tma_aligned_size(rows, np.dtype(np.float32).itemsize)
    return row_blocks, col_blocks


def _logical(view: Callable[[Any], Any], entries: Callable[[Any], tuple], stored: Any) -> Any:
    """Applies `view` to a stored leaf, also to the abstract ones that `jax.eval_shape` puts in.

    Where it is explicitly sharded, what is cut off is padding, and the rest is split as `entries` says where it can be.
    """
    if isinstance(stored, jax.ShapeDtypeStruct):
        return jax.eval_shape(view, stored)
    return run_automatic(view, lambda: entries(stored), stored)


def _transposed_entries(stored: Any) -> tuple:
    *lead, columns, rows = entries_of(stored)
    return *lead, rows, columns
