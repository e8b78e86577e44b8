# Everything runs inside .venv, made by the first target that needs it. `make` alone lists the targets.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# One process and plain single precision, said aloud so that `accelerate launch` neither guesses nor reads a saved configuration.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.DEFAULT_GOAL := help
.PHONY: help venv demo test quality style bench docs matrix mutants clean
.NOTPARALLEL:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12  interpreter for .venv      ARGS='...'  flags for demo, pytest, mkdocs or the benchmarks"

venv: $(READY)  ## make .venv with the tested versions (again when setup.py or constraints.txt change)

# torch first and alone: later packages find it installed, and none of them can choose another build.
$(READY): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "hf_dynsparse needs Python 3.11 or newer. '$(PYTHON)' was not found. Try: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "hf_dynsparse needs Python 3.11 or newer (as transformers 5.23). Got $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quality,plots]'
	@touch $@

demo: venv  ## pre-train a small sparse BERT and its dense twin here; results in demo-output; goes on where it stopped
	$(LAUNCH) examples/demo.py $(ARGS)

test: quality  ## style, types and every test
	$(BIN)/python -m pytest $(ARGS)

quality: venv  ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: venv  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv  ## measure, but only behind green tests; ARGS='--threads 1' for CPU time
	$(BIN)/python -m pytest --quiet
	@set -e; for name in linear step inference; do echo "bench_$$name"; $(BIN)/python benchmarks/bench_$$name.py --quick $(ARGS); done
	$(BIN)/python benchmarks/bench_footprint.py
	$(BIN)/python benchmarks/bench_topology_update.py

docs: venv  ## build the site of the documentation in site/; ARGS=serve shows it at http://127.0.0.1:8000 and follows changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build)

matrix:  ## core tests over versions of Python, torch and transformers; ARGS='--list' for what was run
	$(PYTHON) tests/matrix.py $(ARGS)

mutants: venv  ## 200 small changes to blocks, ops and topology: does a test notice? ARGS='--count 20'
	$(BIN)/python tests/mutants.py $(ARGS)

clean:  ## remove what the tools and the demo left behind, but not .venv
	rm -rf build dist site demo-output .mypy_cache .pytest_cache .ruff_cache src/*.egg-info
	find src tests examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
