# Everything that is built or installed lies under .venv and the node_modules of contracts, tests/js and tests/js-gateway;
# nothing else on the machine changes (but for age, wrk and bubblewrap, which come from apt when make runs as root).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(VENV)/tools/bin:$(CURDIR)/$(BIN):$(PATH)

# The first of these that runs, is 3.11 or later and can make virtual environments; `make PYTHON=...` picks another.
CANDIDATES := python3.11 python3.12 python3
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(SUITABLE)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

PIP := $(BIN)/python -m pip install -q --disable-pip-version-check --no-input
# The lock files are complete and hold hashes, so nothing is resolved, and nothing is compiled.
LOCKED := $(PIP) --no-deps --require-hashes --only-binary=:all:
# By name and first: a requirement for torch that pip resolves brings gigabytes of GPU libraries.
TORCH := torch==2.13.0

JOBS ?= 2
PYTEST := $(BIN)/python -m pytest

.PHONY: help setup demo test check lint bench soak lock docs clean

help: ## this list
	@echo "usage: make TARGET"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.demo ## the whole story on a chain of its own, then serve; ONCE=1 ends after it, HOST= and PORT= choose where
	@$(BIN)/divault demo $(if $(ONCE),--once) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(if $(JSON),--json $(JSON))

setup: $(VENV)/.setup ## the full development environment in .venv

# In the order of the folder: the long end-to-end files come first, and the workers end together.
test: setup ## every test
	$(PYTEST) -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint test ## what CI runs: linters, types, layers, contract artifacts, then every test

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python contracts/compile.py --check

bench: setup ## benchmarks into bench/results/latest.json; ONLY="word ..." picks by name
	$(BIN)/python -m bench $(ONLY)

soak: setup ## the long-running tests
	$(PYTEST) -m soak --timeout 0 $(ARGS)

docs: setup ## write the generated pages of docs/reference and .env.example again
	$(BIN)/python tools/write_reference.py

UV := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --excludes requirements/no-torch.txt $(if $(UPGRADE),--upgrade)

lock: setup ## lock the dependencies again (UPGRADE=1: to their newest versions)
	$(UV) pyproject.toml --extra all --group dev -o requirements/dev.txt
	$(UV) pyproject.toml --extra sklearn --extra devnet -c requirements/dev.txt -o requirements.txt
	$(UV) --group pyproject.toml:build -c requirements/dev.txt -o requirements/build.txt
	$(UV) --group pyproject.toml:node -o requirements/node.txt

clean: ## remove all that make made (state/, logs/ and cache/ stay)
	rm -rf $(VENV) contracts/node_modules tests/js/node_modules tests/js-gateway/node_modules build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests bench tools contracts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUITABLE)' 2>/dev/null; then \
	  echo "divault needs Python 3.11 or 3.12 with its venv module, and found none as: $(or $(PYTHON),$(CANDIDATES))." >&2; \
	  echo "Install it (Debian, Ubuntu: apt install python3 python3-venv) or name one: make PYTHON=/path/to/python3.12 ..." >&2; \
	  exit 1; fi
	@echo "making $(VENV) with $$("$(PYTHON)" --version)"
	@rm -rf $(VENV) && "$(PYTHON)" -m venv $(VENV)

# What a node needs. Where the embedded chain has no build for this Python, anvil takes its place.
$(VENV)/.demo: requirements.txt requirements/build.txt pyproject.toml | $(BIN)/python
	@echo "installing the locked packages (about 100 MB the first time)"
	@$(LOCKED) -r requirements.txt -r requirements/build.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import pyrevm' 2>/dev/null || tools/setup_tools.sh node anvil
	@touch $@

$(VENV)/.setup: requirements/dev.txt pyproject.toml tools/setup_tools.sh contracts/package-lock.json \
		tests/js/package-lock.json tests/js-gateway/package-lock.json | $(BIN)/python
	@echo "installing the development environment (torch included; some minutes the first time)"
	@$(PIP) $(TORCH)
	@$(LOCKED) -r requirements/dev.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@tools/setup_tools.sh node node24 anvil contracts sdk gateway age wrk bwrap
	@touch $@ $(VENV)/.demo
