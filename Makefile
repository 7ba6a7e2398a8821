# Two commands are all a newcomer needs: `make demo` and `make test`. Both create .venv on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test bench audit docs types lint format clean

demo: $(STAMP)
	$(BIN)/equiframe compare digits --imbalance 50 --methods ce,balanced-softmax,etf-mix-blend --seeds 0,1,2 \
		--validation 0 --epochs 10 --batch-size 32 --lr 0.05 --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)
	$(BIN)/python -m pytest -n 0 -s --timeout=600 benchmarks/test_guards.py

audit: $(STAMP)
	$(BIN)/python benchmarks/audit.py

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

types: $(STAMP)
	$(BIN)/mypy

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("equiframe needs Python 3.10 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large: a few minutes the first time)"
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .hypothesis
