# SPDX-License-Identifier: MIT
#
#   make run           generate text from the committed model with a quarter of its experts resident
#   make test          all tests, upstream's conformance programs included; fails on a skip that tests/skips.py does not name
#   make test-fast     the inner loop: logic, the C API, commands, and one model against stock; under two minutes
#   make conformance   only upstream's conformance programs
#   make machines      paged against stock on processors that Debian's qemu-user emulates, x86-64 and Arm
#   make bench         decode and prefill speed, paged against stock
#   make lint          ruff, mypy, clang-format
#   make docs          the site of docs/, into build/docs; fails on a broken link
#   make fuzz          10,000 damaged inputs of each kind (FUZZ="--seed 2 --only gguf"); minutes
#   make sanitize      the native tests with ASan and UBSan, then with TSan (SANITIZE=address); builds llama.cpp again
#   make soak          everything at once for SOAK_MINUTES=20, logits compared with stock's (SOAK="--only forks")
#   make clean         remove what was built, except the downloaded llama-cpp-python and its wheel
#
# Each target first sets up what it needs in .venv and build/. The machine needs Python 3.11 or newer with venv, a C and
# C++ compiler, and make. The first set-up takes minutes, since it compiles llama-cpp-python; later ones take seconds.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := run
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
MODEL  ?= models/tiny-moe-q8_0.gguf
PROMPT ?= In the beginning
SOAK_MINUTES ?= 20

VENV    := .venv
PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check --no-input
VERSION := $(shell sed -n 's/^LLAMA_CPP_PYTHON = "\([^"]*\)".*/\1/p' rotary_llamacpp/pinned.py)
SDIST   := build/sdist/llama_cpp_python-$(VERSION)
WHEELS  := build/wheel-$(VERSION)
LIBRARY := rotary_llamacpp/lib/libggml-rotary.so
NATIVE  := CMakeLists.txt $(shell find native -type f)

# Exported for the pip that builds wheels and for tests that run the build again.
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

.PHONY: run test test-fast conformance machines bench lint docs fuzz sanitize soak clean setup programs

run: setup
	$(VENV)/bin/rotary run $(MODEL) -p "$(PROMPT)" -n 64 --budget 25% --temp 0.8 --seed 1

test: setup programs $(VENV)/.docs
	$(PY) -m pytest --named-skips

test-fast: setup
	$(PY) -m pytest -q -m "not slow" tests/unit tests/native tests/docs tests/cli/test_cli.py tests/model/test_exactness.py::test_tiny_model

conformance: setup programs
	$(PY) -m pytest -m conformance

# Builds llama.cpp twice (about twenty minutes of one core), then runs for minutes. MACHINES selects machines by name.
machines: $(VENV)/.made $(SDIST)/PKG-INFO
	@$(PY) -m tests.machines.run $(SDIST)/vendor/llama.cpp $(MACHINES)

bench: setup
	$(PY) benchmarks/decode.py $(MODEL)

lint: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(find native/src tests -name '*.[ch]' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.cu')

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict --clean
	@echo "build/docs/index.html"

fuzz: setup
	$(PY) -m tests.fuzz.run $(FUZZ)

sanitize: setup programs
	$(PY) -m tests.sanitize.run $(SANITIZE)

soak: setup
	$(PY) -m tests.soak.run --minutes $(SOAK_MINUTES) $(SOAK)

clean:
	rm -rf $(VENV) build/docs build/native build/sanitize build/conformance build/machines build/bdist.* rotary_llamacpp/lib rotary_llamacpp/include
	rm -rf *.egg-info .hypothesis .pytest_cache .mypy_cache .ruff_cache
	find rotary_llamacpp models tests -name __pycache__ -prune -exec rm -rf {} +

# ---- set up --------------------------------------------------------------------------------------------------------

setup: $(LIBRARY)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON): Python 3.11 or newer is needed; set PYTHON to one: make PYTHON=python3.12" >&2; exit 2; }
	@command -v "$${CC:-cc}" > /dev/null && command -v "$${CXX:-c++}" > /dev/null \
	    || { echo "no C and C++ compiler ($${CC:-cc}, $${CXX:-c++}) found; install one (Debian: g++), or set CC and CXX" >&2; exit 2; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) > /dev/null 2>&1 || $(PYTHON) -m virtualenv -q $(VENV) > /dev/null 2>&1 \
	    || { rm -rf $(VENV); echo "$(PYTHON): it has no venv module; install it (Debian: python3-venv), or virtualenv" >&2; exit 2; }
	@$(PIP) install -q "setuptools>=77" "cmake>=3.18" ninja "pytest>=8"
	@touch $@

$(SDIST)/PKG-INFO: | $(VENV)/.made
	@$(PY) setup.py -q llama_cpp > /dev/null

# In a build directory of its own, so that an interrupted build resumes.
$(WHEELS)/.made: | $(SDIST)/PKG-INFO
	@CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF $${CMAKE_ARGS:-}" \
	    $(PY) .ci/progress.py "llama-cpp-python $(VERSION)" build/llama-cpp-python.log \
	    $(PIP) wheel -v --no-deps -w $(WHEELS) --config-settings build-dir=$(CURDIR)/build/llama-cpp-python $(SDIST)
	@rm -rf build/llama-cpp-python
	@touch $@

$(VENV)/.installed: $(VENV)/.made $(WHEELS)/.made setup.py pyproject.toml rotary_llamacpp/pinned.py
	@$(PIP) install -q $(WHEELS)/llama_cpp_python-$(VERSION)-*.whl
	@$(PY) .ci/progress.py rotary-llamacpp build/rotary-llamacpp.log $(PIP) install -v --no-build-isolation -e ".[test]"
	@touch $@

$(LIBRARY): $(VENV)/.installed $(NATIVE)
	@$(PY) .ci/progress.py libggml-rotary.so build/native.log $(PY) setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	@$(PIP) install -q --no-build-isolation -e ".[dev]"
	@touch $@

# Not the package, which takes minutes to build.
$(VENV)/.docs: $(VENV)/.made pyproject.toml
	@$(PIP) install -q $$($(PY) -c 'import tomllib; \
	    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

# ---- upstream's programs for the conformance tests -----------------------------------------------------------------

programs: build/conformance/.made

build/conformance/.made: $(VENV)/.made tests/conformance/CMakeLists.txt tests/support/llama_cpp.cmake $(wildcard tests/conformance/*.c) rotary_llamacpp/pinned.py | $(SDIST)/PKG-INFO
	@$(PY) .ci/progress.py "conformance programs" build/conformance.log $(SHELL) -euc '\
	    rm -f build/conformance/CMakeCache.txt; \
	    $(VENV)/bin/cmake -S tests/conformance -B build/conformance -G Ninja -DCMAKE_BUILD_TYPE=Release \
	        -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" -DROTARY_LLAMA_CPP_DIR="$(CURDIR)/$(SDIST)/vendor/llama.cpp"; \
	    $(VENV)/bin/cmake --build build/conformance'
	@touch $@
