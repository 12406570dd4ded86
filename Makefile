# `make ask` answers a question about the sample video, `make test` runs the tests; both set everything up first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUESTION ?= What appears first?
# Threads that wait must not spin: beside other work that makes short operations tens of times slower.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help ask test lint bench card wheel-check clean

help:
	@echo "make ask     set up, then ask the embedded model about the sample video (QUESTION=... to ask something else)"
	@echo "make test    set up with the development tools, then run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   seconds and memory of sampling, and of an answer from a cold start"
	@echo "make card    measure the embedded model again and write its model card"

# Each stamp stands for an installed set of packages, and is as old as what it was installed from.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

ask: $(VENV)/installed
	@$(BIN)/rrvideo ask sample "$(QUESTION)"

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: $(VENV)/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(VENV)/installed
	@$(BIN)/python -m rrvideo.bench sampling
	@$(BIN)/python -m rrvideo.bench ask

card: $(VENV)/installed
	@$(BIN)/python -m rrvideo.tiny.evaluate --card

# A wheel must hold the embedded model: install it elsewhere and ask, from a folder that holds nothing of ours.
wheel-check: $(VENV)/installed-dev
	@rm -rf dist $(VENV)/wheel-check
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/wheel-check/site dist/*.whl
	@mkdir -p $(VENV)/wheel-check/empty
	@cd $(VENV)/wheel-check/empty && PYTHONPATH=../site ../../bin/python -c \
	  'import rrvideo, sys; sys.exit("site" not in rrvideo.__file__ and "not the wheel: " + rrvideo.__file__)'
	@cd $(VENV)/wheel-check/empty && PYTHONPATH=../site ../../bin/python -m rrvideo ask sample "$(QUESTION)"

clean:
	rm -rf $(VENV) dist
