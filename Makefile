# Everything Rayfit needs is in .venv. The two commands to know are `make demo` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPU_STAMP := $(VENV)/.installed-cpu
GPU_VENV := .venv-gpu
GPU_STAMP := $(GPU_VENV)/.installed
BENCH_VENV := .venv-trl
BENCH_STAMP := $(BENCH_VENV)/.installed
PACKAGES := configs transport workers orchestrator recipes
PYTORCH_CPU := https://download.pytorch.org/whl/cpu
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-gpu check install install-gpu bench-setup bench-gpu lock clean

demo: $(CPU_STAMP)  ## train the embedded default on this CPU
	$(BIN)/python -m recipes.grpo

test: $(CPU_STAMP)  ## unit tests, then integration tests on one local Ray cluster
	$(BIN)/pytest tests/unit tests/integration

test-gpu: $(GPU_STAMP)  ## what needs a CUDA device, on one GPU or two; not yet run
	$(GPU_VENV)/bin/pytest tests/gpu

check: $(CPU_STAMP)  ## lint, format, types, layers, size gate and unit tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit

install: $(CPU_STAMP)

install-gpu: $(GPU_STAMP)  ## the CUDA builds, in .venv-gpu: they and the CPU builds share package folders

# torch's CPU build is not on the public package index: pip's configured sources come first, then PyTorch's own.
define install_cpu_lock
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	torch=$$(grep '^torch==' $(2)); \
	  $(1)/bin/pip install --quiet --no-deps "$$torch" \
	  || $(1)/bin/pip install --quiet --no-deps --index-url $(PYTORCH_CPU) "$$torch"
	$(1)/bin/pip install --quiet --no-deps --requirement $(2)
	touch $(3)
endef

$(CPU_STAMP): requirements/cpu.lock
	$(call install_cpu_lock,$(VENV),$<,$@)

$(BENCH_STAMP): requirements/bench.lock
	$(call install_cpu_lock,$(BENCH_VENV),$<,$@)

$(GPU_STAMP): requirements/gpu.lock
	test -x $(GPU_VENV)/bin/python || $(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

bench-setup: $(CPU_STAMP) $(BENCH_STAMP)  ## TRL, in an environment of its own

bench-gpu: $(GPU_STAMP)  ## refits on one GPU or two, beside what others do; not yet run
	$(GPU_VENV)/bin/python -m bench.refit_gpu --json

# uv does not read pip's configuration: it is told where a CPU build of torch is.
CPU_SOURCE = $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--extra-index-url $(PYTORCH_CPU) --index-strategy unsafe-best-match)
COMPILE = $(BIN)/uv pip compile --upgrade --quiet --python-version 3.11 --no-annotate --no-header

lock: $(CPU_STAMP)  ## resolve pyproject.toml into requirements/*.lock
	$(COMPILE) $(CPU_SOURCE) --python-platform x86_64-manylinux_2_28 --extra cpu --extra dev \
	  --overrides requirements/overrides-cpu.txt pyproject.toml --output-file requirements/cpu.lock
	$(COMPILE) --python-platform x86_64-manylinux_2_35 --extra gpu --extra dev \
	  --overrides requirements/overrides-gpu.txt pyproject.toml --output-file requirements/gpu.lock
	$(COMPILE) $(CPU_SOURCE) --python-platform x86_64-manylinux_2_28 \
	  --overrides requirements/overrides-cpu.txt requirements/bench.in --output-file requirements/bench.lock

clean:
	rm -rf $(VENV) $(GPU_VENV) $(BENCH_VENV) .mypy_cache .pytest_cache .ruff_cache
