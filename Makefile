# Everything here runs in a virtual environment of its own, made at the first call: Python 3.10 or newer
# and make are all a machine needs. `make help` lists the targets.
#
#   make test PYTHON=python3.12      another interpreter
#   make test VENV=/tmp/dpzoo-venv   another place for the environment
#   make test WORKERS=0              tests in one process (for a debugger)
#
# Which build of torch is installed (CPU or an accelerator's) is pip's choice. On Linux the default is
# usually the CUDA build, several GB; to take another, set PIP_INDEX_URL or PIP_EXTRA_INDEX_URL in the
# environment to the index that PyTorch's installation page names for your machine, and call make.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= logical
FUZZ    ?= 100

BIN    := $(VENV)/bin
STAMP  := $(VENV)/.dpzoo-installed
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
# At most four workers: each imports torch and transformers, half a GB. Each has one thread (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-all fuzz matrix supply-chain constraints reliability bench docs lint format build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## make the environment, with the tested versions (the other targets do it when needed)

# The stamp is the last thing written: an installation that broke off starts again, and one that is
# older than the two files that describe it is brought up to date.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '' || { echo "error: cannot run '$(PYTHON)'; name a Python 3.10 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: dpzoo needs Python 3.10 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "error: '$(PYTHON)' has no venv module; install it (on Debian and Ubuntu: apt install python3-venv) or name another: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools torch
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## a private head on a real BERT, from real text (a minute or two)
	$(BIN)/python examples/quickstart.py

test: $(STAMP)  ## run the tests
	$(PYTEST)

test-slow: $(STAMP)  ## run the exhaustive sweeps only
	@# 5: nothing was selected, which is no failure
	$(PYTEST) -m slow || [ $$? -eq 5 ]

test-all: $(STAMP)  ## run the tests and the exhaustive sweeps
	$(PYTEST) -m 'slow or not slow'

fuzz: $(STAMP)  ## try random models, batches and damaged files, many times the tests' number (FUZZ=100: hours)
	DPZOO_FUZZ=$(FUZZ) $(BIN)/python -m pytest -q --hypothesis-show-statistics tests/test_fuzz.py

matrix: $(STAMP)  ## run the tests with the oldest and the newest versions, and write docs/versions.md (an hour)
	$(BIN)/python .ci/matrix

supply-chain: $(STAMP)  ## write docs/licences.md, and check the pins for known vulnerabilities (needs the network)
	$(BIN)/python .ci/supply-chain licences
	$(BIN)/python .ci/supply-chain vulnerabilities

constraints: $(STAMP)  ## write constraints.txt: the newest versions that resolve today
	$(BIN)/python .ci/supply-chain constraints

reliability: $(STAMP)  ## write docs/reliability.md: what became of everything odd, damaged or interrupted
	$(BIN)/python docs/reliability.py

bench: $(STAMP)  ## measure private steps against non-private ones (a quarter of an hour; keep the machine idle)
	$(BIN)/dpzoo bench roberta-base --layers 4 --batch 8 --seq 128

docs: $(STAMP)  ## build the documentation into build/site, strictly: a broken link or a page without a place fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## fix what the linter can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(STAMP)  ## build the source archive and the wheel into dist/
	rm -rf dist build
	$(BIN)/python -m build --no-isolation

clean:  ## remove what the other targets made, the environment included
	rm -rf $(VENV) build dist dpzoo.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
