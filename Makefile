# From a fresh checkout: `make demo`, `make test`, `make lint`. Each first makes .venv, which needs only Python >= 3.10.

PYTHON ?= python3
VENV ?= .venv
# Installed before everything else, so that this build is kept: any other, say for another CUDA, is one variable away.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-thorough lint models-table clean

demo: $(STAMP)
	$(BIN)/vte-compile demo

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not thorough"

test-thorough: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing
	mkdir -p build/typing/vte_compile
	ln -s $(CURDIR)/vte_compile/* $(CURDIR)/passes $(CURDIR)/kernels $(CURDIR)/export build/typing/vte_compile/
	$(BIN)/mypy

# The tables of docs/models.md, from the tests that fill them.
models-table: $(STAMP)
	$(BIN)/python -m pytest -m shows -q --models-table=docs/models.md

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(STAMP): setup.py pyproject.toml vte_compile/version.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[dev,demo,onnx]'
	touch $@
