"""One way to a running Ray: the cluster named by RAY_ADDRESS, else a local one of this machine."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data
from ray._private import ray_constants

from ray_explain.config import ClusterConfig
from ray_explain.distributed import NO_GPU_UNASKED
from ray_explain.distributed.auth_token import make_token
from ray_explain.distributed.capacity import fleet
from ray_explain.distributed.checks import check_address, check_same_code
from ray_explain.errors import BadInput

logger = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 300 * 2**20  # we stream; Ray's default takes 30 % of the memory


@contextmanager
def cluster(root: str, wanted: ClusterConfig) -> Iterator[None]:
    """Ray for the block: an address in RAY_ADDRESS (as `ray job submit` sets it), one that runs already, or our own.

    On this machine there are at least four logical CPUs, since Ray Data's readers and Ray Train's controllers need a
    place beside the workers; the real cores are shared out by `concurrent_trainings` and `actors`.

    Raises:
        BadInput: there is no cluster at the address, it runs other code than this process, or it has or may get several
            nodes and the storage is a path of one of them.
    """
    ours, at_sigterm = not ray.is_initialized(), signal.getsignal(signal.SIGTERM)
    # Ray has read it when it was imported, which may have been before us.
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, False)
    if ours and os.environ.get("RAY_ADDRESS"):
        check_address(os.environ["RAY_ADDRESS"])
        # Workers of a cluster that others started do not have our environment.
        ray.init(log_to_driver=False, configure_logging=False, runtime_env={"env_vars": NO_GPU_UNASKED})
    elif ours:
        make_token()
        ray.init(
            address="local",
            num_cpus=max(4, os.cpu_count() or 1),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, at_sigterm)  # Ray's own would print a stack and end us without a word
    try:
        check_shared(root, wanted)
        check_same_code()
        _log_what_ray_prints()
        _quiet_data()
        yield
    finally:
        if ours:
            ray.shutdown()


def check_shared(root: str, wanted: ClusterConfig) -> None:
    """All nodes see the storage: those that are there, and those that an autoscaler may add. Ray must be running.

    Raises:
        BadInput: it is a path of one of several.
    """
    if "://" in root:
        return
    machines = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    may_come = fleet(wanted).most
    if len(machines) > 1 or may_come:
        has = f"has {len(machines)} nodes" + (f" and may add {may_come}" if may_come else "")
        raise BadInput(
            f"storage {root!r} is a path of one machine, and the cluster {has}, which could not read each other's "
            "files: set `storage` to s3://... or to a path that every node mounts, given as file://..."
        )


def _log_what_ray_prints() -> None:
    """Ray's warnings belong into our log, not over our bars. For those of its nodes there is no switch (Ray 2.60)."""
    ray._private.worker._worker_logs_enabled = False
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.WARNING)


def _quiet_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
