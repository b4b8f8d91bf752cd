# `make demo` and `make test` set up everything they need in .venv, from Python alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore::FutureWarning

LONG := chaos soak outage roundtrip fuzz

.PHONY: demo test test-slow faults lint clean agent-short no-harm domains $(LONG)

demo: $(VENV)/demo.stamp  ## install, then the main job: train, export, adapt, report
	$(RUN) $(BIN)/edge-adapt demo --out runs/demo --json runs/demo.json

test: $(VENV)/test.stamp lint  ## everything but what is marked slow or fault
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/test.stamp  ## the checks that take minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

faults: $(VENV)/test.stamp  ## one test and more for each row of docs/faults.md
	OMP_NUM_THREADS=1 $(BIN)/pytest -m fault

# Long checks of the agent, figures into benchmarks/results/agent; `make soak FLAGS=--short` is a short cut of one.
$(LONG): $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/python tests/long/$@.py $(FLAGS)

agent-short: $(VENV)/test.stamp  ## short cuts of all of them, figures into runs/agent; fails on a broken promise
	rm -rf runs/agent
	for check in $(LONG); do echo "== $$check" && OMP_NUM_THREADS=1 \
	  $(BIN)/python tests/long/$$check.py --short --bundle runs/agent/bundle || exit 1; done

no-harm: $(VENV)/test.stamp  ## every scenario x method against source: hours, and it goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/edge-adapt replay benchmarks/plans/no_harm.yaml --jobs 2 \
	  --out runs/no_harm --cache runs/no_harm/cache
	$(BIN)/python -m benchmarks.harm runs/no_harm/results.json benchmarks/results

domains: $(VENV)/test.stamp  ## how well domains, strangers and accuracy are told; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.domains ../shared/data

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
	$(BIN)/pip install -q -e '.[tensorrt-check]' -c constraints.txt \
	  || echo "no TensorRT for RTX here: tests that ask its parser and builder skip"
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) runs build *.egg-info
