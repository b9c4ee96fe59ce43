# Everything runs in .venv, which is made when it is missing or older than the requirements.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
WORKERS ?= 2

.PHONY: help setup lock demo test matrix fuzz lint bench gpu-check clean

help:
	@echo "make setup   install everything into .venv"
	@echo "make lock    requirements.lock anew: every package that the tests need, with hashes"
	@echo "make demo    handwritten digits: two vision towers, a training run, a table and a picture"
	@echo "make test    all tests"
	@echo "make matrix  the core of the tests under Python 3.10 to 3.13, with the oldest and newest packages"
	@echo "make fuzz    hostile and broken input for MINUTES (10), from SEED (0)"
	@echo "make lint    ruff and mypy"
	@echo "make bench   speed and memory on small sizes (python -m benchmarks --help)"
	@echo "make gpu-check  a GPU's results beside the CPU's, then its speed and memory (PYTHON=... without .venv)"

setup: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@

# In an environment of its own: nothing else needs what resolves.
lock:
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install -q --disable-pip-version-check uv==0.13.9
	UV_CUSTOM_COMPILE_COMMAND="make lock" .lock/bin/uv pip compile requirements-dev.txt --upgrade \
		--python-version 3.11 --generate-hashes --no-annotate --no-emit-package blip3o-dit --quiet \
		--output-file requirements.lock

demo: .venv/installed
	$(BIN)/python -m examples.digits.demo

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# Environments of several Pythons under .matrix/. MATRIX="--pythons 3.11" and more: python -m tests.matrix --help
matrix: .venv/installed
	$(BIN)/python -m tests.matrix $(MATRIX)

# On a machine with a GPU and torch, transformers and accelerate of its own; nothing is installed.
gpu-check:
	PYTHONPATH=src:. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks gpu-check $(GPU_CHECK)

MINUTES ?= 10
SEED ?= 0
fuzz: .venv/installed
	PYTHONPATH=src OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed
	$(BIN)/python -m benchmarks short

clean:
	rm -rf .venv .lock .matrix outputs build fuzz-input .mypy_cache .ruff_cache .pytest_cache .hypothesis
