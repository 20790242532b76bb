import os

# Eight devices, for the tests of sharding: read when JAX first looks for devices.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
# Threads of XLA's CPU pool. The interpreter of GPU kernels blocks one for every warpgroup that waits at a barrier,
# and hangs on a machine of two cores, where there would be two.
os.environ.setdefault("NPROC", "16")

import jax
import pytest
from support import available_implementations


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """No test may pass by an accidental promotion: mixed dtypes must be cast on purpose."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def pytest_generate_tests(metafunc):
    """One suite for all: a test that takes `implementation` runs with each that this machine has."""
    if "implementation" in metafunc.fixturenames:
        metafunc.parametrize("implementation", available_implementations())
