# Every target sets up .venv by itself: only Python 3.11, make and a package index are needed.
PYTHON ?= python3.11
BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS := $(filter-out __init__ common loaders networks,$(basename $(notdir $(wildcard benchmarks/*.py))))

.PHONY: setup demo test test-fast soak lint bench bench-smoke clean

setup: $(READY)

demo: $(READY)
	$(BIN)/python jobs/demo.py --output demo

test: lint
	$(BIN)/python -m tests

# What needs no cluster and no job.
test-fast: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not cluster and not system and not soak"

# Full matrices of faults; docs/tests.md lists them.
soak: $(READY)
	$(BIN)/python -m pytest -m soak --timeout 3600

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done

bench-smoke: $(READY)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --smoke || exit 1; done

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv demo
