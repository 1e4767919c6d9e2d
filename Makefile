# Everything Rayfit needs is in .venv; the two commands to know are `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_STAMP := $(VENV)/.installed-cpu
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check unit lock install install-gpu clean

demo: $(CPU_STAMP)
	$(BIN)/python -m recipes.grpo

install: $(CPU_STAMP)

# torch's CPU build is not on the public package index: pip's configured sources are tried first, then PyTorch's own.
$(CPU_STAMP): requirements/cpu.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	torch=$$(grep '^torch==' $<); \
	  $(BIN)/pip install --quiet --no-deps "$$torch" \
	  || $(BIN)/pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu "$$torch"
	$(BIN)/pip install --quiet --no-deps --requirement $<
	touch $@
