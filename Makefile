# make bench   venv, install, validate + bench + report on a small model: the tour of the project
# make gpu     on a GPU: build the kernels, test, sanitize and measure; ARGS="--minutes 8", ARGS=--dry-run
# make test    venv, install, the whole test suite
# make lint    ruff and mypy --strict
# make clean   removes what the above made
#
# Only make and a Python >= 3.10 are needed. Choose the interpreter with `make test PYTHON=python3.12`, pass arguments to
# pytest with `make test ARGS="-k mvue -x"`.

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
RUNS ?= runs/bench

# The first interpreter that is new enough and can make a virtual environment with pip in it. (Debian splits ensurepip off
# into python3-venv; pyenv leaves shims on the path for versions that are not active: so each candidate is asked.)
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(CANDIDATES); do "$$p" -c '$(USABLE)' >/dev/null 2>&1 && echo "$$p" && break; done)

# Where nvcc is but no GPU, an installation would compile kernels for minutes that nothing here can run: the suite compiles
# by itself the few that it simulates.
ifeq ($(wildcard /dev/nvidiactl),)
export SDGP_CUDA ?= 0
endif

.PHONY: bench gpu test lint clean

bench: $(VENV)/.installed-bench
	$(BIN)/sdgp doctor
	$(BIN)/sdgp validate digits --batch 64
	$(BIN)/sdgp train
	$(BIN)/sdgp bench digits --batch 64 --json $(RUNS)/digits.json --html $(RUNS)/digits.html
	$(BIN)/sdgp bench resnet9 --batch 8 --json $(RUNS)/resnet9.json --html $(RUNS)/resnet9.html

# The install builds no kernels: the suite does, for this GPU alone.
gpu:
	SDGP_CUDA=0 $(MAKE) $(VENV)/.installed-dev
	$(BIN)/python -m bench.suite $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# --no-compile: byte-compiling torch's thousands of files up front costs a minute that most runs never get back.
$(VENV)/.installed-dev: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --editable '.[vision,report,kernels,dev]'
	touch $@ $(VENV)/.installed-bench

$(VENV)/.installed-bench: pyproject.toml setup.py | $(BIN)/python
	$(BIN)/python -m pip install --no-compile --editable '.[vision,report]'
	touch $@

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No usable Python among: $(CANDIDATES)."; \
	  echo "Needed: Python >= 3.10 with the venv and ensurepip modules. On Debian or Ubuntu: apt-get install python3-venv"; \
	  exit 1; fi
	$(PYTHON) -c '$(USABLE)' || { echo "$(PYTHON): not Python >= 3.10 with venv and ensurepip"; exit 1; }
	$(PYTHON) -m venv $(VENV)
