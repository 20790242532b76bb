"""Summing a tile whose k tiles were shared out among the blocks of a cluster, through their shared memories.

Each block writes its float32 partial sums; then each adds up, in the order of the blocks, one slice of the columns.
The order is fixed, so the result is the same in every run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxgemm.gemm_config import partial_pitch
from jaxgemm.kernels.schedule import SPLIT_AXIS
from jaxgemm.kernels.wave import ACCUMULATOR_LAYOUT, WAVE_ROWS, load
from jaxgemm.layout import cdiv

MIN_SLICE = 8
"""Fewest columns of a wgmma accumulator."""


def slice_columns(tile_columns: int, split_k: int) -> int:
    """Columns of the tile that each block of the cluster adds up."""
    return max(MIN_SLICE, cdiv(tile_columns, split_k * MIN_SLICE) * MIN_SLICE)


def slice_start(tile_columns: int, split_k: int, rank: jax.Array) -> jax.Array:
    """First column of the tile that a block adds up: the last slices overlap where they do not divide the tile."""
    width = slice_columns(tile_columns, split_k)
    return lax.min(rank * width, jnp.int32(tile_columns - width))


def partial_buffer(num_warpgroups: int, tile_columns: int) -> Any:
    """The shared-memory type of a block's partial sums; rows are spread over the banks."""
    return plgpu.SMEM((num_warpgroups, WAVE_ROWS, partial_pitch(tile_columns)), jnp.float32)


def exchange_barrier(num_warpgroups: int) -> Any:
    """The type of a barrier at which all compute warpgroups of the cluster meet."""
    return plgpu.ClusterBarrier(collective_axes=(SPLIT_AXIS,), num_arrivals=num_warpgroups)


def sum_slice(sums: jax.Array, partial_smem: Any, ready_barrier: Any, split_k: int, rank: jax.Array) -> jax.Array:
    """Publishes this block's partial sums of a wave and returns the total of its slice, from `slice_start` on.

    Args:
        sums: float32 `[64, tile_columns]`, this block's part.
        partial_smem: this warpgroup's part of the buffer.
        ready_barrier: arrived at and waited on by the compute warpgroups of the cluster.
        split_k: blocks of the cluster.
        rank: this block's number among them.

    Returns:
        float32 `[64, slice]`; where slices overlap, each block's total is the same.
    """
    columns = sums.shape[1]
    partial_smem[:, :columns] = sums
    plgpu.commit_smem()
    plgpu.barrier_arrive(ready_barrier)
    plgpu.barrier_wait(ready_barrier)
    width = slice_columns(columns, split_k)
    window = partial_smem.at[:, pl.ds(slice_start(columns, split_k, rank), width)]
    parts = [
        load(plgpu.cluster_ref(window, {SPLIT_AXIS: jnp.int32(peer)}), layout=ACCUMULATOR_LAYOUT, optimized=False)
        for peer in range(split_k)
    ]
    return functools.reduce(jnp.add, parts)
