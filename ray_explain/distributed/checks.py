"""What would keep a job waiting, or fail it late and obscurely: found out before any work, and said with a way out."""

import hashlib
import os
import platform
import socket
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import grpc
import pyarrow as pa
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_explain
from ray_explain import storage
from ray_explain.config import ClusterConfig
from ray_explain.errors import BadInput

_PATIENCE = 5  # seconds that a cluster may take to answer a knock
_CODE_PATIENCE = 60  # seconds that its nodes may take to start a worker


def check_address(address: str) -> None:
    """Before Ray is asked to join, which takes minutes to give up.

    Raises:
        BadInput: the address is of no cluster, or nobody answers there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    way_out = "start one (`make cluster-up`), correct RAY_ADDRESS, or unset it for a cluster of this machine alone"
    if not port.isdigit() or not host:
        raise BadInput(f"RAY_ADDRESS = {address!r} is no address of a cluster (host:6379): {way_out}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            pass
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"no Ray cluster answers at RAY_ADDRESS = {address!r} ({reason}): {way_out}") from error
    if not os.environ.get("RAY_USE_TLS") and not _speaks_grpc(f"{host}:{port}"):
        raise BadInput(
            f"what answers at RAY_ADDRESS = {address!r} is no Ray cluster (the dashboard has another port): {way_out}"
        )


def _speaks_grpc(address: str) -> bool:
    channel = grpc.insecure_channel(address)
    try:
        grpc.channel_ready_future(channel).result(timeout=_PATIENCE)
    except grpc.FutureTimeoutError:
        return False
    finally:
        channel.close()
    return True


def check_gpus(wanted: ClusterConfig) -> None:
    """Ray must be running. GPUs of nodes that an autoscaler may add count.

    Raises:
        BadInput: GPUs are asked for where there never will be one.
    """
    asked = {"gpus_per_actor": wanted.gpus_per_actor, "gpus_per_worker": wanted.gpus_per_worker}
    later = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    most = max(ray.cluster_resources().get("GPU", 0.0), later.get("GPU", 0.0))
    for key, gpus in asked.items():
        if gpus > most:
            raise BadInput(
                f"`cluster.{key}` = {gpus:g}, but the cluster has {most:g} GPUs and adds none: set it to "
                f"{'0, and the work is done on CPUs' if not most else f'{most:g} or less'}, or add a node with GPUs"
            )


def unused_gpus(wanted: ClusterConfig) -> str | None:
    """A sentence for those who have GPUs and use none; Ray must be running."""
    gpus = ray.cluster_resources().get("GPU", 0.0)
    if not gpus or wanted.gpus_per_actor or wanted.gpus_per_worker:
        return None
    return (
        f"The cluster has {gpus:g} GPUs, and this experiment uses none: set `cluster.gpus_per_worker` (training) and "
        "`cluster.gpus_per_actor` (ground truth, answers) to use them"
    )


def check_same_code() -> None:
    """Ray must be running. Every node runs the code that this process runs.

    Raises:
        BadInput: one has another version of the package; the message says which node and how to mend it.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    look = ray.remote(num_cpus=0)(_look)
    asked = {
        node["NodeManagerHostname"] + " " + node["NodeID"][:8]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote()
        for node in others
    }
    found = dict(zip(asked, ray.get(list(asked.values()), timeout=_CODE_PATIENCE)))
    check_codes(code_here(), found)


def check_codes(own: str, found: Mapping[str, str]) -> None:
    """`found` is what each node runs, told by `code_here`.

    Raises:
        BadInput: one of them is not `own`.
    """
    for node, code in found.items():
        if code != own:
            raise BadInput(
                f"node {node} runs another version of this package ({code}) than this process ({own}): install the "
                "same commit on every node, or send the code along: ray job submit --working-dir . -- python jobs/..."
            )


def _look() -> str:
    return code_here()


@cache
def code_here() -> str:
    """Version of Python and the package, and a digest of the package's files."""
    root = Path(ray_explain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return f"Python {platform.python_version()}, code {digest.hexdigest()[:12]}"


def check_storage(root: str) -> None:
    """Remote storage can be read, written and cleaned. A local folder shows it when the log is opened.

    Raises:
        BadInput: it cannot; the message has the server's reason.
    """
    probe = f"{root}/checks/{uuid.uuid4().hex[:8]}"
    try:
        storage.write_json({"by": os.environ.get("USER", "")}, f"{probe}/probe.json")
        storage.read_json(f"{probe}/probe.json")
        storage.remove(probe)
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())[-300:]
        raise BadInput(
            f"`storage` = {root!r} cannot be used: {reason}. The bucket must exist, and these credentials must be "
            "allowed to list it and to get, put and delete objects (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or the "
            "instance's profile; AWS_ENDPOINT_URL where it is not Amazon's)"
        ) from error


def way_out(error: BaseException) -> str | None:
    """What to do about an error of the cluster that has nothing to do with our work; None for others."""
    if isinstance(error, ObjectStoreFullError):
        return (
            "Ray's object store is full: give it more when the cluster is started (ray start "
            "--object-store-memory=...), set `cluster.actors` lower, or end other jobs of the cluster (ray job list)"
        )
    if isinstance(error, OutOfDiskError):
        return (
            "the disk that Ray writes to is full: free some, or start the cluster with another --temp-dir; what is "
            "finished is whole, and the job goes on when it is started again"
        )
    return None
