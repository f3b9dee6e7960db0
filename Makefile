# Every target makes its own environment first, so each works alone on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := $(VENV)/lowest/bin/python
NEWEST := $(VENV)/newest/bin/python
OTHER := $(VENV)/torch/bin/python
TORCH ?= 2.11.0
# Two files at a time. Threads that have nothing to do sleep: by default they look out for work, and keep a core from the
# other file's tests.
# What Python and pytest compile is kept, also where the environment says otherwise: many tests start processes.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FLAGS)
export PYTHONDONTWRITEBYTECODE :=
# What nearly every program imports is compiled in advance by all cores, where pip takes one; the rest when it is imported.
COMPILED := torch sympy mpmath numpy matplotlib PIL rich pygments tensordict torchdata triton
WITH ?= $(if $(filter 2.11.%,$(TORCH)),numpy<2.4)

.PHONY: train test test-distributed test-lowest test-newest test-torch setup lint check bench clean

train: setup  ## environment, then the main job on the embedded data
	$(BIN)/python examples/train_moe.py $(FLAGS)

# Types are checked by one core while tests wait for processes to start; what was found comes after the tests.
test: setup lint  ## environment, checks, and all tests, two files at a time: about ten minutes on two cores
	@$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; trap "kill $$types" INT TERM; \
	OMP_WAIT_POLICY=passive $(BIN)/python $(TESTS); tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/types.txt; exit $$((tests > types ? tests : types))

test-distributed: setup  ## all cases of the matrices over ranks, of compilation and of cards, about fifteen minutes
	$(BIN)/python -m pytest tests/distributed tests/parallel tests/test_compile.py tests/experts/test_tiles.py --full --kills 20 $(FLAGS)

# transformers asks for newer tokenizers and safetensors than moekit does; so theirs are put in once the rest is tested.
# What old releases call may have been deprecated since by what they call it in.
test-lowest:  ## all tests with the lowest versions that pyproject.toml allows, torch and Triton apart
	$(PYTHON) -m venv --clear $(VENV)/lowest
	$(LOWEST) -m pip install --quiet --upgrade pip
	$(PYTHON) tests/lowest_versions.py > $(VENV)/lowest/versions.txt
	grep -vE '^(tokenizers|safetensors)==' $(VENV)/lowest/versions.txt | $(LOWEST) -m pip install --quiet -r /dev/stdin -e .
	$(LOWEST) -m ruff format --check . && $(LOWEST) -m ruff check . && $(LOWEST) -m mypy
	OMP_WAIT_POLICY=passive $(LOWEST) $(TESTS) -W ignore::DeprecationWarning
	$(LOWEST) -m pip uninstall --quiet --yes transformers
	grep -E '^(tokenizers|safetensors)==' $(VENV)/lowest/versions.txt | $(LOWEST) -m pip install --quiet -r /dev/stdin
	$(LOWEST) -m pytest -W ignore::DeprecationWarning tests/lm tests/recipes/test_export.py

# Tests also pass with another torch, and with the Triton that it asks for: several gigabytes of CUDA. Triton's interpreter
# up to 3.6, that of torch 2.11, wants a NumPy below 2.4.
test-torch:  ## all tests with another torch: make test-torch TORCH=2.11.0
	$(PYTHON) -m venv --clear $(VENV)/torch
	$(OTHER) -m pip install --quiet --upgrade pip
	grep -vE '^(torch|triton|numpy)==' constraints.txt | $(OTHER) -m pip install --quiet -c /dev/stdin -e '.[test]' 'torch==$(TORCH)' $(if $(WITH),'$(WITH)')
	OMP_WAIT_POLICY=passive $(OTHER) $(TESTS)

test-newest:  ## all tests with the newest versions there are, torch and Triton apart
	$(PYTHON) -m venv --clear $(VENV)/newest
	$(NEWEST) -m pip install --quiet --upgrade pip
	grep -E '^(torch|triton)==' constraints.txt | $(NEWEST) -m pip install --quiet -c /dev/stdin -e '.[test]'
	$(NEWEST) -m ruff format --check . && $(NEWEST) -m ruff check . && $(NEWEST) -m mypy
	OMP_WAIT_POLICY=passive $(NEWEST) $(TESTS)

setup: $(STAMP)  ## the environment

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	cd $(VENV)/lib/python*/site-packages && "$(CURDIR)/$(BIN)/python" -m compileall -qq -j 0 -x '/(tests|testing)/' $(COMPILED) "$(CURDIR)/moekit" || true
	touch $(STAMP)

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

check: lint  ## format, lint, types
	$(BIN)/mypy

bench: setup  ## measured benchmarks, about two minutes
	$(BIN)/python -m pytest tests/benchmarks --benchmark-enable --benchmark-only --benchmark-quiet --benchmark-json=bench.json $(FLAGS)

clean:  ## remove the environment and what tests and tools left behind; runs in logs/ stay
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks bench.json
