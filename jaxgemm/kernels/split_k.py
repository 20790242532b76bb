"""Summing a tile whose k tiles were shared out among the blocks of a cluster, through their shared memories.

Each block adds up one slice of the columns, in the order of the blocks: the result is the same in every run. A thread
sends what it holds of a slice to the thread of the same number in the block that adds it up. That one holds the same
elements of its own part, so nothing is laid out anew; and what arrives counts itself at a barrier there, so nobody
waits for an answer.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxgemm.gemm_config import MIN_SLICE, split_columns
from jaxgemm.kernels import ptx
from jaxgemm.kernels.schedule import SPLIT_AXIS
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, from_scalars, scalars

THREADS = 128
"""Of a warpgroup."""

SENT_NUMBERS = 4
"""Numbers that a thread sends at once: what it holds of eight columns (PTX ISA, fragment of wgmma's accumulator)."""

SENT_BYTES = 4 * SENT_NUMBERS


class Exchange(NamedTuple):
    """Shared memory and barriers of the exchange.

    Attributes:
        parts: what a warpgroup receives, `[sender, columns / 8, thread, 4]`; all warpgroups' in one buffer.
        full: a barrier for each warpgroup, at which it awaits its parts.
        empty: all compute warpgroups of the cluster arrive when they have a place for the parts of a tile, and wait
            before they send any.
    """

    parts: Any
    full: Any
    empty: Any

    def of_warpgroup(self, warpgroup: Any) -> "Exchange":
        """What one warpgroup needs of it."""
        return Exchange(self.parts.at[warpgroup], self.full.at[warpgroup], self.empty)


def exchange_types(num_warpgroups: int, tile_columns: int, split_k: int) -> Exchange:
    """The types of an exchange's buffers and barriers."""
    slabs = split_columns(tile_columns, split_k) // MIN_SLICE
    return Exchange(
        plgpu.SMEM((num_warpgroups, split_k, slabs, THREADS, SENT_NUMBERS), jnp.float32),
        plgpu.SMEM((num_warpgroups, ptx.BARRIER_WORDS), jnp.int32),
        plgpu.ClusterBarrier(collective_axes=(SPLIT_AXIS,), num_arrivals=num_warpgroups),
    )


def slice_starts(tile_columns: int, split_k: int) -> list[int]:
    """First columns of the slices, of the blocks that have one; the last overlap where they do not divide the tile."""
    width = split_columns(tile_columns, split_k)
    return [min(start, tile_columns - width) for start in range(0, min(tile_columns, split_k * width), width)]


def slice_start(tile_columns: int, split_k: int, rank: jax.Array) -> jax.Array:
    """First column of the slice of this block, if it has one."""
    width = split_columns(tile_columns, split_k)
    return lax.min(rank * width, jnp.int32(tile_columns - width))


def open_exchange(exchange: Exchange) -> None:
    """Makes this warpgroup's barrier, and lets the others know that they may send: called once."""

    @plgpu.inline_mgpu(arg_types=(ptx.BUFFER,))
    def make_barrier(ctx, full):
        del ctx
        is_one = mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)
        ptx.asm(ptx.if_set("mbarrier.init.shared::cta.b64 [$1], 1;"), [ptx.flag(is_one), ptx.address(full)])
        ptx.asm("fence.mbarrier_init.release.cluster;", [])
        mgpu.warpgroup_barrier()

    make_barrier(exchange.full)
    plgpu.barrier_arrive(exchange.empty)


def sum_slice(sums: jax.Array, exchange: Exchange, split_k: int, rank: jax.Array, tiles_before: jax.Array) -> jax.Array:
    """Sends this block's sums of a wave to the others, and returns the total of its slice, from `slice_start` on.

    Args:
        sums: float32 `[64, tile_columns]`, this block's part.
        exchange: of this warpgroup.
        split_k: blocks of the cluster.
        rank: this block's number among them.
        tiles_before: how many tiles were summed so before this one.

    Returns:
        float32 `[64, slice]`; where slices overlap, each block's total is the same. Nothing that counts, in a block
        that has no slice.
    """
    columns = sums.shape[1]
    width, starts = split_columns(columns, split_k), slice_starts(columns, split_k)
    slabs = range(width // MIN_SLICE)
    bytes_of_slab = THREADS * SENT_BYTES
    bytes_of_sender = len(slabs) * bytes_of_slab

    @plgpu.inline_mgpu(arg_types=(ptx.BUFFER, ptx.BUFFER, ACCUMULATOR_LAYOUT, ptx.SCALAR))
    def send(ctx, parts, full, sums, rank):
        del ctx
        registers = scalars(sums)
        place = arith.addi(_place_of_thread(parts), arith.muli(rank.registers.flat[0], ptx.constant(bytes_of_sender)))
        for receiver, start in enumerate(starts):
            there, barrier = [ptx.in_block(x, ptx.constant(receiver)) for x in (place, ptx.address(full))]
            for slab in slabs:
                first = (start // MIN_SLICE + slab) * SENT_NUMBERS
                target = arith.addi(there, ptx.constant(slab * bytes_of_slab))
                _send(target, barrier, registers[first : first + SENT_NUMBERS])

    @plgpu.inline_mgpu(arg_types=(ptx.BUFFER, ptx.SCALAR))
    def await_parts(ctx, full, parity):
        del ctx
        is_one = mgpu.utils.single_thread_predicate(scope=mgpu.utils.ThreadSubset.WARPGROUP)
        expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;"
        ptx.asm(ptx.if_set(expect), [ptx.flag(is_one), ptx.address(full), ptx.constant(split_k * bytes_of_sender)])
        ptx.wait_for_phase(ptx.address(full), parity.registers.flat[0], "cluster")

    @plgpu.inline_mgpu(
        arg_types=(ptx.BUFFER, ACCUMULATOR_LAYOUT),
        return_type=plgpu.ShapeDtypeStruct((WAVE_ROWS, width), jnp.float32, layout=ACCUMULATOR_LAYOUT),
    )
    def add_up(ctx, parts, sums):
        del ctx
        total: list[ir.Value] = []
        for sender in range(split_k):
            place = arith.addi(_place_of_thread(parts), ptx.constant(sender * bytes_of_sender))
            of_sender = [x for slab in slabs for x in _received(arith.addi(place, ptx.constant(slab * bytes_of_slab)))]
            total = [arith.addf(*pair) for pair in zip(total, of_sender, strict=True)] if total else of_sender
        return from_scalars(total, sums[:, :width])

    plgpu.barrier_wait(exchange.empty)
    send(exchange.parts, exchange.full, sums, rank)
    pl.when(rank < len(starts))(lambda: await_parts(exchange.full, lax.rem(tiles_before, 2)))
    return add_up(exchange.parts, sums)


def _place_of_thread(parts: ir.Value) -> ir.Value:
    """Where a thread's numbers lie in what the first block sent of the first columns."""
    thread = arith.andi(mgpu.utils.thread_idx(), ptx.constant(THREADS - 1))
    return arith.addi(ptx.address(parts), arith.muli(thread, ptx.constant(SENT_BYTES)))


def _send(target: ir.Value, barrier: ir.Value, numbers: list[ir.Value]) -> None:
    """Writes four numbers to shared memory of the cluster, which count themselves at a barrier beside them."""
    text = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [$0], {$2, $3, $4, $5}, [$1];"
    ptx.asm(text, [target, barrier, *numbers])


def _received(place: ir.Value) -> list[ir.Value]:
    """Reads four numbers."""
    f32 = ir.F32Type.get()
    struct = llvm.StructType.get_literal([f32] * SENT_NUMBERS)
    text, constraints = "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r,~{memory}"
    loaded: Any = llvm.inline_asm(struct, [place], text, constraints, asm_dialect=0, has_side_effects=True)
    return [llvm.extractvalue(f32, loaded, [i]) for i in range(SENT_NUMBERS)]
