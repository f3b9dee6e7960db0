# Every target makes its own environment first, so each works alone on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: train test test-distributed setup check bench clean

train: setup  ## environment, then the main job on the embedded data
	$(BIN)/python examples/train_moe.py $(FLAGS)

test: setup check  ## environment, checks, then all tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FLAGS)

test-distributed: setup  ## all cases of the matrices over ranks, about twelve minutes
	$(BIN)/python -m pytest tests/distributed tests/parallel --full --kills 20 $(FLAGS)

setup: $(STAMP)  ## the environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup  ## measured benchmarks, about two minutes
	$(BIN)/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only --benchmark-quiet --benchmark-json=bench.json $(FLAGS)

clean:  ## remove the environment and what runs and tests left behind
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks bench.json
