# What each target stands for is in the README, as plain pip lines.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# On few cores, threads that spin while they wait make a training step many times slower.
export OMP_WAIT_POLICY ?= passive

# Processes that share the tests file by file, of one thread each: more threads than cores make both slower.
JOBS ?= 2

.PHONY: test check lint types demo soak bench clean

test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not alone" -n $(JOBS) --dist loadfile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "alone and not slow"

check: lint types test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

# Minutes to hours: the long forms of the tests.
soak: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow --timeout 7200

demo: $(VENV)/.installed-yolov5
	$(BIN)/gradprobe record --trainer gradnorm --out demo/conflict.h5 --overwrite
	$(BIN)/gradprobe plot demo/conflict.h5

bench: $(VENV)/.installed-test
	$(BIN)/python benchmarks/record_overhead.py
	$(BIN)/python benchmarks/runfile.py

$(VENV)/.installed-%: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) demo dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
