"""The only package that imports ray or deepspeed.

How these behave is set here, before anything imports them, unless the user has set it otherwise.
"""

import os

# Whether an actor or a worker has GPUs is decided by what it asked for alone: without this, Ray leaves all GPUs of a
# machine visible to those that asked for none, and they would all take the first one.
NO_GPU_UNASKED = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
_ENVIRONMENT = {
    **NO_GPU_UNASKED,
    "RAY_USAGE_STATS_ENABLED": "0",
    # As on Windows and macOS, what Ray starts here for itself listens on 127.0.0.1 alone; on Linux it would open most
    # of its ports to the network. Clusters that are there already are joined as ever.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # the driver's share of it goes to the terminal
    "RAY_DATA_USE_DATASOURCE_V2": "0",  # the newer reader makes one block of small inputs, and so of all work
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",  # they would be drawn over ours
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # every report of a checkpoint waits for one
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it would take a stop by hand for the end of a sweep
    "OMP_NUM_THREADS": "1",  # several processes of one thread are faster here than one of several
    "TOKENIZERS_PARALLELISM": "false",
    # Small tensors come and go in every step; without these, glibc gives their pages back and takes them again.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
# We open no pickle, and no library in our processes shall: DeepSpeed would open its own checkpoints as pickles that may
# run code. PyTorch lets only tensors through.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
if "RAY_ADDRESS" in os.environ:  # a cluster with a dashboard, which tells the state of runs; it costs a process a run
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
