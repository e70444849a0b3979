# Every target sets up .venv itself. It needs only Python 3.11, make and a package index.
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

# The tests that need neither a cluster nor a job, except those that take more than about five seconds each.
test-fast: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not cluster and not system and not slow and not soak"

# All combinations of faults, which docs/tests.md lists.
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

$(READY): pyproject.toml constraints.txt tests/references.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/references --requirement tests/references.txt
	touch $(READY)

clean:
	rm -rf .venv demo
