"""Products of the scales of rows and columns, made by the tensor core: for operands that both have 1x128 scales.

Each element of a product is multiplied by the scales of its row and of its column. A thread has two rows of a wave, but
a quarter of its columns, so reading scales from shared memory and multiplying them takes as long as the promotion. The
products of scales are a matrix of rank one; a single wgmma of depth 8 brings it into registers, laid out as the product
that it belongs to. Its inputs are tf32, which keeps 11 bits, so each scale is given in parts whose sum it is:

    k          0     1     2     3     4     5     6     7
    rows       high  high  high  rest  low   low   low   0
    columns    high  low   rest  high  high  low   rest  high

which adds up to `row * column` but for 2^-22 of it. The parts of columns are made before the kernel, four numbers a
column (`split_scales`); k from 4 on reads the same four again. Those of rows are made in registers.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxgemm.kernels.wave import (
    ACCUMULATOR_LAYOUT,
    FP8_NAMES,
    OPERAND_TRANSFORMS,
    WAVE_ROWS,
    descriptors_of_wave,
    fence_registers,
    from_scalars,
    issue_products,
    multiply_wave_portable,
    scalars,
)

DROPPED_BITS = 13
"""Of the 23 bits of a float32's fraction, those that tf32 does not keep (PTX ISA, "Alternate floating point")."""

CORE_MATRIX_BYTES = 128
"""Eight columns of 16 bytes: what wgmma reads at once of an operand that is not swizzled (PTX ISA)."""


def split_scales(scales: jax.Array) -> jax.Array:
    """The parts of scales that the columns side of `multiply_wave_and_scales` takes.

    Args:
        scales: float32 of any shape.

    Returns:
        float32 `[..., 4]`: high, low, rest, high; the first three add up to the scale, and tf32 holds each.

    Example:
        >>> scale = jnp.float32(1 / 3)
        >>> high, low, rest, _ = split_scales(scale)
        >>> bool(high + (low + rest) == scale), bool(high == scale)
        (True, False)
    """

    def truncated(x):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFFFFFF << DROPPED_BITS & 0xFFFFFFFF)
        return lax.bitcast_convert_type(bits, jnp.float32)

    high = truncated(scales)
    low = truncated(scales - high)
    return jnp.stack([high, low, (scales - high) - low, high], axis=-1)


def multiply_wave_and_scales(
    rows_smem, columns_smem, slot, row, parts_smem, row_scales: jax.Array, recycled: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Returns `rows @ columns.T` of one k tile and what it is to be multiplied by, in registers of this warpgroup.

    Args:
        rows_smem: FP8 reference `[stages, tile, 128]` in shared memory.
        columns_smem: FP8 reference `[stages, tile, 128]` in shared memory, its tile a multiple of 8 up to 256.
        slot: the stage.
        row: the wave's first row in the rows tile, a multiple of 8.
        parts_smem: float32 reference `[stages, tile, 4]` in shared memory, not swizzled: see `split_scales`.
        row_scales: float32 `[64]`, those of the wave's rows.
        recycled: two float32 `[64, columns tile]` that are no longer needed, to be written over.

    Returns:
        float32 `[64, columns tile]`, the product, and `row_scales[:, None] * column_scales`.
    """
    shape = (WAVE_ROWS, columns_smem.shape[1])
    names = FP8_NAMES[jnp.dtype(rows_smem.dtype)], FP8_NAMES[jnp.dtype(columns_smem.dtype)]
    operand, scalar = plgpu.RefType(OPERAND_TRANSFORMS), plgpu.Layout.WG_SPLAT(())
    row_layout = ACCUMULATOR_LAYOUT.reduce(1)
    tile_type = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=ACCUMULATOR_LAYOUT)

    @plgpu.inline_mgpu(
        arg_types=(
            *(operand, operand, plgpu.RefType(()), scalar, scalar),
            *(row_layout, ACCUMULATOR_LAYOUT, ACCUMULATOR_LAYOUT),
        ),
        return_type=(tile_type, tile_type),
    )
    def issue(ctx, rows, columns, parts, slot, row, row_scales, product, factors):
        del ctx
        slot, row = (scalar.registers.flat[0] for scalar in (slot, row))
        descriptors = descriptors_of_wave(rows, columns, slot, row)
        first_column = arith.muli(slot, mgpu.c(shape[1], slot.type))
        fragment = _row_fragment(row_scales)
        product_registers, factor_registers = (fence_registers(scalars(array)) for array in (product, factors))
        nvvm.wgmma_fence_aligned()
        factor_registers = _issue_scales(factor_registers, fragment, _parts_descriptor(parts, first_column), shape[1])
        product_registers = issue_products(product_registers, *descriptors, shape[1], names, None)
        return from_scalars(product_registers, product), from_scalars(factor_registers, factors)

    @plgpu.inline_mgpu(arg_types=(ACCUMULATOR_LAYOUT, ACCUMULATOR_LAYOUT), return_type=(tile_type, tile_type))
    def wait(ctx, product, factors):
        del ctx
        nvvm.wgmma_wait_group_sync_aligned(0)
        registers = fence_registers(scalars(product) + scalars(factors))
        half = len(registers) // 2
        return from_scalars(registers[:half], product), from_scalars(registers[half:], factors)

    return wait(*issue(rows_smem, columns_smem, parts_smem, jnp.int32(slot), jnp.int32(row), row_scales, *recycled))


def multiply_wave_and_scales_portable(
    rows_smem, columns_smem, slot, row, parts_smem, row_scales: jax.Array, recycled: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """`multiply_wave_and_scales` in plain Pallas, for the interpreter, which cannot run inlined Mosaic code."""
    product, _ = multiply_wave_portable(rows_smem, columns_smem, slot, row, recycled[0], 1)
    high, low, rest, _ = parts_smem[slot].T
    return product, row_scales[:, None] * (high + (low + rest))[None, :]


def _row_fragment(row_scales: mgpu.FragmentedArray) -> list[ir.Value]:
    """The rows operand in registers: of each thread, its two rows at k = lane % 4, then the same at k + 4."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    kept = mgpu.c(-(1 << DROPPED_BITS), i32)

    def truncated(value):
        return arith.bitcast(f32, arith.andi(arith.bitcast(i32, value), kept))

    place = arith.andi(mgpu.utils.thread_idx(), mgpu.c(3, i32))
    is_last = arith.cmpi(arith.CmpIPredicate.eq, place, mgpu.c(3, i32))
    first_half, second_half = [], []
    for register in row_scales.registers.flat:
        scale = register
        if isinstance(register.type, ir.VectorType):
            scale = vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([0]))
        high = truncated(scale)
        low = arith.subf(scale, high)  # of which the tensor core truncates what `rest` has
        rest = arith.subf(low, truncated(low))
        first_half.append(arith.select(is_last, rest, high))
        second_half.append(arith.select(is_last, mgpu.c(0.0, f32), low))
    return [arith.bitcast(i32, value) for value in first_half + second_half]


def _issue_scales(registers: list[ir.Value], fragment: list[ir.Value], parts_descriptor: ir.Value, tile: int):
    """Issues the wgmma of the scales, and returns the registers that it will write; committed with the next ones."""
    f32, count = ir.F32Type.get(), len(registers)
    outputs = ", ".join(f"${i}" for i in range(count))
    rows_operand = ", ".join(f"${2 * count + i}" for i in range(len(fragment)))
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, 0, 0; "
        f"wgmma.mma_async.sync.aligned.m{WAVE_ROWS}n{tile}k8.f32.tf32.tf32 "
        f"{{{outputs}}}, {{{rows_operand}}}, ${2 * count + len(fragment)}, p, 1, 1; }}"
    )
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["r"] * len(fragment) + ["l"])
    operands = [*registers, *fragment, parts_descriptor]
    struct = llvm.StructType.get_literal([f32] * count)
    result: Any = llvm.inline_asm(struct, operands, text, constraints, asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(f32, result, [i]) for i in range(count)]


def _parts_descriptor(parts: ir.Value, first_column: ir.Value) -> ir.Value:
    """The matrix descriptor of the columns operand (PTX ISA, "Matrix Descriptor Format"): K-major, not swizzled.

    NOTE: its leading dimension's offset, from the first to the second half of k, is 0: both are the same numbers.
    """
    i64 = ir.IntegerType.get_signless(64)
    address = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(parts))
    encoded = arith.shrui(arith.andi(address, mgpu.c(0x3FFFF, i64)), mgpu.c(4, i64))
    stride = arith.shli(mgpu.c(CORE_MATRIX_BYTES >> 4, i64), mgpu.c(32, i64))
    return arith.addi(arith.ori(encoded, stride), arith.extui(i64, first_column))  # 16 bytes a column
