"""FP8 in ten lines: a product with a fused bias and activation, and its gradients."""

import jax
import jax.numpy as jnp

import jaxgemm

x = jax.random.normal(jax.random.key(0), (7, 300), jnp.bfloat16)
w = jax.random.normal(jax.random.key(1), (300, 50), jnp.bfloat16)
bias = jnp.ones(50)

y = jaxgemm.fp8_dot(x, w, bias, activation="relu")  # any shape, under jit, vmap, grad
exact = jax.nn.relu(x.astype(jnp.float32) @ w.astype(jnp.float32) + bias)
print(y.shape, y.dtype, f"relative error {jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact):.3f}")

dx, dw = jax.grad(lambda x, w: jaxgemm.fp8_dot(x, w, bias).sum(), argnums=(0, 1))(x, w)
print(dx.shape, dx.dtype, dw.shape, dw.dtype)
