# `make` alone lists the targets: a target's help is the comment that follows it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Arguments of run.py: make run ARGS="mask_ratio=0.1 model=opt_125m"
ARGS ?=
# Arguments of pytest: make test TESTS="tests/packed -x"
TESTS ?=
# Test processes, one thread each.
JOBS ?= logical
# A Python to use instead of the first suitable one: make run PYTHON=/opt/python3.12/bin/python3
PYTHON ?=

# The name that is a command may still not run (a version manager's shim), so each candidate is tried.
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
FIND_PYTHON = python=""; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3.12 python3.13 python3 python); do \
		if "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo 'No suitable Python: $(if $(PYTHON),PYTHON=$(PYTHON) is not,none of python3.11 ... python3 is) Python 3.11 to 3.13;' \
			'install one or name it with `make PYTHON=/path/to/python3.11`.' >&2; exit 1; \
	fi

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: $(STAMP)  ## install what is needed, once, and run an experiment; settings: make run ARGS="mask_ratio=0.1"
	$(BIN)/python run.py $(ARGS)

.PHONY: test
test: $(STAMP)  ## install what is needed, once, then linter, type checker, documentation and all tests; some: TESTS="tests/packed -x"
	$(MAKE) -j2 lint docs
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal $(TESTS)

.PHONY: lint
lint: $(STAMP)  ## linter, formatter (check only), type checker and the order of the rooms
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: docs
docs: $(STAMP)  ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: setup
setup: $(STAMP)  ## install what is needed into .venv, once

# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): requirements.lock pyproject.toml
	@$(FIND_PYTHON); \
	if ! [ -x $(BIN)/python ] || ! $(BIN)/python -c '$(SUITABLE)'; then \
		echo "Making $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
		"$$python" -m venv $(VENV) >/dev/null 2>&1 || { \
			: 'Some distributions split pip off from venv; their own pip then puts one in.'; \
			"$$python" -m venv --clear --without-pip $(VENV); \
			"$$python" -m pip --python $(BIN)/python install --quiet pip; \
		}; \
	fi
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

# A CUDA build of torch depends on packages that belong to it alone; leaving them to torch keeps the lock file right for
# every build. PIN holds versions back: make lock PIN="torch==2.13.0"
PIN ?=
.PHONY: lock
lock:  ## resolve the ranges of pyproject.toml anew and write requirements.lock; hold back: PIN="torch==2.13.0"
	@$(FIND_PYTHON); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	"$$python" -m venv "$$folder"; \
	"$$folder/bin/python" -m pip install --quiet --disable-pip-version-check '.[dev]' $(PIN); \
	{ sed -n '/^#/p' requirements.lock; \
	  "$$folder/bin/python" -m pip freeze --all --exclude pip --exclude ptq161 \
		| grep -Eiv '^(cuda-|nvidia-|triton|pytorch-triton)' | sed -E 's/\+[a-z0-9.]+$$//' | tr 'A-Z_' 'a-z-' | LC_ALL=C sort; \
	} > "$$folder/lock"; \
	cp "$$folder/lock" requirements.lock; git --no-pager diff --stat -- requirements.lock || true

.PHONY: clean
clean:  ## remove .venv and all caches; results are kept
	rm -rf $(VENV) site .import_linter_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
