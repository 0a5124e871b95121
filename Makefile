# Everything starts from here: `make demo`, `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# torch stands beside the lock file, since each machine needs its own build of it:
# without a GPU, set TORCH_INDEX to PyTorch's CPU index; with one, leave it empty.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CONFIG ?= jobs/configs/demo.yaml
BIN := $(VENV)/bin

# pip looks into PIP_FIND_LINKS by itself; uv only into UV_FIND_LINKS.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: help setup demo check test test-fast bench lock clean
help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.stamp  ## make the environment (done by the others when needed)

$(VENV)/.stamp: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in [(3, 11), (3, 12)] else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --python $(BIN)/python $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@

demo: setup  ## the whole method on two small models, on this machine
	$(BIN)/python jobs/pipeline.py --config $(CONFIG)

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ray_explain jobs

test: setup  ## all tests that need no GPU and no network
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not gpu and not network"
	$(BIN)/python -m pytest -m "(ray or slow) and not gpu and not network"

test-fast: setup  ## tests of the tensors and tables layers
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not gpu and not network"

bench: setup  ## measured speed, against what one would use otherwise
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_interventions.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_features.py exemplars
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_features.py directions

lock: setup  ## pin the dependencies anew; run where torch resolves to a CPU wheel
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --no-emit-package torch --python-version 3.11 --generate-hashes -o requirements.lock
	! grep -E '^(torch|nvidia-|cuda-|triton)[a-z0-9-]*==' requirements.lock

clean:  ## remove what runs made (not the environment)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache
