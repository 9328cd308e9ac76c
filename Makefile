# `make demo` and `make test` need nothing but Python ≥ 3.11 and make: each makes .venv,
# installs what was tested (constraints.txt), and runs.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 9
RUNS ?= runs

.PHONY: demo test lint types check bench-ct bench-operators bench-segmentation test-cuda bench-cuda train-priors clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all]" --group dev
	touch $@

demo: .venv/installed
	$(BIN)/invsolve demo

test: .venv/installed
	$(BIN)/python -m pytest -q -n auto

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/installed
	$(BIN)/pyright

check: lint types test

bench-ct: .venv/installed
	$(BIN)/python benchmarks/ct_headneck.py

bench-operators: .venv/installed
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/operators.py --docs

bench-segmentation: .venv/installed
	$(BIN)/python benchmarks/make_petct_population.py --out $(INVSOLVE_DATA)/petct
	$(BIN)/python benchmarks/segmentation.py train
	$(BIN)/python benchmarks/segmentation.py run
	$(BIN)/python benchmarks/segmentation.py docs

# With a CUDA device: each has a time budget, takes up where it left off, and writes
# what it finds to $(RUNS).
test-cuda: .venv/installed
	timeout $(MINUTES)m $(BIN)/python -m pytest -q -m cuda

bench-cuda: .venv/installed
	timeout $(MINUTES)m sh -c '$(BIN)/python benchmarks/operators.py --device cuda --out $(RUNS)/operators \
		&& $(BIN)/python benchmarks/ct_headneck.py --device cuda --out $(RUNS)/bench-cuda'

# PRIOR=mr-brain-128 and natural-64 need images of their own, see data/README.md.
PRIOR ?= ct-headneck-128
train-priors: .venv/installed
	$(BIN)/invsolve train configs/$(PRIOR)-gpu.toml --out $(RUNS)/$(PRIOR) --minutes $(MINUTES)

clean:
	rm -rf .venv runs demo
