"""The barriers at which a stage of the pipeline is freed: every warp that reads it arrives, and the loading warp waits.

A warp knows when it has read a stage, and knows of no other warp: the product of a warpgroup is complete for all four
at once, but one of them may still wait for its scales, and the stage must not be written again before it has them.
Pallas has two other ways to arrive: every thread, 128 times, or one thread for the warpgroup, which gave wrong results
now and then where products are short.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from jaxgemm.kernels import ptx
from jaxgemm.kernels.schedule import SHARE_AXIS
from jaxgemm.kernels.wave import sync_warp

WARPS = 4
"""Of a warpgroup."""


class EmptyBarriers(Protocol):
    """One barrier a stage."""

    def make(self) -> None:
        """Makes them: called once by the loading warp, before its first load."""

    def wait(self, slot: jax.Array, use: jax.Array) -> None:
        """The loading warp waits until a stage has been read everywhere after its `use`-th filling, counted from 0."""

    def arrive(self, slot: jax.Array) -> None:
        """Says that the calling warpgroup's warps, each by itself, have read what they need of a stage."""


def barrier_types(num_warpgroups: int, stages: int, interpret: Any) -> Any:
    """What the barriers need of shared memory."""
    if interpret:
        axes = (SHARE_AXIS,)
        return plgpu.ClusterBarrier(collective_axes=axes, num_arrivals=num_warpgroups, num_barriers=stages)
    return plgpu.SMEM((stages, ptx.BARRIER_WORDS), jnp.int32)


def empty_barriers(smem: Any, num_warpgroups: int, num_blocks: int, interpret: Any) -> EmptyBarriers:
    """The barriers in shared memory of `barrier_types`, for stages that so many blocks load together."""
    return _Portable(smem) if interpret else _ByWarp(smem, num_warpgroups, num_blocks)


@dataclasses.dataclass(frozen=True)
class _ByWarp:
    """Attributes: barriers in shared memory; compute warpgroups of a block; blocks of a cluster, which read the same.

    NOTE: no thread but the loading warp's waits for the barriers to be made. Whoever arrives has waited for a stage to
    be full, and so for loads of every block that fills it, which each block starts after it has made its barriers.
    """

    words: Any
    num_warpgroups: int
    num_blocks: int

    def make(self) -> None:
        stages = self.words.shape[0]
        arrivals = WARPS * self.num_warpgroups * self.num_blocks

        @plgpu.inline_mgpu(arg_types=(ptx.BUFFER,))
        def make(ctx, words):
            del ctx
            is_first = ptx.flag(arith.cmpi(arith.CmpIPredicate.eq, ptx.lane(), ptx.constant(0)))
            for stage in range(stages):
                barrier = arith.addi(ptx.address(words), _offset(ptx.constant(stage)))
                ptx.asm(ptx.if_set(f"mbarrier.init.shared::cta.b64 [$1], {arrivals};"), [is_first, barrier])
            ptx.asm("fence.mbarrier_init.release.cluster;", [])
            sync_warp()

        make(self.words)

    def wait(self, slot: jax.Array, use: jax.Array) -> None:
        @plgpu.inline_mgpu(arg_types=(ptx.BUFFER, ptx.SCALAR, ptx.SCALAR))
        def wait(ctx, words, slot, parity):
            del ctx
            barrier = arith.addi(ptx.address(words), _offset(slot.registers.flat[0]))
            ptx.wait_for_phase(barrier, parity.registers.flat[0])

        wait(self.words, jnp.int32(slot), lax.rem(jnp.int32(use), 2))

    def arrive(self, slot: jax.Array) -> None:
        num_blocks = self.num_blocks

        @plgpu.inline_mgpu(arg_types=(ptx.BUFFER, ptx.SCALAR))
        def arrive(ctx, words, slot):
            del ctx
            lane = ptx.lane()
            tells = arith.cmpi(arith.CmpIPredicate.ult, lane, ptx.constant(num_blocks))
            first, space = ptx.address(words), "cta"
            if num_blocks > 1:
                first, space = ptx.in_block(first, arith.select(tells, lane, ptx.constant(0))), "cluster"
            barrier = arith.addi(first, _offset(slot.registers.flat[0]))
            ptx.asm(ptx.if_set(f"mbarrier.arrive.shared::{space}.b64 _, [$1];"), [ptx.flag(tells), barrier])

        arrive(self.words, jnp.int32(slot))


@dataclasses.dataclass(frozen=True)
class _Portable:
    """For the interpreter, which cannot run inlined Mosaic code: whole warpgroups arrive at Pallas' barriers."""

    barriers: Any

    def make(self) -> None:
        pass

    def wait(self, slot: jax.Array, use: jax.Array) -> None:
        del use
        plgpu.barrier_wait(self.barriers.at[slot])

    def arrive(self, slot: jax.Array) -> None:
        plgpu.barrier_arrive(self.barriers.at[slot])


def _offset(slot: Any) -> Any:
    """Bytes from the first barrier to a stage's."""
    return arith.muli(slot, ptx.constant(4 * ptx.BARRIER_WORDS))
