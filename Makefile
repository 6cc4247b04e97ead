# Each target does all of its own set-up, once: .venv/installed is newer than what it was installed from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all check clean

demo: $(VENV)/installed
	$(BIN)/leadline run digits

# What makes no run is tested on all cores; runs take all cores themselves, one after another.
WITHOUT_RUNS := tests/knn tests/points tests/members tests/depth tests/test_one_model.py tests/test_doctor.py

test: check
	$(BIN)/python -m pytest -m "not slow" -n auto $(WITHOUT_RUNS)
	$(BIN)/python -m pytest -m "not slow" $(WITHOUT_RUNS:%=--ignore %)

test-all: check
	$(BIN)/python -m pytest -n auto $(WITHOUT_RUNS)
	$(BIN)/python -m pytest $(WITHOUT_RUNS:%=--ignore %)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[cpu,hnswlib,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache
