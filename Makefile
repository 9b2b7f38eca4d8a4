# The habits of the house, by name; `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
BENCH ?= optimizers losses
DIST ?= dist
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
CUDA_NVCC ?= nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-crt==13.0.*

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
TORCH_READY := $(VENV)/.ready-$(TORCH)
TOOLS_READY := $(VENV)/.ready-tools
CXX_FILES = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu tests/cpp/*.h tests/cpp/*.cpp tests/simt/*.h tests/simt/*.cpp)

# command || $(FAIL) "what to do"
FAIL := sh -c 'printf "\n%s\n\n" "$$1" >&2; exit 1' fail
PIP_FAILED := $(FAIL) "pip could not install what is needed. Is there a network connection? Behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL."

.DEFAULT_GOAL := help
.PHONY: help demo test emulated bench lint format wheel cuda-check sanitize gpu-check gpu-sanitize clean build

help:
	@echo 'make demo       train a small network on real digits, with trainopt and with torch.optim'
	@echo 'make test       run the whole test suite'
	@echo 'make emulated   run the GPU tests, on a device that is emulated on the CPU'
	@echo 'make bench      time optimizer steps and losses against torch'
	@echo 'make lint       check with ruff, clang-format and mypy'
	@echo 'make format     let ruff and clang-format rewrite the sources'
	@echo 'make wheel      build a wheel for the torch in $(VENV), into $(DIST)/'
	@echo 'make cuda-check build with CUDA in $(CUDA_VENV), GPU or not, run the tests there, and build a wheel into dist/cuda/'
	@echo 'make sanitize   run the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer'
	@echo 'make gpu-check  on a machine with a GPU: run all tests there, then time it against torch'
	@echo 'make gpu-sanitize   run the GPU tests under compute-sanitizer'
	@echo 'make clean      remove what was built'
	@echo
	@echo 'Each sets up what it needs in $(VENV), and rebuilds only what has changed. Variables:'
	@echo '  ARGS="..."           handed on to demo, test, emulated, bench and cuda-check'
	@echo '  BENCH=losses         which benchmarks to run; both without it'
	@echo '  PYTHON=python3       makes the environment; 3.11 or newer'
	@echo '  VENV=.venv           where the environment is'
	@echo '  TORCH=torch==2.13.0  what pip installs as torch'
	@echo '  TORCH_INDEX=URL      where from; https://download.pytorch.org/whl/cpu has torch without CUDA, a far smaller download'
	@echo '  CXX=c++  MAX_JOBS=2  the compiler, and how many run at once'
	@echo '  TRAINOPT_CUDA=0      never build with CUDA; 1: or fail; without it where torch has CUDA and nvcc is found'
	@echo '  TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX"   the GPUs to build for'

demo: build $(TOOLS_READY)
	$(RUN) -m trainopt train digits --compare $(ARGS)

test: build $(TOOLS_READY)
	$(RUN) -m pytest $(ARGS)

# -P: else the package in this directory comes before the emulated one.
emulated: $(TOOLS_READY)
	@$(RUN) setup.py -q emulate
	PYTHONPATH=build/emulated:. $(RUN) -P -m pytest tests/cuda --emulated $(ARGS)

bench: build $(TOOLS_READY)
	for name in $(BENCH); do $(RUN) -m benchmarks.$$name $(ARGS) || exit 1; done

lint: $(TOOLS_READY)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(VENV)/bin/mypy trainopt

format: $(TOOLS_READY)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/clang-format -i $(CXX_FILES)

wheel: $(TORCH_READY)
	rm -rf build/lib* build/bdist*
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir $(DIST) .
	@du -h $(DIST)/*.whl

# nvcc comes from PyPI where the machine has none.
cuda-check: export TRAINOPT_CUDA = 1
cuda-check: CUDA_MAKE = $(MAKE) --no-print-directory VENV='$(CUDA_VENV)' TORCH='$(CUDA_TORCH)'
cuda-check:
	@$(CUDA_MAKE) '$(CUDA_VENV)/.ready-$(CUDA_TORCH)'
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || $(CUDA_VENV)/bin/python -m pip install -q $(CUDA_NVCC) || $(PIP_FAILED)
	@$(CUDA_MAKE) build
	@$(CUDA_MAKE) wheel DIST=dist/cuda
	@$(CUDA_MAKE) test
	$(CUDA_VENV)/bin/python -m trainopt

gpu-check: build $(TOOLS_READY)
	$(RUN) -m pytest tests/cuda --gpu $(ARGS)
	$(RUN) -m pytest --ignore tests/cuda $(ARGS)
	$(RUN) -m benchmarks.gpu

# Without torch's cache each tensor is an allocation of its own, whose bounds are watched; graphs need the cache.
gpu-sanitize: build $(TOOLS_READY)
	@command -v compute-sanitizer >/dev/null || $(FAIL) "There is no compute-sanitizer: it is a part of the CUDA toolkit."
	for tool in memcheck racecheck synccheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(RUN) -m pytest tests/cuda --gpu -m 'not slow' --ignore tests/cuda/test_graphs.py $(ARGS) || exit 1; done

sanitize: $(TORCH_READY)
	$(RUN) setup.py -q sanitize

clean:
	rm -rf build dist trainopt.egg-info trainopt/_build.py trainopt/_C.*.so

# setup.py knows what has changed.
build: $(TORCH_READY)
	@$(RUN) setup.py -q build_ext --inplace

$(TOOLS_READY): pyproject.toml $(TORCH_READY) | build
	@echo 'Installing trainopt (editable), and the tools for its demo and tests, in $(VENV)'
	@$(PIP) install -q --no-build-isolation -e '.[demo,test,bench,dev]' || $(PIP_FAILED)
	@touch '$@'

$(TORCH_READY):
	@command -v '$(PYTHON)' >/dev/null || $(FAIL) "There is no $(PYTHON): install Python 3.11 or newer, or name one, as in 'make PYTHON=python3.12'."
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || $(FAIL) "$(PYTHON) is too old: trainopt needs Python 3.11 or newer. Name one, as in 'make PYTHON=python3.12'."
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || $(FAIL) "$(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)."
	@for name in $${CXX:-c++ g++ clang++}; do command -v $$name >/dev/null && exit 0; done; $(FAIL) "There is no C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)."
	@echo 'Setting up $(VENV) with $(TORCH)'
	@'$(PYTHON)' -m venv '$(VENV)'
	@$(PIP) install $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') '$(TORCH)' numpy 'setuptools>=77' wheel || $(PIP_FAILED)
	@rm -f $(VENV)/.ready-torch*
	@touch '$@'
