# `make quickstart` and `make test` work in a fresh clone: they make the virtual environment .venv and install what they
# need into it, again only when pyproject.toml has changed. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
RESULTS ?= benchmarks/results
BENCHMARK ?= cpu-float32
BENCHMARK_ARGS ?=

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --editable

# Neither the tests nor the quick start need the Hub.
export HF_HUB_OFFLINE = 1
# The virtual environment is all that counts, whatever is active around it.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help quickstart test lint benchmark venv clean

help:
	@echo "make quickstart   train a small model on digits in photographs and look at its regions (minutes)"
	@echo "make test         run the tests"
	@echo "make lint         check style and formatting"
	@echo "make benchmark    measure speed and memory beside other vision transformers (hours on two cores)"
	@echo "make venv         make .venv with everything for development"
	@echo "make clean        remove build products, caches and quick start results (.venv stays)"

quickstart: .venv/installed-quickstart
	@$(BIN)/dart-hf quickstart --output quickstart
	@echo "The command dart-hf is in $(BIN); 'source $(BIN)/activate' puts it on the path."

# One thread per test worker.
test: export OMP_NUM_THREADS = 1
test: .venv/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Other settings: make benchmark BENCHMARK=cuda-bfloat16 BENCHMARK_ARGS='--device cuda --dtype bfloat16 --batch-size 256'
benchmark: .venv/installed-quickstart
	$(BIN)/dart-hf benchmark --output $(RESULTS)/$(BENCHMARK) $(BENCHMARK_ARGS)
	$(BIN)/python benchmarks/scaling.py --output $(RESULTS)/scaling.json
	$(BIN)/python benchmarks/vision_mamba.py --output $(RESULTS)/vision_mamba.json
	$(BIN)/python benchmarks/fine_tuning.py --output $(RESULTS)/fine_tuning.json

venv: .venv/installed-dev

clean:
	rm -rf build dist quickstart *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON.")'
	rm -rf .venv
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: pyproject.toml .venv/made
	$(INSTALL) .
	@touch $@

.venv/installed-%: pyproject.toml .venv/made
	$(INSTALL) '.[$*]'
	@touch $@
