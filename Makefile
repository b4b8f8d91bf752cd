# `make demo` and `make test` set up everything they need in .venv, from Python alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning

.PHONY: demo test test-slow lint clean

demo: $(VENV)/demo.stamp  ## install, then the main job: train, export, adapt, report
	$(RUN) $(BIN)/edge-adapt demo --out runs/demo --json runs/demo.json

test: $(VENV)/test.stamp lint  ## everything but the checks marked slow
	OMP_NUM_THREADS=1 $(BIN)/pytest

test-slow: $(VENV)/test.stamp  ## the checks that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -e '.[demo]' -c constraints.txt
	touch $@

$(VENV)/test.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install -q torch -c constraints.txt
	$(BIN)/pip install -q -e '.[test]' -c constraints.txt
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) runs build *.egg-info
