"""The rooms of the library: imports go down only, and importing it costs nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

import jaxgemm

PACKAGE = pathlib.Path(jaxgemm.__file__).parent
LEVELS = [
    {"jaxgemm.flax", "jaxgemm.bench"},
    {"jaxgemm.autotune"},
    {"jaxgemm.autotune_trial", "jaxgemm.autotune_neighbours"},
    {"jaxgemm.mlp"},
    {"jaxgemm.dot", "jaxgemm.mlp_vjp"},
    {"jaxgemm.dot_vjp"},
    {"jaxgemm.recipe", "jaxgemm.wgrad_bf16"},
    {"jaxgemm.gemm", "jaxgemm.quantize", "jaxgemm.explain"},
    {"jaxgemm.find"},
    {"jaxgemm.primitives"},
    {"jaxgemm.partition"},
    {"jaxgemm.dispatch", "jaxgemm.split_rule", "jaxgemm.row_blocks"},
    {"jaxgemm.kernels", "jaxgemm.tiles"},
    {"jaxgemm.tuning_cache"},
    {"jaxgemm.tuned_rows"},
    {"jaxgemm.reference", "jaxgemm.triton_tuning", "jaxgemm.tuning"},
    {"jaxgemm.tile_candidates"},
    {"jaxgemm.gemm_config"},
    {"jaxgemm.problem"},
    {"jaxgemm.scaled_array"},
    {
        "jaxgemm.layout",
        "jaxgemm.manual_axes",
        "jaxgemm.explicit_axes",
        "jaxgemm.numerics",
        "jaxgemm.elementwise",
        "jaxgemm.scopes",
    },
    {"jaxgemm.bench.measure", "jaxgemm.bench.progress"},  # know nothing of the library; autotune times with them too
]
PACKAGES = ("jaxgemm.flax", "jaxgemm.bench", "jaxgemm.kernels")


def room(module):
    """The package that a module belongs to, unless the module has a level of its own."""
    if any(module in names for names in LEVELS):
        return module
    return next((p for p in PACKAGES if module == p or module.startswith(p + ".")), module)


def modules():
    for path in PACKAGE.rglob("*.py"):
        yield (
            ".".join(("jaxgemm", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"),
            path,
        )


def runtime_imports(path):
    """Modules of this library that a file imports, but for those only a type checker sees."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    known = {name for name, _ in modules()}
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxgemm"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxgemm"))


def test_imports_go_down_only():
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    wrong = []
    for name, path in modules():
        if name == "jaxgemm":
            continue
        assert room(name) in level, f"{name} is in no room: add it to LEVELS"
        for target in runtime_imports(path):
            source, target = room(name), room(target)
            if target == "jaxgemm":  # the front door, which stands above the middle rooms
                if level[source] > 0:
                    wrong.append(f"{name} imports the whole package")
            elif source != target and level[target] <= level[source]:
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_importing_loads_no_kernel_language_and_takes_no_device():
    code = (
        "import jaxgemm, sys\n"
        "from jax._src import xla_bridge\n"
        "heavy = [m for m in ('triton', 'jax_triton', 'flax', 'jax.experimental.pallas', 'torch') if m in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_names_exist_and_are_documented():
    for name in jaxgemm.__all__:
        assert getattr(jaxgemm, name).__doc__, name


def test_flax_loads_when_it_is_first_named():
    code = "import jaxgemm, sys\njaxgemm.flax.linen.Dense, jaxgemm.flax.nnx.Linear\nassert 'flax' in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'flux'"):
        jaxgemm.flux  # noqa: B018
