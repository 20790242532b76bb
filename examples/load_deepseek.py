"""FP8 weights of a published checkpoint, as they are: from safetensors to `ScaledArray`, without a detour to bfloat16.

DeepSeek-V3 and models like it keep a linear layer as `NAME.weight`, float8_e4m3fn `[n, k]`, and
`NAME.weight_scale_inv`, a float32 for each block of 128x128 to multiply it with. That is what `ScaledArray.from_parts`
takes; scales in bfloat16, as Qwen3 has them, are widened to it. The experts of a layer are stacked, `[g, n, k]`, which
is what grouped products take.

    python examples/load_deepseek.py              # writes a small checkpoint of that format, and reads it
    python examples/load_deepseek.py --from DIR   # lists what a downloaded one has; all of it is read
"""

import argparse
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax
from flags import positive_int

import jaxgemm
from jaxgemm import ScaledArray

DTYPES = {
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "BF16": jnp.bfloat16,
    "F16": jnp.float16,
    "F32": jnp.float32,
}
SCALES = "_scale_inv"
Weight = jax.Array | ScaledArray


def read_tensors(path: Path) -> dict[str, jax.Array]:
    """Reads all tensors of a safetensors file; scales in bfloat16 or float16 are widened to float32, which is exact.

    The library's own readers for NumPy and Flax know no FP8 (safetensors 0.8), so this takes the bytes that it hands
    out and says what they are.

    Raises:
        ValueError: if the file is of another format, or a tensor of another dtype than `DTYPES` has.
    """
    try:
        found = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error
    tensors = {}
    for name, tensor in found:
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"{name} in {path} must be one of {', '.join(DTYPES)}, got {tensor['dtype']}")
        values = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]])
        if name.endswith(SCALES) and tensor["dtype"] in ("BF16", "F16"):
            values = values.astype(np.float32)
        tensors[name] = jnp.asarray(values.reshape(tensor["shape"]))
    return tensors


def read_block_shape(directory: Path) -> tuple[int, int]:
    """Reads the shape of the scaling blocks from a checkpoint's `config.json`.

    Raises:
        ValueError: if there is none, or it says that the weights are quantised in another way.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} must be a folder with config.json and *.safetensors, got no {path}")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    match config.get("quantization_config"):
        case {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [int(rows), int(columns)]}:
            return rows, columns
        case other:
            wanted = "quant_method fp8, weight_block_size [rows, columns] and fmt e4m3"
            raise ValueError(f"quantization_config of {path} must have {wanted}, got {other}")


def load_weights(directory: Path) -> dict[str, Weight]:
    """Reads a checkpoint of several files; every tensor that comes with scales becomes a `ScaledArray`.

    Raises:
        ValueError: if a file is missing or cannot be read, or the weights are quantised in another way.
    """
    block_shape = read_block_shape(directory)
    tensors: dict[str, jax.Array] = {}
    files: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):  # a layer's scales may lie in another file than its values
        found = read_tensors(path)
        tensors |= found
        files |= dict.fromkeys(found, path)
    if not files:
        raise ValueError(f"{directory} must be a folder with config.json and *.safetensors, got no *.safetensors")

    weights: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        if name + SCALES in tensors:
            try:
                weights[name] = ScaledArray.from_parts(tensor, tensors[name + SCALES], block_shape)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} in {files[name]}: {error}") from error
        elif not name.endswith(SCALES):
            weights[name] = tensor
    return weights


def stack_experts(weights: Mapping[str, Weight], layer: str) -> dict[str, Any]:
    """Returns `gate_proj`, `up_proj` and `down_proj` of the experts of a layer, each stacked: `[g, n, k]`."""
    pattern = re.compile(re.escape(layer) + r"\.mlp\.experts\.(\d+)\.(\w+)\.weight")
    found: dict[str, dict[int, Weight]] = {}
    for name, weight in weights.items():
        if match := pattern.fullmatch(name):
            found.setdefault(match[2], {})[int(match[1])] = weight
    return {
        projection: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(experts[i] for i in sorted(experts)))
        for projection, experts in found.items()
    }


def mlp(weights: dict[str, Weight], layer: str, x: jax.Array) -> jax.Array:
    """The SwiGLU of a dense layer, `[tokens, d_model]` to the like: FP8 weights as they are, x quantised on the way."""
    gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return jaxgemm.fp8_dot(jaxgemm.fp8_dot(x, gate, activation="silu") * jaxgemm.fp8_dot(x, up), down)


def experts(stacked: dict[str, Weight], x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The same for rows `x` [rows, d_model] that are sorted by expert."""
    gate = jaxgemm.grouped_fp8_dot(x, stacked["gate_proj"], group_sizes, activation="silu")
    hidden = gate * jaxgemm.grouped_fp8_dot(x, stacked["up_proj"], group_sizes)
    return jaxgemm.grouped_fp8_dot(hidden, stacked["down_proj"], group_sizes)


def write_checkpoint(directory: Path, d_model: int, d_ff: int, num_experts: int) -> dict[str, jax.Array]:
    """Writes a dense layer and one of experts in DeepSeek's format; returns the bfloat16 weights that it rounded."""
    shapes = {"gate": (d_ff, d_model), "up": (d_ff, d_model), "down": (d_model, d_ff)}
    prefixes = ["model.layers.0.mlp", *(f"model.layers.1.mlp.experts.{i}" for i in range(num_experts))]
    names = {f"{prefix}.{name}_proj.weight": shapes[name] for prefix in prefixes for name in shapes}
    keys = jax.random.split(jax.random.key(0), len(names))
    original = {
        name: (jax.random.normal(key, shape) / shape[1] ** 0.5).astype(jnp.bfloat16)
        for key, (name, shape) in zip(keys, names.items(), strict=True)
    }
    files: list[dict[str, jax.Array]] = [{"model.norm.weight": jnp.ones(d_model, jnp.bfloat16)}, {}]
    for name, weight in original.items():
        q = jaxgemm.quantize(weight, (128, 128))
        files[".experts." in name] |= {name: q.values, name + SCALES: q.scales}

    directory.mkdir(parents=True, exist_ok=True)
    config = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}, indent=1) + "\n")
    for i, tensors in enumerate(files, start=1):
        path = directory / f"model-{i:05}-of-{len(files):05}.safetensors"
        safetensors.flax.save_file(tensors, path, metadata={"format": "pt"})
    return original


def compare(directory: Path, original: dict[str, jax.Array]) -> dict[str, float]:
    """Returns by how much, relative in norm, FP8 layers differ from bfloat16 ones with the weights before rounding."""
    weights = load_weights(directory)
    d_model = original["model.layers.0.mlp.up_proj.weight"].shape[1]
    stacked, exact = stack_experts(weights, "model.layers.1"), stack_experts(original, "model.layers.1")
    num_experts = len(exact["up_proj"])
    x = jax.random.normal(jax.random.key(1), (8 * num_experts, d_model)).astype(jnp.bfloat16)
    group_sizes = jnp.arange(num_experts) * 2 + 1  # and rows past their sum belong to no expert

    def bf16_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        return (jax.nn.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def bf16_experts(x: jax.Array) -> jax.Array:
        gate, up, down = (exact[f"{name}_proj"].swapaxes(1, 2) for name in ("gate", "up", "down"))
        hidden = jax.nn.silu(jax.lax.ragged_dot(x, gate, group_sizes)) * jax.lax.ragged_dot(x, up, group_sizes)
        return jax.lax.ragged_dot(hidden, down, group_sizes)

    dense = (original[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    pairs = {
        "dense layer": (jax.jit(mlp, static_argnums=1)(weights, "model.layers.0", x), bf16_mlp(x, *dense)),
        "experts": (jax.jit(experts)(stacked, x, group_sizes), bf16_experts(x)),
    }
    return {name: relative_error(actual, expected) for name, (actual, expected) in pairs.items()}


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Returns `|actual - expected| / |expected|`."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Writes, reads, compares; or lists what a checkpoint has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="directory", type=Path, metavar="DIR", help="a checkpoint to list")
    parser.add_argument("--d-model", type=positive_int, default=320)
    parser.add_argument("--d-ff", type=positive_int, default=640)
    parser.add_argument("--experts", type=positive_int, default=4)
    arguments = parser.parse_args(argv)
    if arguments.directory:
        try:
            weights = load_weights(arguments.directory)
        except (OSError, ValueError) as refusal:
            parser.error(f"--from: {refusal}")
        for name, weight in weights.items():
            print(f"{name}: {weight if isinstance(weight, ScaledArray) else f'{weight.dtype}{list(weight.shape)}'}")
        return {}
    with tempfile.TemporaryDirectory() as directory:
        original = write_checkpoint(Path(directory), arguments.d_model, arguments.d_ff, arguments.experts)
        errors = compare(Path(directory), original)
    for name, error in errors.items():
        print(f"{name}: FP8 differs from bfloat16 by {error:.3f}")
    return errors


if __name__ == "__main__":
    main()
