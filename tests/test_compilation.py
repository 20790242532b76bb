"""How programs with the public functions are exported, cached, and given memory."""

import collections
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import SQUARE, random

import jaxgemm
from jaxgemm import dispatch

M, N, K = 128, 256, 384
eight_devices = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def custom_calls(text):
    return set(re.findall(r"custom_call @(\w+)", text))


@pytest.mark.skipif(
    jax.__version_info__ < dispatch.OLDEST_JAX_OF_KERNELS, reason="there are no kernels before jax 0.11.1"
)
def test_export_for_cuda_from_any_machine():
    """JAX guarantees this call to stay as it is, so that no check needs to be disabled."""
    args = jnp.ones((M, K), jnp.bfloat16), jnp.ones((K, N), jnp.bfloat16), jnp.ones(N)
    gradients = jax.jit(jax.grad(lambda *args: jaxgemm.fp8_dot(*args).astype(jnp.float32).sum(), (0, 1, 2)))
    exported = jax.export.export(gradients, platforms=["cuda"])(*args)
    assert custom_calls(exported.mlir_module()) == {"mosaic_gpu_v2"}
    assert "dot_general" not in exported.mlir_module()
    restored = jax.export.deserialize(exported.serialize())
    assert restored.platforms == ("cuda",)
    assert [x.dtype for x in restored.out_avals] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]


@eight_devices
def test_export_for_several_devices():
    x, w = random(0, M, K), random(1, K, N)
    on = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(x, NamedSharding(on, P("a"))), jax.device_put(w, NamedSharding(on, P()))
    sharded = jax.shard_map(jaxgemm.fp8_dot, mesh=on, in_specs=(P("a"), P()), out_specs=P("a"))
    for function in (jaxgemm.fp8_dot, sharded):
        exported = jax.export.export(jax.jit(function))(*placed)
        assert not custom_calls(exported.mlir_module())
        restored = jax.export.deserialize(exported.serialize())
        np.testing.assert_array_equal(jax.jit(restored.call)(*placed), jaxgemm.fp8_dot(x, w))


CACHED = """
import collections, json, sys, jax, jax.numpy as jnp, jaxgemm
from jax.sharding import NamedSharding, PartitionSpec as P
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
results = []
for split in (None, NamedSharding(mesh, P("a"))):
    for activation in ("relu", "gelu"):
        x, w = jax.device_put(jnp.full((64, 128), -0.01), split), jnp.ones((128, 64))
        seen = collections.Counter()
        jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
        product = jax.jit(lambda x, w: jaxgemm.fp8_dot(x, w, activation=activation)).lower(x, w).compile()
        jax.monitoring.clear_event_listeners()
        results.append([seen["cache_hits"], seen["cache_misses"], float(product(x, w if split is None else jax.device_put(w, NamedSharding(mesh, P())))[0, 0])])
print(json.dumps(results))
"""


@eight_devices
def test_a_second_process_finds_programs_in_the_persistent_cache(tmp_path):
    """Also partitioned ones, where their address is left out of the key, and never the wrong one."""
    first, second = (
        json.loads(
            subprocess.run([sys.executable, "-c", CACHED, str(tmp_path)], check=True, capture_output=True).stdout
        )
        for _ in range(2)
    )
    assert [hits for hits, _, _ in first] == [0] * 4
    assert [(hits, misses) for hits, misses, _ in second] == [(1, 0)] * 4
    assert [value for *_, value in first] == [value for *_, value in second]
    assert first[0][2] == first[2][2] == 0 and first[1][2] == first[3][2] == pytest.approx(-0.128, rel=0.05)


def test_eval_shape_runs_nothing():
    x, w = jax.ShapeDtypeStruct((2, 7, 300), jnp.bfloat16), jax.ShapeDtypeStruct((300, 50), jnp.float32)
    out, vjp = jax.eval_shape(lambda x, w: jax.vjp(jaxgemm.fp8_dot, x, w), x, w)
    assert (out.shape, out.dtype) == ((2, 7, 50), jnp.bfloat16)
    sizes = collections.Counter(leaf.dtype.name for leaf in jax.tree.leaves(vjp) if leaf.ndim == 2)
    assert sizes["float8_e4m3fn"] == 2  # what is kept for the backward pass: x and w, one byte an element
    q = jax.eval_shape(lambda w: jaxgemm.quantize_transposed(w, SQUARE), w)
    assert isinstance(q, jaxgemm.ScaledArray) and q.shape == (50, 300) and q.scales.shape == (1, 3)
