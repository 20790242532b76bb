import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtype_promotion():
    """No test may pass by an accidental promotion: mixed dtypes must be cast on purpose."""
    with jax.numpy_dtype_promotion("strict"):
        yield
