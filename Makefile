# Everything starts from here: `make demo`, `make test`. `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# torch stands beside the lock file, since each machine needs its own build of it:
# without a GPU, set TORCH_INDEX to PyTorch's CPU index; with one, leave it empty.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CONFIG ?= jobs/configs/demo.yaml
RUN ?= runs/demo
BIN := $(VENV)/bin
PEERS := transformer_lens==4.3.0 pyvene==0.1.8 datasets dill multiprocess xxhash beartype better_abc fancy_einsum \
	transformers_stream_generator wandb sentencepiece typeguard matplotlib contourpy cycler fonttools kiwisolver pyparsing
# The cluster of `make cluster-up`: this machine, or what a file such as cluster.yaml describes.
CLUSTER ?=
PORT ?= 6379
DASHBOARD_PORT ?= 8265
JOB ?= jobs/pipeline.py
ARGS ?=
SEEDS ?= 1 2 3 4 5
# At least four: on fewer, training workers leave none for the tasks beside them.
CPUS ?= $(shell n=$$(nproc); echo $$((n > 4 ? n : 4)))
# Ray then listens on 127.0.0.1 alone, as it does on macOS; on Linux it would open most of its ports to the network.
ON_LOOPBACK := RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# A tenth of the memory, up to 2 GB: we stream, Ray's default takes 30 %.
OBJECT_STORE ?= $(shell awk '/MemTotal/ {b = $$2 * 102; print (b > 2e9) ? 2000000000 : int(b)}' /proc/meminfo)

# pip looks into PIP_FIND_LINKS by itself; uv only into UV_FIND_LINKS.
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif

.PHONY: help setup demo check test test-long cluster-test test-fast bench lock clean cluster-up cluster-down cluster-status submit token chaos dashboard
help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.stamp  ## make the environment (done by the others when needed)

$(VENV)/.stamp: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v in [(3, 11), (3, 12)] else f"Python 3.11 or 3.12 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install -q --python $(BIN)/python --no-deps -e .
	touch $@

# Recipes take what a user gives from the environment: nothing of it is read as shell code.
cluster-up cluster-down cluster-status submit token: export RAY_AUTH_MODE := token
cluster-up cluster-down cluster-status submit: export RAY_USAGE_STATS_ENABLED := 0
cluster-up cluster-down cluster-status dashboard: export CLUSTER := $(CLUSTER)
cluster-up dashboard: export DASHBOARD_PORT := $(DASHBOARD_PORT)
cluster-up cluster-status: export PORT := $(PORT)
cluster-up: export CPUS := $(CPUS)
cluster-up: export OBJECT_STORE := $(OBJECT_STORE)
cluster-status submit: export RAY_API_SERVER_ADDRESS ?= http://127.0.0.1:$(DASHBOARD_PORT)
submit: export JOB := $(JOB)
demo submit: export CONFIG := $(CONFIG)
submit: export ARGS := $(ARGS)
dashboard: export RUN := $(RUN)
chaos: export SEEDS := $(SEEDS)

demo: setup  ## the whole method on two small models, on this machine
	$(BIN)/python jobs/pipeline.py --config "$$CONFIG"

token: setup
	@umask 077; test -s ~/.ray/auth_token || $(BIN)/ray get-auth-token --generate >/dev/null; test ! -e ~/.ray/auth_token || chmod 600 ~/.ray/auth_token

cluster-up: token  ## a Ray cluster: this machine, or CLUSTER=cluster.yaml
ifeq ($(CLUSTER),)
	PATH="$(abspath $(BIN)):$$PATH" RAY_TRAIN_ENABLE_STATE_TRACKING=1 $(ON_LOOPBACK) $(BIN)/ray start --head --port="$$PORT" \
		--dashboard-host=127.0.0.1 --dashboard-port="$$DASHBOARD_PORT" --dashboard-agent-listen-port=0 \
		--num-cpus="$$CPUS" --object-store-memory="$$OBJECT_STORE"
else
	$(BIN)/python -m ray_explain.distributed.cluster_file "$$CLUSTER"
	$(BIN)/ray up --yes "$$CLUSTER"
endif

cluster-down: setup  ## end it
ifeq ($(CLUSTER),)
	$(BIN)/ray stop
else
	$(BIN)/ray down --yes "$$CLUSTER"
endif

cluster-status: setup  ## its nodes, what is in use, and its jobs
ifeq ($(CLUSTER),)
	$(ON_LOOPBACK) $(BIN)/ray status --address="127.0.0.1:$$PORT"
	$(BIN)/ray job list
else
	$(BIN)/ray exec "$$CLUSTER" "RAY_AUTH_MODE=token ray status"
endif

submit: setup  ## run JOB=jobs/pipeline.py with CONFIG=... there; more arguments in ARGS
	set -ef; folder=$$(mktemp -d); trap 'rm -r "$$folder"' EXIT; $(BIN)/python -m ray_explain.distributed.upload "$$folder/code.zip"; \
		$(BIN)/ray job submit --working-dir "$$folder/code.zip" -- python "$$JOB" --config "$$CONFIG" $$ARGS

check: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ray_explain jobs

test: setup  ## all tests that need no GPU and no network
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not gpu and not network"
	$(BIN)/python -m pytest -m "(ray or slow) and not long and not gpu and not network and not machines"

test-long: setup $(VENV)/trackers  ## those that take minutes each: a failing S3, a killed job, training and sweep, a lost node, planned against measured memory, MLflow and W&B
	$(BIN)/python -m pytest -m "long and not gpu and not network"
	PYTHONPATH=$(VENV)/trackers $(BIN)/python -m pytest -rs tests/distributed/test_trackers.py

test-fast: setup  ## tests of the tensors and tables layers
	$(BIN)/python -m pytest -n 2 -m "not ray and not slow and not gpu and not network"

chaos: setup  ## the pipeline on several nodes and S3, while parts of it are killed
	set -f; OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos --seeds $$SEEDS

cluster-test: setup  ## ray up, a job, a lost machine and ray down, on machines made of namespaces (needs root)
	$(BIN)/python -m pytest -m machines tests/distributed/test_machines.py

# Whom they are not asked for need not have them: they lie beside the environment.
$(VENV)/trackers: $(VENV)/.stamp
	$(BIN)/uv pip install -q --python $(BIN)/python --target $@ "mlflow-skinny>=3" sqlalchemy alembic "wandb>=0.19"

# What is compared with, beside the environment and not in it; where it cannot be had, its rows say "not installed".
$(VENV)/peers: $(VENV)/.stamp
	-$(BIN)/uv pip install -q --no-deps --target $@ $(PEERS)

bench: setup $(VENV)/peers  ## measured speed, against what one would use otherwise
	PYTHONPATH=$(VENV)/peers OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_interventions.py
	$(BIN)/python tests/benchmarks/bench_stages.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_features.py exemplars
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_features.py directions
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_evaluation.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_training.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/bench_memory.py

lock: setup  ## pin the dependencies anew; run where torch resolves to a CPU wheel
	$(BIN)/uv pip compile -q pyproject.toml --extra dev --no-emit-package torch --python-version 3.11 --generate-hashes -o requirements.lock
	! grep -E '^(torch|nvidia-|cuda-|triton)[a-z0-9-]*==' requirements.lock

clean:  ## remove what runs made (not the environment)
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache

dashboard: setup  ## links to jobs, actors and curves of RUN; serves TensorBoard until Ctrl-C, tunnels to CLUSTER
	@echo "Ray, with jobs, actors and Train runs: http://127.0.0.1:$$DASHBOARD_PORT (the token: $(BIN)/ray get-auth-token)"
	@echo "TensorBoard, with curves and HParams:  http://127.0.0.1:6006 ($$RUN/tensorboard)"
	@if [ -n "$$CLUSTER" ]; then $(BIN)/ray dashboard --port "$$DASHBOARD_PORT" "$$CLUSTER" & trap "kill $$!" EXIT; fi; \
		$(BIN)/tensorboard --logdir "$$RUN/tensorboard" --host 127.0.0.1 --port 6006 --load_fast=false
