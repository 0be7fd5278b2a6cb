# Everything needs Python 3.11 or newer and make, nothing else. `make help` lists what there is.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip -qq --disable-pip-version-check --no-input
WORKERS ?= 3
UV     ?= $(firstword $(shell command -v uv 2>/dev/null) $(wildcard $(VENV)/bin/uv) uv)

# The stamps carry the place: an environment that was copied along with a checkout still points to the old one.
PLACE   := $(shell pwd -P | cksum | cut -d' ' -f1)
RUNTIME := $(VENV)/.runtime-$(PLACE)
DEV     := $(VENV)/.dev-$(PLACE)

.DEFAULT_GOAL := help
.PHONY: help install demo test check format docs bench proof lock clean
.DELETE_ON_ERROR:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(DEV) ## Install it in .venv with every extra, and with what the tests need

demo: $(RUNTIME) ## Show it working against an emulated FLORA (KEEP=1 keeps it running)
	@$(VENV)/bin/flora-receiver demo $(if $(KEEP),--keep)

test: $(DEV) ## Run the tests (ARGS="-k name" chooses)
	@.ci/system
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

check: $(DEV) ## Check format, lint, types, imports and dependencies
	@$(PY) -m ruff format --check --quiet . || { echo "Run 'make format'."; exit 1; }
	@$(PY) -m ruff check --quiet .
	@$(PY) -m mypy --no-error-summary
	@MYPYPATH=tests/example_plugin/src $(PY) -m mypy --no-error-summary -p flora_checksums
	@$(PY) -c 'from importlinter.cli import lint_imports_command as run; run()' --no-logo > $(VENV)/imports.txt || { cat $(VENV)/imports.txt; exit 1; }
	@$(PIP) check || { $(PY) -m pip check; echo "The locks do not fit pyproject.toml: run 'make lock'."; exit 1; }
	@$(PY) -m deptry --no-ansi . > $(VENV)/dependencies.txt 2>&1 || { cat $(VENV)/dependencies.txt; exit 1; }
	@echo "Format, lint, types, imports and dependencies are fine."

format: $(DEV) ## Format the code and apply safe fixes
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format .

docs: $(DEV) ## Write the generated parts of the documents anew, and the picture
	@$(PY) -m tests.docs.generate
	@$(PY) -m tests.docs.picture

bench: $(DEV) ## Measure: one table, in some minutes
	@$(PY) -m pytest -v --no-header --tb=short $(ARGS) $(or $(wildcard tests/bench/bench_*.py),$(error there is no tests/bench/bench_*.py))

proof: $(DEV) ## Prove what takes long: real waits, many rows, many crashes
	@$(PY) -m pytest -q -s $(ARGS) $(or $(wildcard tests/proof/proof_*.py),$(error there is no tests/proof/proof_*.py))

# Needs uv. The second lock repeats the first one's versions. hatchling and editables build the checkout itself.
# The third is the container's: what a server may need, in the versions that the tests run with.
SERVER := $(foreach extra,fast kafka nats notify postgres redis thumbnails,--extra $(extra))
LOCK := $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade)
lock: ## Write the lock files anew (UPGRADE=1 takes newer versions)
	@printf 'hatchling\neditables\n' | $(LOCK) pyproject.toml - --output-file requirements.lock
	@printf 'hatchling\neditables\n' | $(LOCK) pyproject.toml - --extra dev --constraint requirements.lock \
		--output-file requirements-dev.lock
	@printf 'hatchling\neditables\n' | $(LOCK) pyproject.toml - $(SERVER) --constraint requirements-dev.lock \
		--output-file requirements-server.lock
	@! grep -nE '://' requirements*.lock || { echo "A lock names a download address."; exit 1; }

clean: ## Remove the environment and the caches, never data
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME): requirements.lock pyproject.toml | $(PY)
	@echo "Installing what the service needs ..."
	@$(PIP) install --require-hashes -r requirements.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(DEV): requirements-dev.lock pyproject.toml | $(PY)
	@echo "Installing what the tests need ..."
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $(RUNTIME) $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "This Python cannot make environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv $(VENV)
