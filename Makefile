# SPDX-License-Identifier: Apache-2.0
# Every target makes .venv when it is missing and brings it up to date when the
# build files change; otherwise it is reused.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := build/triton-3.6.0

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types nightly oldest clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMP) ## train a small model on two processes, into runs/demo
	$(BIN)/zfunc train --nproc 2 --out runs/demo --overwrite

test: $(STAMP) ## the whole test suite, doctests included
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP) ## ruff, formatting and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## apply ruff's safe fixes and its formatting
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

# A thousand random examples per law outlast the default limit of a test.
nightly: $(STAMP) ## the laws on many random examples
	$(BIN)/pytest tests/laws --hypothesis-profile=nightly --timeout=3600

# Its interpreter needs a numpy below 2.4. Both stand before those of .venv.
oldest: $(STAMP) $(OLDEST)/.installed ## tests of the kernels with the oldest Triton
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(BIN)/pytest -n 2 --dist loadfile tests/kernels

$(OLDEST)/.installed:
	@$(BIN)/python -m pip install -qq --no-deps --target $(OLDEST) triton==3.6.0 "numpy<2.4"
	@touch $@

clean: ## remove caches, build products and the demo's output; keeps .venv
	rm -rf build dist *.egg-info runs/demo .coverage htmlcov .hypothesis
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# -qq leaves errors only: pip's warnings are about the machine, not about zfunc.
$(STAMP): pyproject.toml setup.py
	@echo "installing zfunc and its development tools into $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "zfunc needs Python 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --editable ".[dev,testing]"
	@touch $@
