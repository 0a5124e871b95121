"""Whether the cluster can ever have the workers that are asked for: Ray would wait for them without end."""

import math
from collections.abc import Mapping

import ray

from ray_explain.errors import JobFailed


def check_capacity(workers: int, *, gpus_per_worker: float) -> None:
    """Ray must be running. Nodes that an autoscaler may still add count, those busy with other work do as well.

    Raises:
        JobFailed: there is no place for so many workers of one CPU and so many GPUs each.
    """
    now = sum(places(node["Resources"], gpus_per_worker) for node in ray.nodes() if node["Alive"])
    later = ray._private.state.state.get_max_resources_from_cluster_config()  # None without an autoscaler
    most = max(now, places(later or {}, gpus_per_worker))
    if workers <= most:
        return
    needs = f"{workers} workers of 1 CPU" + (f" and {gpus_per_worker:g} GPU" if gpus_per_worker else "")
    has = {name: ray.cluster_resources().get(name, 0.0) for name in ("CPU", "GPU")}
    raise JobFailed(
        f"{needs} are asked for, but the cluster has {has['CPU']:g} CPUs and {has['GPU']:g} GPUs, a place for {most}: "
        f"set `train.workers` to {max(most, 1)} or fewer"
        + (", `cluster.gpus_per_worker` to 0" if gpus_per_worker and not has["GPU"] else "")
        + ", or add nodes"
    )


def places(resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """Workers that fit into the resources of a node."""
    by_cpu = math.floor(resources.get("CPU", 0.0))
    if not gpus_per_worker:
        return by_cpu
    return min(by_cpu, math.floor(resources.get("GPU", 0.0) / gpus_per_worker + 1e-6))
