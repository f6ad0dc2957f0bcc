# Both targets do all of their set-up: a virtual environment, the install, the real base.
# PYTHON names the interpreter to start from (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
BASE := build/base/model.safetensors

.PHONY: demo test base check lint types layers slow benchmarks clean

demo: $(BASE)
	$(BIN)/python examples/demo.py

test: $(BASE)
	$(BIN)/python -m pytest -m "not slow and not gpu"

base: $(BASE)

check: lint types layers slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

layers: .venv/installed
	$(BIN)/lint-imports

slow: $(BASE)
	$(BIN)/python -m pytest -m "slow or gpu"

benchmarks: $(BASE)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/merge_memory.py
	$(BIN)/python benchmarks/validate.py

$(BASE): examples/get_base.py | .venv/installed
	$(BIN)/python examples/get_base.py build/base
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build
