"""README and docs/: every Python block runs, and what shell blocks name is there."""

import argparse
import contextlib
import importlib
import io
import pathlib
import re
import shlex
import sys
import tomllib
import types

import jax
import pytest

import jaxgemm
from jaxgemm.bench.__main__ import make_parser

for module in ("flax", "optax", "orbax.checkpoint", "matplotlib", "tqdm", "safetensors"):
    pytest.importorskip(module)

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_GPU = "<!-- needs a GPU -->"
BLOCK = re.compile(rf"^(?P<marker>{NEEDS_GPU}\n\n?)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
PROMISED = ("flax.md", "moe.md", "sharding.md", "checkpoints.md", "numerics.md", "kernel-notes.md", "reference.md")


def blocks(page, *languages):
    """`(line, code, needs a GPU)` of the blocks of a page."""
    text = page.read_text()
    return [
        (text[: match.start("code")].count("\n"), match["code"], bool(match["marker"]))
        for match in BLOCK.finditer(text)
        if match["language"] in languages
    ]


def commands():
    """`(page, words)` of every command in a shell block, without comments and assignments."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for _, code, _ in blocks(page, "sh", "bash", "shell", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words.pop(0)
                if words:
                    yield page.name, words


@pytest.fixture
def as_a_user():
    """Dtype promotion as it is by default, and settings that a page changes put back."""
    name = "jax_remove_custom_partitioning_ptr_from_cache_key"
    before = getattr(jax.config, name)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update(name, before)


def test_pages_and_blocks_are_found():
    """If nothing were found, nothing would be tested."""
    assert {page.name for page in PAGES} >= {"README.md", *PROMISED}
    assert len(blocks(ROOT / "README.md", "python")) >= 3
    assert all(blocks(ROOT / "docs" / name, "python") for name in PROMISED[:5])
    assert len(list(commands())) > 10
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(), re.M)
        every = list(BLOCK.finditer(page.read_text()))
        assert len(fences) == 2 * len(every), f"{page.name}: a fence that is indented, or not closed"
        assert not blocks(page, ""), f"{page.name}: say of each block what language it is, text if none"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python", "py")], ids=lambda page: page.name)
def test_python_blocks_run(page, as_a_user, capsys, monkeypatch):
    if page.name == "sharding.md" and jax.device_count() < 8:
        pytest.skip("needs eight devices")
    module = types.ModuleType("page")  # classes look for the module that they are in
    monkeypatch.setitem(sys.modules, "page", module)
    for line, code, needs_gpu in blocks(page, "python", "py"):
        compiled = compile("\n" * line + code, str(page), "exec")
        if not needs_gpu or jax.default_backend() == "gpu":
            exec(compiled, vars(module))


@pytest.mark.parametrize("page, words", list(commands()), ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_shell_commands_name_what_exists(page, words):
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(targets) <= set(known)
        case ["pip", "install", *wanted]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for name in wanted:
                assert set(re.findall(r"[\w-]+", name.partition("[")[2])) <= set(extras)
        case ["python", "-m", "jaxgemm.bench", *arguments]:
            make_parser().parse_args(arguments)
        case ["python", path, *arguments]:
            script = ROOT / path
            assert script.is_file()
            if script.parent == ROOT / "examples":
                check_flags(script.stem, arguments)
        case _:
            pytest.fail(f"{page} has a command of a kind that this test cannot check: {words}")


def check_flags(name, arguments):
    """Fails unless the example's parser knows the flags, and takes these values for them."""
    if not arguments:
        return
    seen = []

    def stop(parser, *args, **kwargs):
        seen.append(ORIGINAL(parser, arguments))
        raise SystemExit

    ORIGINAL = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        with pytest.raises(SystemExit):
            importlib.import_module(name).main(arguments)
    assert seen, errors.getvalue()


def test_a_block_that_needs_a_gpu_is_known_by_its_marker(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"a\n\n{NEEDS_GPU}\n```python\nfirst\n```\n\n```python\nsecond\n```\n\n```sh\nthird\n```\n")
    assert blocks(page, "python") == [(4, "first\n", True), (8, "second\n", False)]


def test_checks_of_commands_see_what_is_missing():
    for words in (
        ["make", "coffee"],
        ["pip", "install", ".[nothing]"],
        ["python", "examples/nothing.py"],
        ["python", "examples/train_lm.py", "--nothing"],
        ["python", "examples/train_lm.py", "--steps", "many"],
        ["cargo", "build"],
    ):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            test_shell_commands_name_what_exists("page", words)
    with pytest.raises(SystemExit):
        test_shell_commands_name_what_exists("page", ["python", "-m", "jaxgemm.bench", "gemm", "--nothing"])


def test_the_site_has_every_page_and_the_reference_every_name():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f": {page.name}\n" in navigation
    documented = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "reference.md").read_text(), re.M)
    assert {f"jaxgemm.{name}" for name in jaxgemm.__all__} <= set(documented)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_figure_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "dataflow", raising=False)
    dataflow = importlib.import_module("dataflow")
    assert (ROOT / "docs" / "dataflow.svg").read_text() == dataflow.draw()
