# make demo and make test do all set-up themselves: Python 3.10 to 3.12, a C++ compiler and pip.
# make demo PYTHON=python3 VENV=none uses the packages that are there and needs no network.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

LIBRARY_SOURCES := setup.py pyproject.toml $(wildcard csrc/*/*)
CXX_SOURCES := $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/*.cpp tests/*/*.cpp tests/*/*.h)

ifeq ($(VENV),none)
PY := $(PYTHON)
# One stamp for each Python and torch that the library is built for.
TAG := $(shell $(PYTHON) -c "import sys, torch; print(sys.implementation.cache_tag, torch.__version__, sep='-')")
READY := build/library-$(TAG)
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ultralytics
endif
ULTRALYTICS := ultralytics ultralytics-thop torchvision opencv-python-headless
ULTRALYTICS += polars polars-runtime-32 psutil pyyaml requests urllib3 idna certifi charset-normalizer
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: setup demo test regression mutants static bench bench-cpu sanitize lint clean

setup: $(READY)

demo: setup
	$(PY) -m seaattn_kernels demo $(ARGS)

# On both of two cores, where pytest-xdist is there.
WORKERS = $(shell $(PY) -c "import xdist" 2>/dev/null && echo --numprocesses 2 --dist worksteal -p no:benchmark)

test: setup
	$(PY) -m pytest $(WORKERS) -m "not slow" $(ARGS)

# What a change must not break; then the faults that this must notice, planted one at a time.
regression: setup
	$(PY) -m pytest $(WORKERS) -m slow $(ARGS)

mutants: setup
	$(PY) tests/regression/mutants.py $(ARGS)

static: setup
	$(PY) -m bench static $(ARGS)

bench: setup
	$(PY) -m bench run $(ARGS)

bench-cpu: setup
	$(PY) -m bench cpu $(ARGS)

# The kernels without torch and Python, on each instruction set of x86-64 (or on that of this
# machine), for wrong addresses and undefined behaviour, then for races.
TENSORS := %/operators.cpp %/autograd.cpp %/axial_attention_pair.cpp %/training.cpp
SANITIZED := $(filter-out $(TENSORS),$(wildcard csrc/cpu/*.cpp)) tests/sanitize.cpp
SANITIZE = $(CXX) -std=c++17 -O1 -g -pthread -fopenmp-simd -Wno-psabi -fno-sanitize-recover=all \
	-Icsrc/cpu -I$(shell $(PY) -c "import torch.utils.cpp_extension as c; print(c.include_paths()[0])")
ifeq ($(shell uname -m),x86_64)
ISAS := Baseline/x86-64 Avx2/x86-64-v3 Avx512/x86-64-v4
else
ISAS := Baseline/native
endif

sanitize: setup
	mkdir -p build/sanitize
	$(foreach isa,$(ISAS),$(SANITIZE) -fsanitize=address,undefined -DSEAATTN_ISA=$(patsubst %/,%,$(dir $(isa))) \
		-march=$(notdir $(isa)) $(SANITIZED) -o build/sanitize/$(notdir $(isa)) && \
		build/sanitize/$(notdir $(isa)) && ) true
	$(SANITIZE) -fsanitize=thread -DSEAATTN_ISA=Baseline $(SANITIZED) -o build/sanitize/threads
	build/sanitize/threads

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'import clang_format as c; c.clang_format()' --dry-run -Werror $(CXX_SOURCES)

clean:
	rm -rf build $(filter-out none,$(VENV)) seaattn_kernels.egg-info seaattn_kernels/_C.*.so

# torch comes first: the library is compiled against it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch setuptools ninja
	touch $@

$(VENV)/.library: $(VENV)/.torch $(LIBRARY_SOURCES)
	$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[test,bench,lint]'
	touch $@

# For its tests alone, without what it would add to a torch for CPUs and a machine without a screen.
$(VENV)/.ultralytics: $(VENV)/.library
	$(PIP) --constraint constraints.txt --no-deps $(ULTRALYTICS)
	touch $@

build/library-$(TAG): $(LIBRARY_SOURCES)
	$(PY) setup.py --quiet build_ext --inplace --force
	mkdir -p build && touch $@
