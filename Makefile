# make demo            a real model before LoRA and after (make demo QUICK=1 for a shorter training)
# make test            every test, those on real models included
# make lint            ruff and mypy
# make bench           the benchmark of the README
# make load            thousands of adapters and steps, a million rows; the tests have fewer (a quarter of an hour)
# make fuzz            100,000 files that mean harm, where the tests have 10,000 (make fuzz CASES=1000000 SEED=7)
# make faults          kill every save at 60 moments of chance, where the tests have 5, and at each of its file operations (make faults KILLS=500)
# make notebooks       run the course's notebooks and write them anew (make notebooks FAST=1 only tries them, with models of a million weights)
# make course          open them in Jupyter
# make clean           remove the environment and what tools leave behind
#
# Each makes its environment in .venv first, with the versions in constraints.txt. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint bench load fuzz faults notebooks course clean

demo: .venv/demo.stamp
	$(BIN)/python -m lora_lab demo $(if $(QUICK),--quick)

# small tests on all processors, up to four at once; real models one after the other, with all processors for each
test: .venv/dev.stamp
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal -m "not real"
	$(BIN)/python -m pytest -m real

lint: .venv/dev.stamp
	$(BIN)/ruff check
	$(BIN)/mypy

bench: .venv/dev.stamp
	$(BIN)/python benchmarks/step.py

load: .venv/dev.stamp
	LORA_LAB_LOAD_STEPS=10000 LORA_LAB_LOAD_ROWS=1000000 $(BIN)/python -m pytest tests/load

fuzz: .venv/dev.stamp
	LORA_LAB_FUZZ=$(or $(CASES),100000) LORA_LAB_FUZZ_SEED=$(or $(SEED),0) $(BIN)/python -m pytest -s tests/hostile

faults: .venv/dev.stamp
	LORA_LAB_KILLS=$(or $(KILLS),60) $(BIN)/python -m pytest tests/faults

notebooks: .venv/notebooks.stamp
	$(BIN)/python notebooks/build.py $(if $(FAST),--fast)

course: .venv/notebooks.stamp
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/pip setup.cfg constraints.txt
	$(PIP) --editable '.[gguf]'
	touch $@

.venv/dev.stamp: .venv/bin/pip setup.cfg constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

.venv/notebooks.stamp: .venv/bin/pip setup.cfg constraints.txt
	$(PIP) --editable '.[gguf,notebooks]'
	touch $@
