# Two commands matter: `make demo` and `make test`. Both set up everything they need first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
# The first interpreter that is new enough; PYTHON=… chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Each test file on one of two workers: much of a test is waiting for a chain, a process, a model.
SIDE_BY_SIDE := -n 2 --dist loadfile

# Slither cleans the folders it compiles to, so they are its own.
SLITHER := --foundry-out-directory build/slither --filter-paths "node_modules|contracts/mocks" \
  --exclude-informational --exclude-low --exclude-optimization --fail-medium

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export SOLCX_BINARY_PATH := $(CURDIR)/$(VENV)/solcx

.PHONY: help setup demo test lint test-python test-contracts test-forge faults analyse gas coverage bench format artifacts lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready ## Install everything (Python and npm packages, pinned), once

$(VENV)/.tools:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "Waterfall needs Python 3.11 or newer: found $(or $(PYTHON),none on PATH)." >&2; exit 1; }
	@node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)' 2>/dev/null \
	  || { echo "Waterfall needs Node 20 or newer: found $$(node --version 2>/dev/null || echo none)." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) && touch $@

$(VENV)/.python: requirements.txt $(VENV)/.tools
	@echo "Installing Python packages (one to three minutes the first time) …"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes -r requirements.txt
	@touch $@

node_modules/.ready: package-lock.json .npmrc $(VENV)/.tools
	@echo "Installing npm packages (anvil, cast, forge, solc, Solidity libraries) …"
	@npm ci --loglevel=error --no-progress > /dev/null
	@touch $@

$(VENV)/.node: node_modules/.ready
	@ln -sf $(CURDIR)/node_modules/@foundry-rs/*/bin/{anvil,cast,forge} $(VENV)/bin/
	@mkdir -p $(VENV)/solcx && ln -sf $(CURDIR)/scripts/solc.mjs $(VENV)/solcx/solc-v0.8.37
	@touch $@

$(VENV)/.ready: $(VENV)/.python $(VENV)/.node pyproject.toml
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup ## Run real calls through funded wallets on a local chain, and verify every receipt
	@waterfall demo

test: lint analyse test-forge test-contracts test-python ## Run everything: linters, types, contracts, Python, whole system

lint: setup ## Check formatting, lint and types
	@ruff format --check --quiet . || { ruff format --diff --quiet . | head -40; exit 1; }
	@ruff check --quiet .
	@forge fmt --check contracts tests/forge
	@mypy

test-forge: setup ## Fuzz tests and invariants of the contracts
	@forge test

analyse: setup ## Static analysis of the contracts: no high or medium finding that is not explained beside the code
	@mkdir -p build
	@FOUNDRY_OUT=build/slither FOUNDRY_CACHE_PATH=build/slither-cache slither . $(SLITHER) > build/slither.log 2>&1 || { cat build/slither.log; exit 1; }
	@# It cannot follow OpenZeppelin's transient guard; of our own code nothing may be left out.
	@! grep "Impossible to generate IR" build/slither.log | grep -v /ReentrancyGuardTransient.sol
	@tail -1 build/slither.log

bench: setup ## Measure speed and memory on an otherwise idle machine, twenty minutes (ONLY=ledger|settlement|endurance)
	@PYTHONPATH=tests python -m bench $(ONLY)

gas: setup ## Measure gas and compare it with docs/gas.json (WRITE=1 accepts what differs)
	@ape test tests/contracts/test_gas.py -q $(if $(WRITE),--write-gas)

coverage: setup ## Report which lines and branches of the contracts the forge tests reach
	@FOUNDRY_OUT=build/coverage FOUNDRY_CACHE_PATH=build/coverage-cache forge coverage --ir-minimum --report summary \
	  --no-match-coverage "mocks|tests" > build/coverage.log 2>&1 || { tail -40 build/coverage.log; exit 1; }
	@sed -n '/% Lines/,$$p' build/coverage.log

test-contracts: setup ## Ape tests of the contracts, on a local Foundry chain
	@ape compile -v WARNING  # once, before workers that would both do it
	@ape test tests/contracts -q $(SIDE_BY_SIDE)

faults: setup ## Every fault at its full size; ROUNDS=3 runs them so often, each time with other chances
	@for round in $$(seq 1 $(or $(ROUNDS),1)); do \
	  WATERFALL_ALL_FAULTS=1 WATERFALL_FAULT_SEED=$$round python -m pytest -p no:ape_test tests/faults -q $(SIDE_BY_SIDE) || exit 1; \
	done

test-python: setup ## Unit, integration and end-to-end tests
	@python -m pytest -p no:ape_test tests/e2e tests/faults tests/integration tests/unit -q $(SIDE_BY_SIDE)

format: setup ## Format Python and Solidity
	@ruff format --quiet . && ruff check --fix --quiet . && forge fmt contracts tests/forge

artifacts: setup ## Compile the contracts into what the package carries
	@ape run artifacts

lock: setup ## Resolve Python dependencies anew into requirements.txt
	@uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --all-extras --group dev \
	  pyproject.toml --output-file requirements.txt

clean: ## Remove everything that was installed or built
	@rm -rf $(VENV) node_modules .build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
