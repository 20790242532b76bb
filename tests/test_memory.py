"""docs/memory.md: its tables are what the program keeps, and its example runs."""

import importlib.util
import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "memory.md").read_text()


def residuals():
    spec = importlib.util.spec_from_file_location("residuals", ROOT / "tools" / "residuals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_what_is_kept():
    """But for plain bfloat16, where what JAX keeps changes from version to version."""
    with jax.numpy_dtype_promotion("standard"):
        lines = [line for line in residuals().table().splitlines() if not line.startswith("| bfloat16 |")]
    missing = [line for line in lines if line not in PAGE.splitlines()]
    assert len(lines) > 20 and not missing


def test_fp8_keeps_less_than_layer_by_layer_and_less_than_bfloat16():
    tool = residuals()
    _, gated, _ = tool.cases().values()
    x, *weights = (jax.ShapeDtypeStruct(shape, jax.numpy.bfloat16) for shape in (gated[0], *gated[1]))
    functions = gated[2]
    with jax.numpy_dtype_promotion("standard"):
        kept = {name: sum(tool.kept_mib(function, x, tuple(weights))) for name, function in functions.items()}
    assert kept["`fp8_mlp`"] < 0.5 * min(kept["bfloat16"], kept["`fp8_dot` three times"])
    assert kept["`fp8_mlp`, without `jaxgemm_rhs`"] < kept["bfloat16, `dots_saveable`"]


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    scope = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(code, scope)
    assert scope["gradient"].shape == (256, 128)
