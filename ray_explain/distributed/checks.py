"""What would keep a job waiting, or fail it late and obscurely: found out before any work, and said with a way out."""

import hashlib
import logging
import os
import platform
import socket
import sys
import uuid
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pyarrow as pa
import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_explain
from ray_explain import storage
from ray_explain.config import ClusterConfig
from ray_explain.distributed.capacity import MAY_ADD, fleet
from ray_explain.errors import BadInput

logger = logging.getLogger(__name__)
_PATIENCE = 5  # seconds that a cluster may take to answer a knock
_CODE_PATIENCE = 20  # seconds that its nodes may take to start a worker
_SAME_CODE = (
    "install the same commit on every node, or send the code along: ray job submit --working-dir . -- python jobs/..."
)


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
    """Ray must be running. Nodes that may be added count.

    Raises:
        BadInput: an actor or a worker is to have more GPUs than any one node has or will have.
    """
    most = fleet(wanted).gpus_of_a_node
    for key, gpus in {"gpus_per_actor": wanted.gpus_per_actor, "gpus_per_worker": wanted.gpus_per_worker}.items():
        if gpus > most:
            raise BadInput(
                f"`cluster.{key}` = {gpus:g}, but no node that the cluster has or may add has more than {most:g} GPUs: "
                f"set it to {'0, and the work is done on CPUs' if not most else f'{most:g} or less'}, add a node with "
                f"more, {MAY_ADD}"
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
    """Ray must be running. The nodes that are there run the code that this process runs.

    A node that does not answer in time is told of, and no more: it may have been lost a moment ago, which Ray notices
    after up to a minute, and workers that start on it later compare their code themselves (`check_worker`).

    Raises:
        BadInput: one has another version of the package, or cannot run it; the message says which node and how to mend
            it.
    """
    here = ray.get_runtime_context().get_node_id()
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] != here:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[look.options(scheduling_strategy=there).remote()] = _name(node)
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_CODE_PATIENCE) if asked else ([], [])
    codes = {}
    for answer in answered:
        try:
            codes[asked[answer]] = ray.get(answer)
        except RayTaskError as error:
            raise BadInput(
                f"node {asked[answer]} cannot run this package ({str(error).strip().splitlines()[-1]}): {_SAME_CODE}"
            ) from error
        except RayError:  # it was lost meanwhile
            silent.append(answer)
    check_codes(code_here(), codes)
    for one in silent:
        said = f"node {asked[one]} does not answer, and its version of this package is not known; going on without it"
        logger.warning(said)
        print(said, file=sys.stderr)


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} {node['NodeID'][:8]}"


def check_codes(own: str, found: Mapping[str, str]) -> None:
    """`found` is what each node runs, told by `code_here`.

    Raises:
        BadInput: one of them is not `own`.
    """
    for node, code in found.items():
        if code != own:
            raise BadInput(
                f"node {node} runs another version of this package ({code}) than the driver ({own}): {_SAME_CODE}"
            )


def check_worker(root: str, code: str) -> None:
    """For a worker as it starts, since its node may have come after the driver looked. `code` is the driver's.

    Raises:
        BadInput: this node runs other code, or does not see the storage.
    """
    check_codes(code, {platform.node(): code_here()})
    if not storage.is_remote(root) and not Path(root).is_dir():
        raise BadInput(
            f"node {platform.node()} does not see the storage {root!r}, a path of another machine: set `storage` to "
            "s3://... or to a path that every node mounts, given as file://..."
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
    storage.check_endpoint()
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


def way_out(error: BaseException | None) -> str | None:
    """What to do about an error of the cluster that has nothing to do with our work, wherever in `error` it is; None
    for others."""
    for one in _all_in(error):
        if isinstance(one, ObjectStoreFullError):
            return (
                "Ray's object store is full: give it more when the cluster is started (ray start "
                "--object-store-memory=...), set `cluster.actors` lower, or end other jobs of the cluster (ray job "
                "list)"
            )
        if isinstance(one, OutOfDiskError):
            return (
                "Ray's object store is full, and so is the disk that takes what does not fit: free some, or start the "
                "cluster with more (ray start --object-store-memory=...) or another --temp-dir; what is finished is "
                "whole, and the job goes on when it is started again"
            )
    return None


def _all_in(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those it came from: a task's, the controller's or any worker's of a training."""
    if error is None:
        return
    yield error
    inner = [getattr(error, name, None) for name in ("__cause__", "cause", "controller_failure")]
    for one in [*inner, *getattr(error, "worker_failures", {}).values()]:
        yield from _all_in(one)
