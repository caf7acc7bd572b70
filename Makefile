# `make demo` and `make test` need Python 3.11 or newer and make; the rest they install into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PSD := $(BIN)/psd
CONSTRAINTS := tests/constraints.txt
# A process per core, four at most; they take work from each other.
PYTEST := $(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help setup demo test test-slow check format bench bench-gpu clean reproduce-table1 reproduce-table2 \
  reproduce-table3 reproduce-table4 reproduce-table5 reproduce-fig4 reproduce-fig5 \
  reproduce-qualitative gpu-pretrain-dry-run

help:
	@echo "make demo                  the whole pipeline on embedded images; leaves demo/report.html"
	@echo "make test                  the test suite (make test-slow: the long ones too)"
	@echo "make check                 ruff, mypy and the import-direction tests"
	@echo "make setup                 .venv with PathSegDiff and what developers need"
	@echo "make bench                 both stages beside the plain way, on this machine"
	@echo "make bench-gpu             both stages on a GPU, beside what it gives (ten minutes)"
	@echo "make gpu-pretrain-dry-run  pre-training in short turns, rehearsed on a CPU (a minute)"
	@echo "make reproduce-table1      Table 1 of the paper: parameters, counted"
	@echo "make reproduce-table2      Table 2 (BCSS; MODEL=..., DATASET=..., BUDGET=full, OUT=...)"
	@echo "make reproduce-table4      Table 4 (GlaS; the same); -table3, -table5, -fig4, -fig5, -qualitative"
	@echo "                           PSD_DATA=FOLDER: data sets in FOLDER/glas, ... instead of data/"
	@echo "make clean                 remove .venv and caches; data, features, runs and models stay"

$(VENV)/.user: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "PathSegDiff needs Python 3.11 or newer; use make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.user
	$(PSD) demo

test: $(VENV)/.user
	$(PYTEST)

test-slow: $(VENV)/.user
	$(PYTEST) -m "not gpu and not weights"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_imports.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.user
	$(PSD) bench

bench-gpu: $(VENV)/.user
	$(BIN)/python benchmarks/gpu.py --json gpu.json

gpu-pretrain-dry-run: $(VENV)/.user
	$(BIN)/python benchmarks/gpu_pretrain_dry_run.py

reproduce-table1 reproduce-table2 reproduce-table3 reproduce-table4 reproduce-table5 reproduce-fig4 \
  reproduce-fig5 reproduce-qualitative: \
  $(VENV)/.user
	@$(PSD) reproduce $(@:reproduce-%=%)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
