# `make demo` and `make test` make their own virtual environment (.venv) and need nothing but python3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUT ?= out/demo
WORKERS ?= 2
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet --constraint constraints.txt

# Waiting threads of libgomp spin 300,000 times by default, which on a busy machine starves the one they wait for.
GOMP_SPINCOUNT ?= 3000
export GOMP_SPINCOUNT

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

# The stamps are written last, so an installation that was cut short is done again.
$(VENV)/stamp-demo: pyproject.toml constraints.txt
	@echo "Preparing $(VENV) (the first time this downloads PyTorch)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[figures,tensorboard]'
	@touch $@

$(VENV)/stamp-test: pyproject.toml constraints.txt
	@echo "Preparing $(VENV) (the first time this downloads PyTorch)"
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[test]'
	@touch $@ $(VENV)/stamp-demo

demo: $(VENV)/stamp-demo
	$(BIN)/python -m visionmoe.demo --out $(OUT)

# Two test processes with one thread each are faster on two cores than one process with two.
test: $(VENV)/stamp-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/stamp-test
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info
