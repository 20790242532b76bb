"""The text: the sources of the running Python's standard library, as bytes."""

import functools
import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 256
VALIDATION_SHARE = 10
"""One file in this many is validation text."""


@dataclass(frozen=True)
class Text:
    """One split: uint8 `[length]`, files joined end to end."""

    data: np.ndarray
    num_files: int

    def order0_entropy(self) -> float:
        """Entropy in nats a byte of a model that knows only how often each byte occurs."""
        counts = np.bincount(self.data, minlength=VOCABULARY)
        probabilities = counts[counts > 0] / self.data.size
        return float(-np.sum(probabilities * np.log(probabilities)))


@functools.cache
def load_standard_library() -> tuple[Text, Text]:
    """Reads the standard library's sources, split by file into train and validation text.

    A file's side depends on its path alone, so that it is the same on every machine with this Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or "dist-packages" in name:
            continue
        is_validation = zlib.crc32(name.encode()) % VALIDATION_SHARE == 0
        parts[is_validation].append(np.frombuffer(path.read_bytes(), np.uint8))
    train, validation = (Text(np.concatenate(split), len(split)) for split in parts)
    return train, validation


def random_windows(data: jax.Array, key: jax.Array, batch: int, seq: int) -> jax.Array:
    """Cuts `batch` windows of `seq + 1` bytes out of the text at random places: uint8 `[batch, seq + 1]`."""
    return _cut(data, jax.random.randint(key, (batch,), 0, data.size - seq), seq)


def even_windows(data: jax.Array, count: int, seq: int) -> jax.Array:
    """Cuts `count` windows of `seq + 1` bytes at even distances: uint8 `[count, seq + 1]`."""
    return _cut(data, jnp.linspace(0, data.size - seq - 1, count).astype(jnp.int32), seq)


def _cut(data: jax.Array, starts: jax.Array, seq: int) -> jax.Array:
    return jax.vmap(lambda start: jax.lax.dynamic_slice(data, (start,), (seq + 1,)))(starts)
