"""One wave of the main loop: the tensor core's product of 64 rows over one k tile, as float32 registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, vector

from jaxgemm.kernels import ptx

WAVE_ROWS = 64
"""Rows of one wgmma of one warpgroup (PTX ISA, `wgmma.mma_async`)."""

TILE_K = 128
"""The k tile: one scaling block, 128 bytes of FP8, one row of a 128-byte swizzle."""

INSTRUCTION_K = 32
"""Depth of one FP8 wgmma (PTX ISA, `wgmma.mma_async`)."""

OPERAND_TRANSFORMS = (plgpu.SwizzleTransform(TILE_K),)
"""How an FP8 operand lies in shared memory: rows of 128 bytes, swizzled in eights.

NOTE: one 8x128 tile above the other is the same bytes, and what Pallas' own wgmma asks for; but the copy of a tiled
operand must start at a multiple of 8 rows, and a group of rows starts anywhere.
"""

ACCUMULATOR_LAYOUT = plgpu.Layout.WGMMA

load: Any = plgpu.load
"""Loads a reference in a given layout; untyped, for its signature differs between versions of jax."""

FIRST_TURN_BARRIER = 8
"""Named barriers 8 to 10 pass the turn between warpgroups; Mosaic itself uses 0 to 4."""

TURN_AFTER = 3
"""Of the four instructions of a wave, those that must be done before the next warpgroup starts."""

FP8_NAMES = {jnp.dtype(jnp.float8_e4m3fn): "e4m3", jnp.dtype(jnp.float8_e5m2): "e5m2"}


def multiply_wave(
    rows_smem,
    columns_smem,
    slot,
    row,
    recycled: jax.Array,
    num_warpgroups: int,
    meanwhile: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns `rows @ columns.T` of one k tile, in registers of the warpgroup that calls.

    NOTE: Pallas' `wgmma` can only add to an accumulator, so each product would need fresh zeroed registers; two in
    flight then spill. This one starts with the accumulator disabled (scale-d = 0) and writes over the registers of
    `recycled`, so that every wave of a warpgroup uses the same ones.

    NOTE: warpgroups may take turns: each starts when the one before has little left to do, so that one promotes while
    another multiplies. Which tiles gain by it was measured (`jaxgemm.gemm_config.takes_turns`).

    Args:
        rows_smem: FP8 reference `[stages, tile, 128]` in shared memory.
        columns_smem: FP8 reference `[stages, tile, 128]` in shared memory, its tile a multiple of 8 up to 256.
        slot: the stage.
        row: the wave's first row in the rows tile, a multiple of 8.
        recycled: float32 `[64, columns tile]`, a product no longer needed.
        num_warpgroups: compute warpgroups that take turns, each of which calls this equally often; 1: they do not.
        meanwhile: what the warpgroup computes while the tensor core works; no loops and no branches.

    Returns:
        float32 `[64, columns tile]`, and what `meanwhile` returned.
    """
    wave = _Wave(columns_smem, num_warpgroups, works_meanwhile=meanwhile is not None)
    product = wave.issue(rows_smem, columns_smem, slot, row, recycled)
    result = None if meanwhile is None else meanwhile()
    return wave.wait(product), result


def multiply_two_waves(
    rows_smem, columns_smem, slots: tuple, row, recycled: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Starts the products of two k tiles, and returns the first when it is done; the tensor core goes on meanwhile.

    Args:
        rows_smem: as for `multiply_wave`.
        columns_smem: as for `multiply_wave`.
        slots: both stages.
        row: the wave's first row in the rows tile.
        recycled: two products no longer needed.

    Returns:
        The first product, and what returns the second one.
    """
    wave = _Wave(columns_smem)
    operands = zip(slots, recycled, strict=True)
    first, second = [wave.issue(rows_smem, columns_smem, slot, row, old) for slot, old in operands]
    return wave.wait(first, pending=1), lambda: wave.wait(second)


def sync_warpgroup() -> None:
    """Lets the threads of a warpgroup see what each of them wrote to shared memory; the TMA need not see it."""
    plgpu.inline_mgpu()(lambda ctx: mgpu.warpgroup_barrier())()


def open_turns(num_warpgroups: int) -> None:
    """Gives the first turn to the first warpgroup: called once by the last compute warpgroup."""
    if num_warpgroups > 1:
        plgpu.inline_mgpu()(lambda ctx: _named_barrier("arrive", _turn(1, num_warpgroups)))()


def close_turns(num_warpgroups: int) -> None:
    """Takes the turn that nobody needs any more: called once by the first compute warpgroup."""
    if num_warpgroups > 1:
        plgpu.inline_mgpu()(lambda ctx: _named_barrier("sync", _turn(0, num_warpgroups)))()


class _Wave:
    """The two halves of `multiply_wave`, for a columns operand of this shape.

    Attributes:
        num_warpgroups: as for `multiply_wave`.
        works_meanwhile: whether the warpgroup reads shared memory between the two.
    """

    def __init__(self, columns_smem, num_warpgroups: int = 1, works_meanwhile: bool = False):
        self.num_warpgroups = num_warpgroups
        self.works_meanwhile = works_meanwhile
        self.shape = (WAVE_ROWS, columns_smem.shape[1])
        self.result = plgpu.ShapeDtypeStruct(self.shape, jnp.float32, layout=ACCUMULATOR_LAYOUT)

    def issue(self, rows_smem, columns_smem, slot, row, recycled: jax.Array) -> jax.Array:
        """Starts a product; nothing may touch what it returns until `wait` has returned it."""
        names = FP8_NAMES[jnp.dtype(rows_smem.dtype)], FP8_NAMES[jnp.dtype(columns_smem.dtype)]
        operand, scalar = plgpu.RefType(OPERAND_TRANSFORMS), plgpu.Layout.WG_SPLAT(())

        @plgpu.inline_mgpu(arg_types=(operand, operand, scalar, scalar, ACCUMULATOR_LAYOUT), return_type=self.result)
        def issue(ctx, rows, columns, slot, row, recycled):
            del ctx
            slot, row = (scalar.registers.flat[0] for scalar in (slot, row))
            descriptors = descriptors_of_wave(rows, columns, slot, row)
            registers = fence_registers(scalars(recycled))
            nvvm.wgmma_fence_aligned()
            turn = _turn(0, self.num_warpgroups) if self.num_warpgroups > 1 else None
            registers = issue_products(registers, *descriptors, self.shape[1], names, turn)
            if self.works_meanwhile:
                sync_warp()
            return from_scalars(registers, recycled)

        return issue(rows_smem, columns_smem, jnp.int32(slot), jnp.int32(row), recycled)

    def wait(self, product: jax.Array, pending: int = 0) -> jax.Array:
        """Waits for a product, while so many later ones may still be under way."""

        @plgpu.inline_mgpu(arg_types=(ACCUMULATOR_LAYOUT,), return_type=self.result)
        def wait(ctx, product):
            del ctx
            if self.num_warpgroups > 1:
                nvvm.wgmma_wait_group_sync_aligned(1)
                _named_barrier("arrive", _turn(1, self.num_warpgroups))
            nvvm.wgmma_wait_group_sync_aligned(pending)
            return from_scalars(fence_registers(scalars(product)), product)

        return wait(product)


def multiply_wave_portable(
    rows_smem,
    columns_smem,
    slot,
    row,
    recycled: jax.Array,
    num_warpgroups: int,
    meanwhile: Callable[[], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`multiply_wave` in plain Pallas, for the interpreter, which cannot run inlined Mosaic code."""
    del recycled, num_warpgroups
    shape = (WAVE_ROWS, columns_smem.shape[1])

    def product(accumulator):
        plgpu.wgmma(accumulator, rows_smem.at[slot, pl.ds(row, WAVE_ROWS)], columns_smem.at[slot].T)
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC(shape)), None if meanwhile is None else meanwhile()


def multiply_two_waves_portable(
    rows_smem, columns_smem, slots: tuple, row, recycled: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """`multiply_two_waves` in plain Pallas, for the interpreter."""
    operands = zip(slots, recycled, strict=True)
    first, second = [multiply_wave_portable(rows_smem, columns_smem, slot, row, old, 1)[0] for slot, old in operands]
    return first, lambda: second


def issue_products(
    registers, rows_descriptor, columns_descriptor, tile: int, names: tuple[str, str], turn: ir.Value | None
):
    """Issues the wgmmas of one k tile, in two groups, and returns the registers that they will write.

    NOTE: the turn is awaited after the first instruction, not before. That one may not start before the promotion has
    read these registers, and the assembler keeps the two in order; a wait in front it would move before the promotion.
    """
    i32, i64, f32 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64), ir.F32Type.get()
    count = len(registers)
    outputs = ", ".join(f"${i}" for i in range(count))
    rows_operand, columns_operand, accumulate = (f"${2 * count + i}" for i in range(3))
    text = (
        f"{{ .reg .pred p; setp.ne.b32 p, {accumulate}, 0; "
        f"wgmma.mma_async.sync.aligned.m{WAVE_ROWS}n{tile}k{INSTRUCTION_K}.f32.{names[0]}.{names[1]} "
        f"{{{outputs}}}, {rows_operand}, {columns_operand}, p, 1, 1; }}"
    )
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)] + ["l", "l", "n"])
    result_type = llvm.StructType.get_literal([f32] * count)

    for step in range(TILE_K // INSTRUCTION_K):
        offset = llvm.ConstantOp(i64, ir.IntegerAttr.get(i64, step * INSTRUCTION_K >> 4)).result
        if step == 1 and turn is not None:
            _named_barrier("sync", turn)
        operands = [arith.addi(descriptor, offset) for descriptor in (rows_descriptor, columns_descriptor)]
        keep = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, int(step > 0))).result
        result: Any = llvm.inline_asm(
            result_type, [*registers, *operands, keep], text, constraints, asm_dialect=0, has_side_effects=True
        )
        registers = [llvm.extractvalue(f32, result, [i]) for i in range(count)]
        if step + 1 == TILE_K // INSTRUCTION_K or (turn is not None and step + 1 == TURN_AFTER):
            nvvm.wgmma_commit_group_sync_aligned()
    return registers


def _turn(offset: int, num_warpgroups: int) -> ir.Value:
    """The named barrier of the compute warpgroup that is `offset` after this one, going round."""
    i32 = ir.IntegerType.get_signless(32)
    following = arith.addi(mgpu.warpgroup_idx(sync=True), mgpu.c(offset, i32))
    return arith.addi(arith.remui(following, mgpu.c(num_warpgroups, i32)), mgpu.c(FIRST_TURN_BARRIER, i32))


def _named_barrier(action: str, barrier: ir.Value) -> None:
    """Waits for ("sync") or announces ("arrive") a turn: one warpgroup of each (PTX ISA, `bar`)."""
    text = f"bar.{action} $0, {2 * 128};"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [barrier], text, "r", asm_dialect=0, has_side_effects=True)


def sync_warp() -> None:
    """Lets all lanes of a warp come here; the assembler moves no reading of shared memory across."""
    ptx.asm("bar.warp.sync 0xffffffff;", [])


def fence_registers(registers):
    """Keeps the compiler from moving reads or writes of these registers across this point."""
    f32 = ir.F32Type.get()
    count = len(registers)
    constraints = ",".join(["=f"] * count + [str(i) for i in range(count)])
    result: Any = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count), registers, "", constraints, asm_dialect=0, has_side_effects=True
    )
    return [llvm.extractvalue(f32, result, [i]) for i in range(count)]


def descriptors_of_wave(rows: ir.Value, columns: ir.Value, slot: ir.Value, row: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Where wgmma finds the operands of a wave, `[stages, tile, 128]` both: in this stage, from this row on."""
    rows_tile, columns_tile = (ir.MemRefType(operand.type).shape[1] for operand in (rows, columns))
    first_row = arith.addi(arith.muli(slot, mgpu.c(rows_tile, slot.type)), row)
    return _descriptor(rows, first_row), _descriptor(columns, arith.muli(slot, mgpu.c(columns_tile, slot.type)))


def _descriptor(operand: ir.Value, first_row: ir.Value) -> ir.Value:
    """The matrix descriptor of a K-major operand swizzled by 128 bytes (PTX ISA, "Matrix Descriptor Format").

    NOTE: the row is added last, in the descriptor's units of 16 bytes: all but that is the same for every k tile, and
    stays in registers.
    """
    i64 = ir.IntegerType.get_signless(64)
    pointer = mgpu.utils.memref_ptr(operand)
    address = llvm.ptrtoint(i64, pointer)
    encoded = arith.shrui(arith.andi(address, mgpu.c(0x3FFFF, i64)), mgpu.c(4, i64))
    stride_between_tiles = 8 * TILE_K >> 4
    swizzle_128_bytes = 1 << 30  # of the upper word
    upper = arith.shli(mgpu.c(swizzle_128_bytes | stride_between_tiles, i64), mgpu.c(32, i64))
    offset = arith.extui(i64, arith.muli(first_row, mgpu.c(TILE_K >> 4, first_row.type)))
    return arith.addi(arith.ori(encoded, upper), offset)


def scalars(array: mgpu.FragmentedArray) -> list[ir.Value]:
    """The float32 registers of an accumulator, one value each, in the order wgmma numbers them."""
    return [
        vector.extract(pair, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for pair in array.registers.flat
        for i in range(2)
    ]


def from_scalars(values: list[ir.Value], like: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """The inverse of `scalars`."""
    registers = like.registers.copy()
    pair_type = ir.VectorType.get((2,), ir.F32Type.get())
    for i in range(registers.size):
        registers.flat[i] = vector.from_elements(pair_type, values[2 * i : 2 * i + 2])
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)
