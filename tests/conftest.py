import importlib.metadata
import os
import tempfile

# Eight devices, for the tests of sharding; on a GPU, XLA's own products need not be fast: choosing among them takes
# seconds for each shape. Most of the rest is compiling for a CPU: in one piece, and by XLA 0.10's older emitters of
# loops, which compute the same, that takes half as long; newer XLA has them no more, and refuses flags that it does not
# know. Read when JAX first looks for devices.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else ""),
)
# Threads of XLA's CPU pool. The interpreter of GPU kernels blocks one for every warpgroup that waits at a barrier,
# and hangs on a machine of two cores, where there would be two.
os.environ.setdefault("NPROC", "16")
# No test may depend on tiles that somebody tuned on this machine.
os.environ["JAXGEMM_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"jaxgemm-tests-{os.getpid()}")

import jax
import pytest
from support import available_implementations

# Most of the time goes into compiling small programs for the CPU; what XLA's optimizer would change is not the subject
# here, and where it is (fast-math flags), a test starts a process of its own without this. Other processes inherit it.
if jax.default_backend() == "cpu":
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """No test may pass by an accidental promotion: mixed dtypes must be cast on purpose."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_generate_tests(metafunc):
    """One suite for all: a test that takes `implementation` runs with each that this machine has."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", available_implementations())
