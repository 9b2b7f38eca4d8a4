# The habits of the house, by name; `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
SYSTEM ?=
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
ARGS ?=
BENCH ?= optimizers losses
DIST ?= dist
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH ?= torch==2.11.0
RESULTS ?= build/gpu
PARTS ?= test slow bench sanitize profile
TESTS ?=
JOBS ?=
MINUTES ?=
WORKERS ?= 2
CUDA_NVCC ?= nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-crt==13.0.*

ifeq ($(SYSTEM),1)
# Everything runs by this Python with its own torch. Nothing is installed, so the sources are found by their path.
RUN := $(PYTHON)
PYTEST := $(RUN) -m pytest
TORCH_READY :=
TOOLS_READY :=
CLIENTS_READY :=
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export TORCH_CUDA_ARCH_LIST ?= native
else
RUN := $(VENV)/bin/python
# Files side by side. Threads that wait for work must not take a core from the other file's.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest -n $(WORKERS) --dist loadfile
TORCH_READY := $(VENV)/.ready-$(TORCH)
TOOLS_READY := $(VENV)/.ready-tools
CLIENTS_READY := $(VENV)/.ready-clients
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# For a part of gpu-check.
GPU = --results '$(RESULTS)' $(if $(MINUTES),--minutes $(MINUTES))
# The tests that run on a GPU, or on the device that is emulated; those outside tests/cuda run on the CPU too.
ON_A_DEVICE = tests/cuda $(addprefix tests/test_,adafactor.py tail.py state_dtype.py code8.py precision.py stats.py) $(addprefix tests/test_losses_,cross_entropy.py linear.py pointwise.py)
CXX_FILES = $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.h csrc/*/*/*.cpp tests/cpp/*.h tests/cpp/*.cpp tests/simt/*.h tests/simt/*.cpp tests/simt/*/*.h tests/simt/*/*.cpp)

# command || $(FAIL) "what to do"
FAIL := sh -c 'printf "\n%s\n\n" "$$1" >&2; exit 1' fail
PIP_FAILED := $(FAIL) "pip could not install what is needed. Is there a network connection? Behind a proxy set HTTPS_PROXY; for a mirror set PIP_INDEX_URL."

.DEFAULT_GOAL := help
.PHONY: help demo test clients emulated bench lint format wheel cuda-check oldest sanitize clean build
.PHONY: gpu-check gpu-test gpu-bench gpu-sanitize gpu-profile

help:
	@echo 'make demo       train a small network on real digits, with trainopt and with torch.optim'
	@echo 'make test       run the whole test suite'
	@echo 'make clients    run the tests inside Transformers, Accelerate, Lightning, timm, PEFT, Ignite and FSDP2'
	@echo 'make emulated   run the GPU tests, on a device that is emulated on the CPU'
	@echo 'make bench      time optimizer steps and losses against torch'
	@echo 'make lint       check with ruff, clang-format and mypy'
	@echo 'make format     let ruff and clang-format rewrite the sources'
	@echo 'make wheel      build a wheel for the torch in $(VENV), into $(DIST)/'
	@echo 'make cuda-check build with CUDA in $(CUDA_VENV), GPU or not, run the tests there, and build a wheel into dist/cuda/'
	@echo 'make oldest     run the tests with the oldest torch that trainopt takes, in $(OLDEST_VENV)'
	@echo 'make sanitize   run the C++ tests under Address-, UndefinedBehavior- and ThreadSanitizer, and fuzz the losses'
	@echo 'make gpu-check  on a machine with a GPU: the parts below, or those in PARTS'
	@echo 'make gpu-test       the tests, with a process for each file'
	@echo 'make gpu-bench      times against torch'
	@echo 'make gpu-sanitize   the kernels under compute-sanitizer'
	@echo 'make gpu-profile    the kernels under ncu'
	@echo 'make clean      remove what was built'
	@echo
	@echo 'Each sets up what it needs in $(VENV), and rebuilds only what has changed. Variables:'
	@echo '  ARGS="..."           handed on to demo, test, clients, emulated, bench, sanitize, oldest, cuda-check and a part of gpu-check'
	@echo '  SYSTEM=1             use $(PYTHON) with the torch that is there and install nothing; tests whose packages are missing'
	@echo '                       are skipped, and CUDA kernels are built for the GPU at hand; for build, test, emulated, bench, gpu-*'
	@echo '  RESULTS=build/gpu    where gpu-check and its parts leave logs and JSON'
	@echo '  TESTS="..." JOBS=6   the files that gpu-test and gpu-sanitize run, and how many at once'
	@echo '  MINUTES=9            ends a part of gpu-check, with a table of what is done'
	@echo '  WORKERS=2            how many files of tests run side by side'
	@echo '  BENCH=losses         which benchmarks to run; both without it'
	@echo '  PYTHON=python3       makes the environment; 3.11 or newer'
	@echo '  VENV=.venv           where the environment is'
	@echo '  TORCH=torch==2.13.0  what pip installs as torch'
	@echo '  TORCH_INDEX=URL      where from; https://download.pytorch.org/whl/cpu has torch without CUDA, a far smaller download'
	@echo '  CXX=c++  MAX_JOBS=2  the compiler, and how many run at once'
	@echo '  TRAINOPT_CUDA=0      never build with CUDA; 1: or fail; without it where torch has CUDA and nvcc is found'
	@echo '  TORCH_CUDA_ARCH_LIST="8.6 9.0+PTX"   the GPUs to build for'

demo: build $(TOOLS_READY)
	$(RUN) -m benchmarks.twin $(ARGS)

test: build $(TOOLS_READY)
	$(PYTEST) $(ARGS)

clients: build $(TOOLS_READY) $(CLIENTS_READY)
	$(PYTEST) tests/clients $(ARGS)

# -P: else the package in this directory comes before the emulated one.
emulated: build $(TOOLS_READY)
	@$(RUN) -m tools.emulate
	PYTHONPATH=build/emulated:. $(subst -m pytest,-P -m pytest,$(PYTEST)) $(ON_A_DEVICE) --emulated $(ARGS)

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

# From PyPI, where torch has only its build for CUDA.
oldest: export TRAINOPT_CUDA = 0
oldest:
	@test -e '$(OLDEST_VENV)/.ready-$(OLDEST_TORCH)' || PYTHON='$(PYTHON)' .ci/torch-without-cuda '$(OLDEST_VENV)' '$(OLDEST_TORCH)' || $(PIP_FAILED)
	@$(MAKE) --no-print-directory VENV='$(OLDEST_VENV)' TORCH='$(OLDEST_TORCH)' test

gpu-check gpu-test gpu-bench gpu-sanitize gpu-profile: export TRAINOPT_CUDA = 1

gpu-check: build $(TOOLS_READY)
	$(RUN) -m tools.gpu_check --results '$(RESULTS)' --parts $(PARTS)

gpu-test: build $(TOOLS_READY)
	$(RUN) -m tools.gpu_test $(GPU) $(if $(JOBS),--jobs $(JOBS)) $(TESTS) -- $(ARGS)

gpu-bench: build $(TOOLS_READY)
	$(RUN) -m benchmarks.gpu $(GPU) $(ARGS)

gpu-sanitize: build $(TOOLS_READY)
	$(RUN) -m tools.gpu_sanitize $(GPU) $(if $(JOBS),--jobs $(JOBS)) $(TESTS) -- $(ARGS)

gpu-profile: build $(TOOLS_READY)
	$(RUN) -m tools.gpu_profile $(GPU) $(ARGS)

sanitize: build $(TOOLS_READY)
	$(RUN) -m tools.sanitize $(ARGS)

clean:
	rm -rf build dist trainopt.egg-info trainopt/_build.py trainopt/_C.*.so

# setup.py knows what has changed.
build: $(TORCH_READY)
	@$(RUN) setup.py -q build_ext --inplace

$(TOOLS_READY): pyproject.toml $(TORCH_READY) | build
	@echo 'Installing trainopt (editable), and the tools for its demo and tests, in $(VENV)'
	@$(PIP) install -q --no-build-isolation -e '.[demo,test,bench,dev]' || $(PIP_FAILED)
	@touch '$@'

$(CLIENTS_READY): pyproject.toml $(TOOLS_READY)
	@$(PIP) install -q --no-build-isolation -e '.[clients]' || $(PIP_FAILED)
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
