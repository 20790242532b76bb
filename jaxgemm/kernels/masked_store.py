"""Storing without TMA, which needs rows of a multiple of 16 bytes; others are stored padded and then copied, or so:

What is staged is copied by the storing warp, a row or two at a time, while its warpgroup goes on with the next tile.
Tiles that are computed transposed are stored by the warpgroup itself, straight from registers, element by element.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxgemm.kernels import ptx
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, sync_warp

LANE_BYTES = 8
"""Most bytes that a lane copies at once: rows of a multiple of 16 are left to TMA."""

LOADS_IN_FLIGHT = {2: 8, 4: 8, 8: 4}
"""Loads from shared memory that a storing warp has in flight, by their bytes: eight, if as many registers hold them."""


class Limits(NamedTuple):
    """Where values go in the output, and how many of their rows and columns.

    Attributes:
        row: first row, counted over all leading axes (int32 scalar).
        column: first column.
        rows_left: rows to store at most; may be negative.
        columns_left: columns to store at most; may be negative.
    """

    row: Any
    column: Any
    rows_left: Any
    columns_left: Any


def store_transposed(values: jax.Array, out_gmem: Any, limits: Limits) -> None:
    """Stores `values` of a tile that is computed transposed, from registers.

    Each warp stores eight rows of sixteen bytes at once (PTX ISA, register fragment of the wgmma accumulator).

    Args:
        values: `[64, rows]` of the output's dtype, laid out as an accumulator; its rows are columns of the output.
        out_gmem: the output `[..., m, n]`, contiguous.
        limits: where they go, and how many.
    """
    pitch = out_gmem.shape[-1]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ACCUMULATOR_LAYOUT, *[ptx.SCALAR] * 4))
    def store(ctx, out, values, *limits):
        del ctx
        _Fragment(out, values, pitch).store(Limits(*(x.registers.flat[0] for x in limits)))

    store(out_gmem, values, *(jnp.int32(x) for x in limits))


def store_staged_rows(out_smem: Any, chunk: Any, out_gmem: Any, limits: Limits) -> None:
    """Stores one staged chunk, 64 rows, for the warp that does so; all its lanes must have waited for it.

    Args:
        out_smem: the whole staging buffer `[warpgroups, chunks, 64, chunk]`, its rows swizzled.
        chunk: number of the chunk, counted over both leading axes.
        out_gmem: the output `[..., m, n]`, contiguous.
        limits: where it goes, and how much of it.
    """
    itemsize, pitch = jnp.dtype(out_gmem.dtype).itemsize, out_gmem.shape[-1]
    *_, rows, columns = out_smem.shape
    width = max(math.gcd(pitch * itemsize, LANE_BYTES), itemsize)  # bytes of a lane
    units_of_row, swizzle = columns * itemsize // width, plgpu.SwizzleTransform(columns * itemsize)
    steps, unrolled = rows * units_of_row // ptx.LANES, LOADS_IN_FLIGHT[width]
    assert steps % unrolled == 0, (rows, columns, width)  # or the last ones would copy rows of the next wave

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType((swizzle,)), plgpu.RefType(), *[ptx.SCALAR] * 6))
    def copy(ctx, staged, out, chunk, step, *limits):
        del ctx
        copier = _Copier(staged, out, width, units_of_row, columns * itemsize, pitch * itemsize)
        places = Limits(*(x.registers.flat[0] for x in limits))
        copier.copy(chunk.registers.flat[0], step.registers.flat[0], places)

    def copy_some(index, carry):
        copy(out_smem, out_gmem, jnp.int32(chunk), index * unrolled, *(jnp.int32(x) for x in limits))
        return carry

    lax.fori_loop(0, steps // unrolled, copy_some, None)
    plgpu.inline_mgpu()(lambda ctx: sync_warp())()


def store_staged_rows_portable(out_smem: Any, chunk: Any, out_gmem: Any, limits: Limits) -> None:
    """`store_staged_rows` in plain Pallas, for the interpreter, which cannot run inlined Mosaic code: one by one."""
    num_chunks, rows, columns = out_smem.shape[1:]
    source = out_smem.at[lax.div(chunk, jnp.int32(num_chunks)), lax.rem(chunk, jnp.int32(num_chunks))]
    *groups, m, _ = out_gmem.shape

    @pl.loop(0, lax.clamp(0, limits.rows_left, rows))
    def copy_row(row):
        place = limits.row + row
        place = (lax.div(place, jnp.int32(m)), lax.rem(place, jnp.int32(m))) if groups else (place,)

        @pl.loop(0, lax.clamp(0, limits.columns_left, columns))
        def copy_element(column):
            out_gmem[*place, limits.column + column] = source[row, column]


class _Copier:
    """A lane's part of `store_staged_rows`; a unit is what a lane copies at once."""

    def __init__(self, staged: ir.Value, out: ir.Value, width: int, units_of_row: int, row_bytes: int, pitch: int):
        self.i32, self.i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        self.staged, self.out = mgpu.utils.memref_ptr(staged), llvm.ptrtoint(self.i64, mgpu.utils.memref_ptr(out))
        self.width, self.units_of_row, self.row_bytes, self.pitch = width, units_of_row, row_bytes, pitch
        self.itemsize = mgpu.utils.bitwidth(ir.MemRefType(out.type).element_type) // 8
        self.lane = ptx.lane()

    def copy(self, chunk: ir.Value, first_step: ir.Value, limits: Limits) -> None:
        """Copies what the warp does in some steps, of a multiple of their number on: first all loads, then all stores.

        NOTE: a lane's place is computed once; in later steps it lies fixed numbers of rows and units further on, which
        take no registers. The warp has 40.
        """
        units = self._constant(self.units_of_row)
        first = arith.muli(first_step, self._constant(ptx.LANES))
        row = arith.addi(arith.divui(first, units), arith.divui(self.lane, units))
        unit = arith.remui(self.lane, units)
        further = [divmod(step * ptx.LANES, self.units_of_row) for step in range(LOADS_IN_FLIGHT[self.width])]
        values = [
            self._load(chunk, arith.addi(row, self._constant(rows)), arith.addi(unit, self._constant(units)))
            for rows, units in further
        ]
        column = arith.muli(unit, self._constant(self.width // self.itemsize))
        address = self._address(arith.addi(row, limits.row), arith.addi(column, limits.column))
        rows_left, columns_left = arith.subi(limits.rows_left, row), arith.subi(limits.columns_left, column)
        for (rows, units), value in zip(further, values, strict=True):
            columns = units * self.width // self.itemsize
            within = arith.andi(self._is_less(rows, rows_left), self._is_less(columns, columns_left))
            offset = self._constant(rows * self.pitch + units * self.width, self.i64)
            self._store(arith.addi(address, offset), value, within)

    def _load(self, chunk: ir.Value, row: ir.Value, unit: ir.Value) -> ir.Value:
        """Reads a unit, wherever the swizzle has put it: 16 bytes, moved within the row by the row's number."""
        offset = arith.addi(
            arith.muli(row, self._constant(self.row_bytes)), arith.muli(unit, self._constant(self.width))
        )
        moved = arith.andi(arith.shrui(offset, self._constant(3)), self._constant(self.row_bytes - 16))
        offset = arith.addi(arith.xori(offset, moved), arith.muli(chunk, self._constant(self.row_bytes * WAVE_ROWS)))
        i8 = ir.IntegerType.get_signless(8)
        place = mgpu.utils.getelementptr(self.staged, [offset], i8)
        return llvm.load(ir.IntegerType.get_signless(8 * self.width), place)

    def _address(self, row: ir.Value, column: ir.Value) -> ir.Value:
        """Where an element of the output lies."""
        row, column = (arith.extsi(self.i64, place) for place in (row, column))
        row_start = arith.muli(row, self._constant(self.pitch, self.i64))
        offset = arith.addi(row_start, arith.muli(column, self._constant(self.itemsize, self.i64)))
        return arith.addi(self.out, offset)

    def _is_less(self, number: int, limit: ir.Value) -> ir.Value:
        return arith.cmpi(arith.CmpIPredicate.slt, self._constant(number), limit)

    def _store(self, address: ir.Value, value: ir.Value, within: ir.Value) -> None:
        ptx.asm(ptx.if_set(f"st.global.b{8 * self.width} [$1], $2;"), [ptx.flag(within), address, value])

    def _constant(self, value: int, kind: ir.Type | None = None) -> ir.Value:
        kind = kind or self.i32
        return arith.constant(kind, ir.IntegerAttr.get(kind, value))


class _Fragment:
    """The registers of one thread, and where in the output they go."""

    def __init__(self, out: ir.Value, values: mgpu.FragmentedArray, pitch: int):
        self.base, self.values, self.pitch = mgpu.utils.memref_ptr(out), values, pitch
        self.i32, self.i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        thread = mgpu.utils.thread_idx()
        lane = arith.remui(thread, self._constant(ptx.LANES))
        warp = arith.remui(arith.divui(thread, self._constant(ptx.LANES)), self._constant(4))
        self.first_column = arith.addi(arith.muli(warp, self._constant(16)), arith.divui(lane, self._constant(4)))
        self.first_row = arith.muli(arith.remui(lane, self._constant(4)), self._constant(2))

    def store(self, limits: Limits) -> None:
        """Stores what lies within both limits; the accumulator's rows are columns of the output."""
        for index, pair in enumerate(self.values.registers.flat):
            column = arith.addi(self.first_column, self._constant(8 * (index % 2)))
            for i in range(2):
                row = arith.addi(self.first_row, self._constant(8 * (index // 2) + i))
                within = (
                    arith.cmpi(arith.CmpIPredicate.slt, place, limit)
                    for place, limit in ((row, limits.rows_left), (column, limits.columns_left))
                )
                with mgpu.when(arith.andi(*within)):
                    self._store_at(arith.addi(row, limits.row), arith.addi(column, limits.column), pair, i)

    def _store_at(self, row: ir.Value, column: ir.Value, pair: ir.Value, index: int) -> None:
        row, column = (arith.extsi(self.i64, place) for place in (row, column))
        pitch = arith.constant(self.i64, ir.IntegerAttr.get(self.i64, self.pitch))
        offset = arith.addi(arith.muli(row, pitch), column)
        position = ir.DenseI64ArrayAttr.get([index])
        value = vector.extract(pair, dynamic_position=[], static_position=position)
        llvm.store(value, mgpu.utils.getelementptr(self.base, [offset], self.values.mlir_dtype))

    def _constant(self, value: int) -> ir.Value:
        return arith.constant(self.i32, ir.IntegerAttr.get(self.i32, value))
