# The two commands a newcomer needs are `make demo` and `make test`; each makes .venv when it is missing,
# and installs again only when pyproject.toml has changed.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format docs clean

## Train one small language model twice, in high precision and in FP8, and compare the losses (CPU).
demo: $(VENV)/.examples-installed
	JAX_PLATFORMS=cpu $(BIN)/python examples/train_lm.py --out runs/demo

## Run every test and doctest.
test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q --numprocesses 2 --dist worksteal

## Check style, format and types.
lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## Rewrite the sources in the project's format.
format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

## Build the documentation into site/; a broken link or an undocumented argument fails.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv312 runs site build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

$(VENV)/.made: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxgemm needs Python 3.11 or newer")'
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.examples-installed: $(VENV)/.made
	$(PIP) --editable '.[examples]'
	touch $@

$(VENV)/.dev-installed: $(VENV)/.made
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.examples-installed

$(VENV)/.docs-installed: $(VENV)/.made
	$(PIP) --editable '.[docs]'
	touch $@
