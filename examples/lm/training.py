"""The training loop: one compiled step, orbax checkpoints, and what was seen on the way.

A run is a function of its settings: batch number i is drawn from a key made of the seed and i, so that a run
that was killed goes on from its last checkpoint as if nothing had happened.
"""

import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from lm.model import cross_entropy
from lm.placement import gather, replicate, split_batch, state_shardings
from lm.text import Text, even_windows, random_windows

EVALUATION_BATCHES = 32
SYNC_EVERY = 10
"""Steps handed to the device before the host waits for their losses."""


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on. Two runs with equal settings on one machine are equal to the last bit."""

    steps: int
    batch: int
    seq: int
    d_model: int
    layers: int
    heads: int
    d_ff: int
    lr: float
    seed: int
    dtype: str
    attention: Literal["xla", "cudnn"]
    checkpoint_every: int
    evaluate_every: int


class State(NamedTuple):
    """What a step turns into the next: float32 parameters and the optimizer's moments."""

    params: Any
    optimizer: Any


@dataclass
class History:
    """What a run saw: a training loss for every step, `(step, loss)` pairs of validation, times, and the metrics that
    layers sowed in the last validation, means over it."""

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A finished run: its history and what it cost."""

    name: str
    history: History
    num_parameters: int
    parameters_sha256: str
    compile_seconds: float
    step_bytes: int
    device_peak_bytes: int | None


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW under a linear warm-up and a cosine decay to a tenth, with the gradient's norm clipped at 1."""
    warmup = min(max(settings.steps // 10, 1), 500)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.lr, warmup, max(settings.steps, warmup + 1), settings.lr / 10
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def train(
    name: str,
    settings: Settings,
    model: nn.Module,
    texts: tuple[Text, Text],
    directory: Path,
    mesh: Mesh,
) -> Run:
    """Trains one model from its last checkpoint, or from the seed if there is none, to the last step.

    Args:
        name: Shown beside the progress bar.
        settings: Sizes and seed.
        model: Logits of the next byte, uint8 `[batch, seq]` to float32 `[batch, seq, 256]`.
        texts: Train and validation text.
        directory: Where the checkpoints are, of these settings.
        mesh: The devices. A run may go on with another mesh than it began with, to the same losses up to rounding.

    Returns:
        The history from the first step on, also of the part before a kill.
    """
    optimizer = make_optimizer(settings)
    train_data, validation_data = (replicate(mesh, text.data) for text in texts)
    state = _initial_state(model, optimizer, settings, mesh)

    started = time.perf_counter()
    step_function = _compile_step(model, optimizer, settings, mesh, state, train_data)
    compile_seconds = time.perf_counter() - started

    @jax.jit
    def evaluate(params: Any, data: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        windows = even_windows(data, EVALUATION_BATCHES * settings.batch, settings.seq)
        batches = windows.reshape(EVALUATION_BATCHES, settings.batch, settings.seq + 1)
        loss, sown = jax.lax.map(lambda batch: cross_entropy(model, params, split_batch(mesh, batch)), batches)
        return loss.mean(), jax.tree.map(lambda x: x.mean(axis=0), sown.get("metrics", {}))

    with _checkpoint_manager(directory) as manager:
        state, history = _restore(manager, state)
        validate = functools.partial(evaluate, data=validation_data)
        state = _run_steps(name, settings, step_function, validate, train_data, state, history, manager)

    memory_stats = jax.local_devices()[0].memory_stats() or {}
    return Run(
        name=name,
        history=history,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        parameters_sha256=_digest(mesh, state.params),
        compile_seconds=compile_seconds,
        step_bytes=_program_bytes(step_function),
        device_peak_bytes=memory_stats.get("peak_bytes_in_use"),
    )


def _initial_state(model: nn.Module, optimizer: optax.GradientTransformation, settings: Settings, mesh: Mesh) -> State:
    """Makes each device's part of the state where it belongs; the numbers do not depend on the mesh."""

    def initial_state() -> State:
        tokens = jnp.zeros((1, settings.seq), jnp.uint8)
        params = model.init(jax.random.key(settings.seed), tokens)["params"]
        return State(params, optimizer.init(params))

    shardings = state_shardings(mesh, jax.eval_shape(initial_state))
    return jax.jit(initial_state, out_shardings=shardings)()


def _compile_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    mesh: Mesh,
    state: State,
    data: jax.Array,
) -> Any:
    """Compiles `(state, data, step) -> (state, loss)` ahead of the steps, so that no step's time has it."""

    def step_function(state: State, data: jax.Array, step: jax.Array) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.key(settings.seed + 1), step)
        windows = split_batch(mesh, random_windows(data, key, settings.batch, settings.seq))

        def objective(params: Any) -> tuple[jax.Array, jax.Array]:
            loss, sown = cross_entropy(model, params, windows)
            return sum(jax.tree.leaves(sown.get("losses", {})), start=loss), loss

        gradient, loss = jax.grad(objective, has_aux=True)(state.params)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), optimizer_state), loss

    shardings = state_shardings(mesh, state), NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(step_function, donate_argnums=0, out_shardings=shardings)
    return compiled.lower(state, data, np.int32(0)).compile()


def _run_steps(
    name: str,
    settings: Settings,
    step_function: Callable[..., tuple[State, jax.Array]],
    evaluate: Callable[[Any], tuple[jax.Array, dict[str, Any]]],
    data: jax.Array,
    state: State,
    history: History,
    manager: ocp.CheckpointManager,
) -> State:
    """Takes the steps that `history` lacks, and adds to it."""
    first = len(history.train)
    progress = tqdm(
        total=settings.steps, initial=first, desc=f"{name:>5}", unit="step", mininterval=1.0,
        disable=jax.process_index() > 0,
    )  # fmt: skip
    pending: list[jax.Array] = []
    started = time.perf_counter()
    for step in range(first, settings.steps):
        state, loss = step_function(state, data, np.int32(step))
        pending.append(loss)
        done = step + 1
        last = done == settings.steps
        is_evaluation = done % settings.evaluate_every == 0 or last
        is_checkpoint = settings.checkpoint_every > 0 and (done % settings.checkpoint_every == 0 or last)
        if not (is_evaluation or is_checkpoint or len(pending) == SYNC_EVERY):
            continue

        # Wait for the losses of the steps since the last wait: until then the device never idled.
        history.train += [float(value) for value in jax.device_get(pending)]
        _refuse_what_is_not_finite(name, history.train)
        history.step_seconds.append((time.perf_counter() - started) / len(pending))
        progress.update(len(pending))
        progress.set_postfix(loss=f"{history.train[-1]:.3f}", refresh=False)
        pending.clear()
        if is_evaluation:
            validation_loss, metrics = evaluate(state.params)
            history.validation.append((done, float(validation_loss)))
            history.metrics = jax.tree.map(lambda x: np.asarray(x).tolist(), metrics)
        if is_checkpoint:
            _save(manager, done, state, history)
        started = time.perf_counter()
    progress.close()
    return state


def _refuse_what_is_not_finite(name: str, losses: list[float]) -> None:
    """Stops a run that is lost before its last good checkpoint is replaced."""
    if not np.isfinite(losses[-SYNC_EVERY:]).all():
        step = next(step for step, loss in enumerate(losses, 1) if not np.isfinite(loss))
        raise FloatingPointError(f"{name}: the loss of step {step} is {losses[step - 1]}, where it must be finite")


def _checkpoint_manager(directory: Path) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _save(manager: ocp.CheckpointManager, step: int, state: State, history: History) -> None:
    """Writes state and history as one checkpoint; a kill halfway leaves the one before it."""
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(asdict(history)))
    manager.save(step, args=items)


def _restore(manager: ocp.CheckpointManager, state: State) -> tuple[State, History]:
    """Reads the last checkpoint into the shapes and placement of `state`; without one, `state` itself."""
    step = manager.latest_step()
    if step is None:
        return state, History()
    items = ocp.args.Composite(state=ocp.args.StandardRestore(state), history=ocp.args.JsonRestore())
    restored = manager.restore(step, args=items)
    seen = restored["history"]
    validation = [(int(step), float(loss)) for step, loss in seen["validation"]]
    return restored["state"], History(list(seen["train"]), validation, list(seen["step_seconds"]), seen["metrics"])


def _program_bytes(compiled: Any) -> int:
    """Memory that one step needs while it runs, by the compiler's account: state, text and temporaries."""
    sizes = compiled.memory_analysis()
    kept = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return int(kept + sizes.temp_size_in_bytes)


def _digest(mesh: Mesh, params: Any) -> str:
    """A fingerprint of all parameters: equal for runs that are equal to the last bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(gather(mesh, leaf).tobytes())
    return digest.hexdigest()
