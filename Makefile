# Everything runs in a virtual environment of its own, .venv, made on first use.
PYTHON ?= python3
export KERAS_BACKEND ?= jax
export TF_CPP_MIN_LOG_LEVEL ?= 3
BACKEND ?= torch

BIN := .venv/bin
INSTALLED := .venv/.installed

# Backends whose oldest versions are tested. PyPI has torch 2.6 for Linux with CUDA only: gigabytes.
OLDEST ?= jax torch tensorflow
OLDEST_TESTS := layers manifolds optimizers losses metrics models certification
# Data sets and attacks, which need other backends' packages.
OLDEST_TESTS_NOT := certification/test_batches.py certification/test_attacks.py

.PHONY: help quickstart test check test-oldest lint docs gallery release-check clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

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

# A venv each: TensorFlow 2.18 and JAX 0.8 want different NumPy. The tools are of any version. No
# flags of XLA: at those that it does not know, as TensorFlow 2.18 some of conftest's, it aborts.
.venv-oldest/%/.installed: pyproject.toml tests/oldest.py
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet packaging
	$(@D)/bin/pip install --quiet $$($(@D)/bin/python tests/oldest.py $*) \
	  hypothesis jinja2 matplotlib mpmath pytest pytest-xdist scikit-learn
	touch $@

test-oldest: $(OLDEST:%=.venv-oldest/%/.installed)  ## Run the tests of layers to certificates with the oldest versions promised
	@for backend in $(OLDEST); do \
	  echo "== $$backend"; \
	  PYTHONPATH=. KERAS_BACKEND=$$backend OMP_NUM_THREADS=1 XLA_FLAGS= \
	    .venv-oldest/$$backend/bin/python -m pytest -n 2 --dist worksteal \
	    $(OLDEST_TESTS:%=tests/%) $(OLDEST_TESTS_NOT:%=--ignore=tests/%) || exit 1; \
	done

lint: $(INSTALLED)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A venv of its own: the site is built from the source as text, without Keras or a backend.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --quiet --constraint constraints.txt $$($(PYTHON) -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

docs: .venv-docs/.installed  ## Build the site, build/site/index.html; a link that leads nowhere is an error
	.venv-docs/bin/python docs/_build/pages.py build/docs
	.venv-docs/bin/sphinx-build -q -n -W --keep-going -c docs build/docs build/site

gallery: $(INSTALLED)  ## Run the examples anew for the site's gallery (some ten minutes)
	$(BIN)/python docs/_build/gallery.py

release-check:  ## Build sdist and wheel, and test the wheel in an empty environment (RELEASE_BACKEND=jax)
	PYTHON=$(PYTHON) tests/release.sh

clean:  ## Remove the virtual environments and caches
	rm -rf .venv .venv-oldest .venv-docs runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .jax_cache .tf_cache
