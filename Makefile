# Both targets do all of their set-up: a virtual environment, the install, the real base.
# PYTHON names the interpreter to start from (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
BASE := build/base/model.safetensors

.PHONY: demo test base check lint types layers slow quantised benchmarks clean

demo: $(BASE)
	$(BIN)/python examples/demo.py

test: $(BASE)
	$(BIN)/python -m pytest -m "not slow and not gpu"

base: $(BASE)

check: lint types layers slow quantised

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

layers: .venv/installed
	$(BIN)/lint-imports

slow: $(BASE)
	$(BIN)/python -m pytest -m "slow or gpu"

# Beside the environment and not in it: with torchao installed, every import of transformers
# takes a second more.
quantised: build/quantised/installed
	PYTHONPATH=build/quantised $(BIN)/python -m pytest tests/unit/runtime/test_quantised.py

build/quantised/installed: constraints.txt | .venv/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade \
		--target build/quantised torchao bitsandbytes
	@touch $@

benchmarks: $(BASE)
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/merge_memory.py
	$(BIN)/python benchmarks/validate.py
	$(BIN)/python benchmarks/attach.py
	$(BIN)/python benchmarks/runtime.py
	$(BIN)/python benchmarks/merge_in_place.py

$(BASE): examples/get_base.py | .venv/installed
	$(BIN)/python examples/get_base.py build/base
	@touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv build
