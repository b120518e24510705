# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
export KERAS_BACKEND ?= jax
export TF_CPP_MIN_LOG_LEVEL ?= 3
BACKEND ?= torch

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help quickstart test check lint clean

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, not {sys.version}: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	# torch first and by its exact version, so that pip takes a CPU build where it is offered one.
	$(BIN)/pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(INSTALLED)  ## Train, certify and attack a LipNeXt on real digits (KERAS_BACKEND=jax|torch|tensorflow)
	$(BIN)/python examples/quickstart.py

# Two workers: the machines this is run on have two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED)  ## Run all tests on torch, jax and tensorflow in turn
	KERAS_BACKEND=torch $(PYTEST)
	KERAS_BACKEND=jax $(PYTEST) -m "not once"
	KERAS_BACKEND=tensorflow $(PYTEST) -m "not once"

check: $(INSTALLED)  ## Run the quick tests on one backend (BACKEND=torch|jax|tensorflow)
	KERAS_BACKEND=$(BACKEND) $(PYTEST) -m "not slow"

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## Remove the virtual environment and caches
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
