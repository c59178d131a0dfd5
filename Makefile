# One line for a newcomer: `make picture` draws, `make test` checks. Both set up a virtual environment first.
PYTHON ?= python3
VENV   ?= .venv
# The pinned release is the one the suite runs on; a CPU build of it is enough. PIP_ARGS passes options to pip,
# for instance the index that carries PyTorch's CPU builds.
TORCH  ?= torch==2.13.0
PIP_ARGS ?=
PROMPT ?= a red circle left of a blue star on a green striped background
SIZE   ?= 4096
# the picture of README
SEED   ?= 7

BIN := $(VENV)/bin

# test files run side by side in so many processes, each with its share of the cores
WORKERS ?= 2

.PHONY: picture test lint clean

picture: $(VENV)/.user
	$(BIN)/gensparse generate "$(PROMPT)" --size $(SIZE) --seed $(SEED)

test: $(VENV)/.dev
	$(BIN)/python -P -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) "$(TORCH)"
	touch $@

$(VENV)/.user: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	touch $@ $(VENV)/.user

clean:
	rm -rf $(VENV) build dist gensparse.egg-info
