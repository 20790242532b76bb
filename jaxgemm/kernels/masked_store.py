"""Storing a wave straight from registers, element by element: for outputs whose rows TMA cannot address.

TMA needs rows of a multiple of 16 bytes. Others are stored padded, and then copied by XLA; or as here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT

LANES = 32
SCALAR = plgpu.Layout.WG_SPLAT(())


def store_masked(
    values: jax.Array, out_gmem: Any, row: Any, column: Any, rows_left: Any, columns_left: Any, transposed: bool
) -> None:
    """Stores `values [rows, columns]` to rows and columns of the output from `row` and `column` on, as far as allowed.

    Each warp stores eight rows of sixteen bytes at once (PTX ISA, register fragment of the wgmma accumulator).

    Args:
        values: `[64, width]` of the output's dtype, laid out as an accumulator; `[64, rows]` if transposed.
        out_gmem: the output `[..., m, n]`, contiguous.
        row: first row, counted over all leading axes (int32 scalar).
        column: first column.
        rows_left: rows to store at most; may be negative.
        columns_left: columns to store at most; may be negative.
        transposed: whether the rows of `values` are the output's columns.
    """
    pitch = out_gmem.shape[-1]
    pairs = not transposed and pitch % 2 == 0  # else the second of two neighbours may not be aligned

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ACCUMULATOR_LAYOUT, SCALAR, SCALAR, SCALAR, SCALAR))
    def store(ctx, out, values, row, column, rows_left, columns_left):
        del ctx
        fragment = _Fragment(out, values, pitch, transposed)
        fragment.store(pairs, *(x.registers.flat[0] for x in (row, column, rows_left, columns_left)))

    store(out_gmem, values, *(jnp.int32(x) for x in (row, column, rows_left, columns_left)))


class _Fragment:
    """The registers of one thread, and where in the output they go."""

    def __init__(self, out: ir.Value, values: mgpu.FragmentedArray, pitch: int, transposed: bool):
        self.base, self.values, self.pitch, self.transposed = mgpu.utils.memref_ptr(out), values, pitch, transposed
        self.i32, self.i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        thread = mgpu.utils.thread_idx()
        lane = arith.remui(thread, self._constant(LANES))
        warp = arith.remui(arith.divui(thread, self._constant(LANES)), self._constant(4))
        self.first_row = arith.addi(arith.muli(warp, self._constant(16)), arith.divui(lane, self._constant(4)))
        self.first_column = arith.muli(arith.remui(lane, self._constant(4)), self._constant(2))

    def store(self, pairs: bool, row: ir.Value, column: ir.Value, rows_left: ir.Value, columns_left: ir.Value) -> None:
        """Stores what lies within both limits, two neighbours at once if `pairs`."""
        for index, pair in enumerate(self.values.registers.flat):
            offsets = [self.first_row, self.first_column]
            offsets[0] = arith.addi(offsets[0], self._constant(8 * (index % 2)))
            offsets[1] = arith.addi(offsets[1], self._constant(8 * (index // 2)))
            for i in range(1 if pairs else 2):
                place = [offsets[0], arith.addi(offsets[1], self._constant(i))]
                within = place[::-1] if self.transposed else place
                value = pair if pairs else self._element(pair, i)
                self._store_if(
                    [(within[0], rows_left), (within[1], columns_left)],
                    lambda within=within, value=value: self._store_at(within, row, column, value),
                )

    def _store_if(self, bounds: list[tuple[ir.Value, ir.Value]], store: Callable[[], None]) -> None:
        first, second = (arith.cmpi(arith.CmpIPredicate.slt, offset, limit) for offset, limit in bounds)
        with mgpu.when(arith.andi(first, second)):
            store()

    def _store_at(self, within: list[ir.Value], row: ir.Value, column: ir.Value, value: ir.Value) -> None:
        wide = [arith.extsi(self.i64, arith.addi(a, b)) for a, b in zip(within, (row, column), strict=True)]
        pitch = arith.constant(self.i64, ir.IntegerAttr.get(self.i64, self.pitch))
        offset = arith.addi(arith.muli(wide[0], pitch), wide[1])
        element_type = self.values.mlir_dtype
        llvm.store(value, mgpu.utils.getelementptr(self.base, [offset], element_type))

    def _element(self, pair: ir.Value, index: int) -> ir.Value:
        position = ir.DenseI64ArrayAttr.get([index])
        return vector.extract(pair, dynamic_position=[], static_position=position)

    def _constant(self, value: int) -> ir.Value:
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, value))
