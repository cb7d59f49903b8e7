# make demo: train a small model here, from nothing, in under ten minutes; make demo-vlm: one that sees. make test:
# everything that a change must pass. make bench: how fast it is beside others.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3.12
BIN := .venv/bin
PACKAGES := pretrain parallel moe vision kernels launch
# One thread a process: tests start several processes, and idle OpenMP threads that spin would slow all of them.
# Safe path: without it `python -m` puts this folder on sys.path, where `kernels` would hide the PyPI package of that name.
export OMP_NUM_THREADS ?= 1
export PYTHONSAFEPATH := 1

.PHONY: help install demo demo-vlm test bench lint tools

help:
	@echo "make demo      install, then make a tokenizer and shards, train, stop, resume and validate a small model"
	@echo "make demo-vlm  install, then the stages of a small vision-language model on letters that it draws"
	@echo "make test      install (chromium and Slurm too, as root on Debian), then lint, types, import layers and tests (no GPU)"
	@echo "make bench     install, then every measurement beside its rivals: one table, and bench.json (best on a quiet machine)"
	@echo "make install   .venv with Perilune (editable) and what its tests need; PYTHON=python3.12 chooses the interpreter"
	@echo "make lint      install, then ruff, mypy and import-linter alone"

install: .venv/.installed
	@:

demo: install
	$(BIN)/perilune demo

demo-vlm: install
	$(BIN)/perilune demo --vlm

test: lint tools
	$(BIN)/python -m pytest -q

bench: install
	$(BIN)/python tests/bench/run.py

# The report is looked at by a real browser, and jobs run on a real Slurm; where one cannot be had, its tests are skipped.
tools:
	@wanted=""; \
	command -v chromedriver >/dev/null || wanted="chromium chromium-driver"; \
	command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && \
	    command -v sbatch >/dev/null || wanted="$$wanted slurmctld slurmd munge slurm-client"; \
	[ -z "$$wanted" ] || { \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && echo "Installing for tests:" $$wanted && \
	    { apt-get -qq update && for package in $$wanted; do \
	        DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$package; \
	    done; } >/dev/null 2>&1; \
	} || echo "not all of $$wanted can be had here: the tests that need them are skipped"

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check --quiet || { echo "ruff format --check: run $(BIN)/ruff format" >&2; exit 1; }
	@mkdir -p .mypy_cache/root && ln -sfn ../.. .mypy_cache/root/perilune  # mypy does not see an editable install's mapping
	$(BIN)/mypy $(addprefix -p perilune.,$(PACKAGES)) | sed 's|\.mypy_cache/root/perilune/||'
	$(BIN)/lint-imports --no-cache --no-logo

# Where $(PYTHON) is but a shim of pyenv for a version that is not switched on, pyenv says which version holds it.
.venv/.installed: setup.py pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    python="$(PYTHON)"; \
	    if ! "$$python" -c "" >/dev/null 2>&1 && command -v pyenv >/dev/null; then \
	        version=$$(pyenv whence "$$python" 2>/dev/null | tail -n 1 || true); \
	        [ -z "$$version" ] || python=$$(PYENV_VERSION="$$version" pyenv which "$$python"); \
	    fi; \
	    "$$python" -c "import sys; sys.exit(sys.version_info < (3, 12))" >/dev/null 2>&1 || { \
	        found=$$("$$python" --version 2>/dev/null || echo "not found"); \
	        echo "Perilune needs Python 3.12 or newer; $(PYTHON): $$found. Install it, or name one: make PYTHON=/path/to/python3.12" >&2; \
	        exit 1; }; \
	    "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing Perilune and its dependencies into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -e ".[dev]"
	@touch $@
