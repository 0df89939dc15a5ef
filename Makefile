# What a developer types; CONTRIBUTING.md has the seconds each takes. PYTHON names the environment's.
PYTHON ?= python
export PYTHONPATH := $(CURDIR)

build:  ## the CPU module with all instruction sets, and the CUDA module where there is a toolkit
	$(PYTHON) setup.py -q build_ext --inplace
build-fast:  ## one instruction set (FASTKD_ISA, else avx512), no CUDA: while editing csrc/cpu
	FASTKD_CUDA=0 FASTKD_ISA=$${FASTKD_ISA:-avx512} $(PYTHON) setup.py -q build_ext --inplace
quick:  ## a minute: one test of every kind, no emulation
	FASTKD_EMULATION=0 $(PYTHON) -m pytest -q -n auto tests/losses/test_options.py tests/definition/test_spec.py tests/api/test_arguments.py
test:  ## everything that needs no GPU
	$(PYTHON) -m pytest -q -n auto --dist loadgroup
emulate:  ## the CUDA kernels, compiled for the CPU
	$(PYTHON) -m pytest -q -n auto -k emulated
triton:  ## the Triton kernels in the interpreter
	TRITON_INTERPRET=1 FASTKD_EMULATION=0 $(PYTHON) -m pytest -q -n auto -k triton
gate:  ## the machine code of both GPU backends against the committed tables
	$(PYTHON) -m pytest -q tests/cuda_kernels/test_gate.py tests/triton_kernels/test_aot.py
lint:
	.ci/lint
bench:  ## a quarter of an hour on an idle machine
	$(PYTHON) -m benchmarks
ci:
	.ci/run
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/:/'

.PHONY: build build-fast quick test emulate triton gate lint bench ci help
