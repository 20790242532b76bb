"""`bench train`: whole training steps of a language model, its linear layers in FP8 beside the same in bfloat16."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxgemm.bench.block import BlockCase, Dot, Mlp, fp8_products, rms_norm, transformer_block
from jaxgemm.bench.hlo import plain_products
from jaxgemm.bench.measure import Call, program_mib
from jaxgemm.bench.rows import OWN, Row, Setup, normal, stored_bytes

PEERS = ("xla-bf16",)
Params = dict[str, Any]
"""Float32: `embedding` [vocabulary, width], `head` [width, vocabulary], `blocks`, a dict of weights for each."""


@dataclasses.dataclass(frozen=True)
class TrainCase(BlockCase):
    """A decoder of transformer blocks, by default two of the size of Llama 3 8B's, 8192 tokens a step.

    Attributes:
        layers: blocks.
        vocabulary: kinds of tokens.
    """

    layers: int = 2
    vocabulary: int = 32768

    @property
    def name(self) -> str:
        """What tables and files call the case."""
        return (
            f"step: {self.layers} blocks, width {self.width}, hidden {self.hidden}, {self.batch}x{self.length} tokens"
        )

    @property
    def block(self) -> BlockCase:
        """One of its blocks."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(BlockCase)}
        return BlockCase(**sizes)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Of the blocks' linear layers and of the head, forward and backward; not of attention's own products."""
        return self.layers * self.block.flops + 6.0 * self.tokens * self.width * self.vocabulary


class TrainingCall(Call):
    """Takes a training step, each from the state that the one before left; the state is updated in place."""

    def __init__(self, function: Callable[..., Any], state: Any, tokens: jax.Array):
        super().__init__(function, [tokens])
        self.state = state

    def __call__(self) -> jax.Array:
        """Takes a step and returns its loss."""
        self.state, loss = self.function(self.state, *self.argument_sets[0])
        return loss

    def first(self) -> jax.Array:
        """Takes a step, waits for it and returns its loss."""
        return jax.block_until_ready(self())


def run_case(case: TrainCase, setup: Setup) -> list[Row]:
    """Measures steps of Adam, weights quantised in each; tokens a second are by the host's clock."""
    tokens = jax.random.randint(jax.random.key(0), (case.batch, case.length + 1), 0, case.vocabulary)
    calls = {OWN: training_call(case, tokens, *fp8_products(case.block, setup.implementation))}
    if "xla-bf16" in setup.peers:
        calls["xla-bf16"] = training_call(case, tokens, bf16_dot)
    losses = {name: float(call.first()) for name, call in calls.items()}
    row = Row(case.name, dict(group="step", cold=False, **dataclasses.asdict(case)), case.flops, 0.0)
    row.bytes = float(stored_bytes(calls[OWN].state))
    row.measured(setup, calls)
    for name, call in calls.items():
        prefix = "" if name == OWN else f"{name} "
        if name in row.times:
            row.checks[f"{prefix}tokens/s"] = round(1e6 * case.tokens / row.times[name].wall_us)
        row.checks[f"{prefix}MiB"] = program_mib(call)
    if "xla-bf16" in losses:
        row.checks["first loss, from bf16"] = losses[OWN] / losses["xla-bf16"] - 1
    plain = plain_products(calls[OWN].function.as_text(), mlp_sizes(case))  # type: ignore[attr-defined]
    row.checks["MLP products that are not FP8"] = len(plain)
    return [row]


def training_call(case: TrainCase, tokens: jax.Array, dot: Dot, mlp: Mlp | None = None) -> TrainingCall:
    """Compiles a step whose blocks multiply with `dot` and `mlp`, and makes its first state."""
    params = init_params(case)
    state = params, jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params), jnp.int32(0)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention does not pass under "strict"
        step = jax.jit(_step(case, dot, mlp), donate_argnums=0).lower(state, tokens).compile()
    return TrainingCall(step, state, tokens)


def init_params(case: TrainCase) -> Params:
    """Draws float32 parameters, the same in every run."""
    shapes = case.block.weight_shapes
    blocks = [
        {
            name: normal(100 * layer + i, *shape, dtype=jnp.float32) * shape[0] ** -0.5
            for i, (name, shape) in enumerate(shapes.items())
        }
        for layer in range(1, case.layers + 1)
    ]
    embedding = normal(1, case.vocabulary, case.width, dtype=jnp.float32)
    head = normal(2, case.width, case.vocabulary, dtype=jnp.float32) * case.width**-0.5
    return {"embedding": embedding, "head": head, "blocks": blocks}


def _step(case: TrainCase, dot: Dot, mlp: Mlp | None) -> Callable[..., Any]:
    """`(state, tokens) -> (state, loss)`: loss and gradients, then Adam (arXiv 1412.6980) on float32 parameters."""
    rate, decays, epsilon = 1e-4, (0.9, 0.95), 1e-8

    def step(state: Any, tokens: jax.Array) -> tuple[Any, jax.Array]:
        params, mean, square, count = state
        loss, gradient = jax.value_and_grad(lambda params: _loss(case, dot, mlp, params, tokens))(params)
        count = count + 1
        mean = jax.tree.map(lambda m, g: decays[0] * m + (1 - decays[0]) * g, mean, gradient)
        square = jax.tree.map(lambda s, g: decays[1] * s + (1 - decays[1]) * g * g, square, gradient)
        mean_scale, square_scale = (1 / (1 - decay ** count.astype(jnp.float32)) for decay in decays)
        params = jax.tree.map(
            lambda p, m, s: p - rate * m * mean_scale / (jnp.sqrt(s * square_scale) + epsilon), params, mean, square
        )
        return (params, mean, square, count), loss

    return step


def _loss(case: TrainCase, dot: Dot, mlp: Mlp | None, params: Params, tokens: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of each token given those before; embedding and head in bfloat16."""
    x = params["embedding"].astype(jnp.bfloat16)[tokens[:, :-1]]
    for weights in params["blocks"]:
        x = transformer_block(case.block, dot, x, weights, mlp)
    logits = bf16_dot(rms_norm(x), params["head"]).astype(jnp.float32)
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -likelihood.mean()


def bf16_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies by a float32 weight in bfloat16."""
    return x @ w.astype(jnp.bfloat16)


def mlp_sizes(case: TrainCase) -> set[int]:
    """Returns the sizes of axes that only the MLP's products have, as far as this case tells them apart."""
    others = {case.tokens, case.width, case.vocabulary, case.length, case.heads, case.block.head_width}
    others |= {case.block.weight_shapes["qkv"][1]}
    return {case.hidden, 2 * case.hidden} - others
