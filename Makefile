# Everything sets itself up: the first call makes a virtual environment in $(VENV), later ones reuse it.
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise the first of the names below that is
# Python 3.11 or newer and can make environments.

VENV ?= .venv
PARITY_VENV ?= .cache/parity
COMPILERS ?= .cache/compilers
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& command -v $$p && break; done)
# Byte code is half of pip's time. The demo does without, since Python makes what it imports; the tests
# need it, as warnings while it is made would be their errors, and on all cores it takes half as long.
# What Python cannot compile in others' packages nobody imports.
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check --no-compile
COMPILE_ALL = -W ignore -m compileall -q -j 0 -x /tests/
PYTEST_ARGS ?=

.PHONY: help demo test slow lint types parity cuda compile clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     fine-tune a 135M model in 4 bits on this machine's CPU, before and after"
	@echo "make test     the tests that need no torch"
	@echo "make slow     the tests that make test leaves out: resumed and killed runs, simulated CUDA"
	@echo "make lint     ruff: rules and formatting"
	@echo "make types    pyright"
	@echo "make parity   comparisons with bitsandbytes, transformers and PEFT (installs torch)"
	@echo "make cuda     build the CUDA kernels with nvcc, no GPU needed"
	@echo "make compile  train step and kernels through the TPU and GPU compilers, without either device"
	@echo "make clean    remove the environments and caches"

demo: $(VENV)/.demo
	$(VENV)/bin/qlora-jax demo

# Two workers: the time goes into compiling, which one process does on about one core. Files with few
# tests take longest among the slow ones and in parity, and are not to come last as they would by number.
test: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests --ignore=tests/parity -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest tests --ignore=tests/parity -m slow -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/pyright

parity: $(PARITY_VENV)/.parity
	$(PARITY_VENV)/bin/python -m pytest tests/parity -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

cuda: $(COMPILERS)/.cuda
	$(VENV)/bin/python -m tests.compile.ptxas $(COMPILERS)/cuda.log

compile: $(COMPILERS)/.tpu $(COMPILERS)/.gpu $(COMPILERS)/.cuda
	$(VENV)/bin/python -m tests.compile.run $(COMPILERS)

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(COMPILERS) .pytest_cache .ruff_cache .hypothesis

# One stamp for each set of packages; pyproject.toml newer than a stamp installs again.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with the venv module was found;" \
	  "install one (Debian: apt install python3-venv) or pass PYTHON=/path/to/python." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "Installing qlora-jax and what the demo needs into $(VENV); a minute or two the first time"
	@$(VENV)/bin/python $(PIP_INSTALL) -e '.[hf,cli]'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo "Installing qlora-jax and what its tests need into $(VENV); a few minutes the first time"
	@$(VENV)/bin/python $(PIP_INSTALL) -e '.[all,test]'
	@$(VENV)/bin/python $(COMPILE_ALL) $(VENV)/lib || true
	@touch $@ $(VENV)/.demo

$(VENV)/.dev: $(VENV)/.test
	@echo "Installing ruff and pyright into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) -e '.[all,dev]'
	@touch $@

$(PARITY_VENV)/.parity: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer was found; pass PYTHON=..." >&2; exit 1; }
	@echo "Installing torch, transformers, PEFT and bitsandbytes into $(PARITY_VENV); minutes the first time"
	@test -x $(PARITY_VENV)/bin/python || $(PYTHON) -m venv $(PARITY_VENV)
	@$(PARITY_VENV)/bin/python $(PIP_INSTALL) -e '.[all,test,parity]'
	@$(PARITY_VENV)/bin/python $(COMPILE_ALL) $(PARITY_VENV)/lib || true
	@touch $@

# The compilers stay outside $(VENV): a JAX that finds them there would look for their devices.
$(COMPILERS)/.tpu: $(VENV)/.test
	@echo "Installing the TPU compiler (libtpu) into $(COMPILERS)/tpu"
	@$(VENV)/bin/python $(PIP_INSTALL) --upgrade --target $(COMPILERS)/tpu --no-deps libtpu
	@touch $@

$(COMPILERS)/.gpu: $(VENV)/.test
	@echo "Installing the GPU compiler (JAX's CUDA plugin and ptxas) into $(COMPILERS)/gpu"
	@version=$$($(VENV)/bin/python -c 'import jax; print(jax.__version__)'); \
	$(VENV)/bin/python $(PIP_INSTALL) --upgrade --target $(COMPILERS)/gpu --no-deps \
	  jax-cuda13-plugin==$$version jax-cuda13-pjrt==$$version \
	  nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
	@touch $@

# As `pip install ./cuda_ext` builds them, but beside $(VENV). Without nvcc on the machine, NVIDIA's
# own packages bring it.
$(COMPILERS)/.cuda: $(VENV)/.test $(shell find cuda_ext -name '*.c*' -o -name '*.h' -o -name '*.toml' -o -name '*.txt' -o -name '*.py')
	@mkdir -p $(COMPILERS)
	@command -v nvcc >/dev/null || test -x /usr/local/cuda/bin/nvcc || test -d $(COMPILERS)/nvcc || { \
	  echo "No nvcc found: installing NVIDIA's compiler into $(COMPILERS)/nvcc"; \
	  $(VENV)/bin/python $(PIP_INSTALL) --target $(COMPILERS)/nvcc --no-deps nvidia-cuda-nvcc \
	    nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl; }
	@echo "Building the CUDA kernels into $(COMPILERS)/cuda; two minutes, log in $(COMPILERS)/cuda.log"
	@toolkit=$$(echo $(abspath $(COMPILERS))/nvcc/nvidia/cu*); \
	if test -d "$$toolkit"; then export CUDACXX=$$toolkit/bin/nvcc; fi; \
	$(VENV)/bin/python -m pip install --verbose --disable-pip-version-check --upgrade --no-deps \
	  --target $(COMPILERS)/cuda ./cuda_ext > $(COMPILERS)/cuda.log 2>&1 \
	  || { grep -iE "error" -A5 $(COMPILERS)/cuda.log | head -40; exit 1; }
	@touch $@
