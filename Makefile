# make demo: the whole pipeline on the embedded data, into runs/demo.   make test: the tests.   Both create .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check clean

.venv/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[report,dev]'
	touch $@

demo: .venv/installed
	$(BIN)/sdood run --config configs/demo.yml --out runs/demo

test: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

clean:
	rm -rf .venv build *.egg-info
