# Every target sets up .venv by itself: only Python 3.11, make and a package index are needed.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS := $(filter-out benchmarks/__init__.py benchmarks/common.py,$(wildcard benchmarks/*.py))

.PHONY: demo test lint bench bench-smoke clean

demo: $(READY)
	$(BIN)/python jobs/demo.py --output demo

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

bench-smoke: $(READY)
	for script in $(BENCHMARKS); do $(BIN)/python $$script --smoke || exit 1; done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo
