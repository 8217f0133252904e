# `make quickstart` and `make test` work in a fresh clone. They make a virtual environment, install what they need, and
# install again when pyproject.toml, the constraints or the settings below change. For example:
#   make test PYTHON=python3.12        use another Python (delete .venv first)
#   make test CONSTRAINTS=             use the newest releases instead of the ones in constraints.txt
#   make test-all PYTEST_ARGS='-k rmt' pass options to pytest

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
PYTEST_ARGS ?=
RESULTS ?= benchmarks/results
BENCHMARK ?= cpu-float32
BENCHMARK_ARGS ?=

BIN := $(VENV)/bin
# Without constraints, pip moves the packages that constraints.txt names to their newest releases and leaves torch alone.
NEWEST := --upgrade $(shell sed -n 's/==.*//p' constraints.txt)
ifneq ($(CONSTRAINTS),$(wildcard $(CONSTRAINTS)))
$(error There is no file CONSTRAINTS=$(CONSTRAINTS))
endif
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS),$(NEWEST))

# Neither the tests nor the quick start need the Hub.
export HF_HUB_OFFLINE = 1
# Only the virtual environment counts, whatever is active around it.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help quickstart test test-all test-newest lint benchmark venv clean FORCE

help:
	@echo "make quickstart   train a small model on digits in photographs and look at its regions (minutes)"
	@echo "make test         run the quick tests (8 minutes on two cores)"
	@echo "make test-all     run all tests (40 minutes on two cores)"
	@echo "make test-newest  run the quick tests with the newest releases, in .venv-newest"
	@echo "make lint         check style, formatting and which package imports which"
	@echo "make benchmark    measure speed and memory beside other vision transformers (hours on two cores)"
	@echo "make venv         make .venv with everything for development"
	@echo "make clean        remove build products, caches and quick start results (virtual environments stay)"

quickstart: $(VENV)/installed-quickstart
	@$(BIN)/dart-hf quickstart --output quickstart
	@echo "The command dart-hf is in $(BIN); 'source $(BIN)/activate' puts it on the path."

# One thread for each test worker. worksteal keeps the tests of a file together, so that they share their fixtures.
test test-all: export OMP_NUM_THREADS = 1
test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The stamp goes first: a release may have come since the last time.
test-newest:
	rm -f .venv-newest/installed-test
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# Import Linter needs the packages where they are installed: modeling and conversion inside dart_hf.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/imports
	mkdir -p build/imports
	cp -R dart_hf pyproject.toml build/imports/
	cp -R modeling conversion build/imports/dart_hf/
	cd build/imports && $(abspath $(BIN)/lint-imports)

# Other settings: make benchmark BENCHMARK=cuda-bfloat16 BENCHMARK_ARGS='--device cuda --dtype bfloat16 --batch-size 256'
benchmark: $(VENV)/installed-quickstart
	$(BIN)/dart-hf benchmark --output $(RESULTS)/$(BENCHMARK) $(BENCHMARK_ARGS)
	$(BIN)/python benchmarks/scaling.py --output $(RESULTS)/scaling.json
	$(BIN)/python benchmarks/vision_mamba.py --output $(RESULTS)/vision_mamba.json
	$(BIN)/python benchmarks/fine_tuning.py --output $(RESULTS)/fine_tuning.json

venv: $(VENV)/installed-dev

clean:
	rm -rf build dist quickstart *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON.")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Holds the value of CONSTRAINTS; rewritten only when the value changes.
$(VENV)/constraints: $(VENV)/made FORCE
	@echo '$(CONSTRAINTS)' | cmp -s - $@ || echo '$(CONSTRAINTS)' > $@

$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) $(VENV)/constraints
	$(INSTALL) --editable '.[$*]'
	@touch $@
