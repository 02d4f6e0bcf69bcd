# What there is to do here; `make` lists it. Each target sets up what it needs first (tools/setup).

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist worksteal
export DESKGRID_CACHE ?= $(CURDIR)/.cache
# The tests start hundreds of programs: without the bytecode that the first has written, each compiles every module that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test test-full check lint format docs lock bench clean clean-all

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## system packages and .venv
	@tools/setup

demo: setup ## a grid on this machine and one job in a virtual machine
	@$(BIN)/deskgrid demo

test: lint ## all checks and all tests but the long ones
	$(PYTEST) -m 'not full'

test-full: lint ## all checks and all tests, the long ones too
	@tools/setup full
	$(PYTEST)

lint: setup ## formatting, rules, types, imports, generated documentation
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

format: setup ## format the code and mend what can be mended
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: setup ## write the generated parts of the documentation anew
	$(BIN)/python docs/generate.py

bench: ## run all benchmarks (minutes); QUICK=1 for a short look
	@tools/setup bench
	@for name in pilot warm_start checkpoint caps scratch delta transfer distribution thousand churn overlay hub dispatch scale; do $(BIN)/python bench/$$name.py $(if $(QUICK),--quick); done

lock: setup ## resolve the dependencies anew into requirements.lock, those of the templates and of the benchmarks
	$(BIN)/python -m venv --clear .cache/lock
	.cache/lock/bin/pip install --quiet --disable-pip-version-check uv
	.cache/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--group dev pyproject.toml $(if $(UPGRADE),--upgrade) --output-file requirements.lock
	.cache/lock/bin/uv pip compile --quiet --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--no-build --extra swarm --constraints requirements.lock pyproject.toml --output-file src/deskgrid/templates/worker.lock
	.cache/lock/bin/uv pip compile --quiet --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes --no-annotate --no-header \
		--no-build --prerelease allow src/deskgrid/templates/root.in $(if $(UPGRADE),--upgrade) --output-file src/deskgrid/templates/root.lock
	.cache/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
		bench/yardsticks.in $(if $(UPGRADE),--upgrade) --output-file bench/yardsticks.lock
	@! grep -n '://' requirements.lock src/deskgrid/templates/worker.lock src/deskgrid/templates/root.lock bench/yardsticks.lock || { echo "a lock names an address" >&2; exit 1; }

clean: ## remove what was made here, except .venv and .cache
	rm -rf build dist demo-result .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests bench tools -name __pycache__ -prune -exec rm -rf {} +

clean-all: clean ## remove .venv and .cache too
	rm -rf .venv .cache
