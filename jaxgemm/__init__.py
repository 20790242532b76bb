"""FP8 matrix products for JAX with fine-grained scales."""

__version__ = "0.1.0"
