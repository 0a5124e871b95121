"""What the cluster has and may come to have. Work that can never run is refused; Ray would wait for it without end.

Ray itself does not say what its autoscaler may add (2.60: the GCS has no cluster config, with either autoscaler).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
import yaml

from ray_explain.config import ClusterConfig
from ray_explain.errors import JobFailed

HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
MAY_ADD = "or say in `cluster.may_add` what an autoscaler of another machine may add (docs/cluster.md)"


class Kind(NamedTuple):
    """Nodes beside the head that are alike."""

    resources: Mapping[str, float]  # of one of them
    most: int  # of them at a time, those that run already among them


class Fleet(NamedTuple):
    """The nodes of a cluster."""

    now: list[Mapping[str, float]]  # resources of each
    kinds: list[Kind]  # that an autoscaler may add
    most: int  # that it keeps in all

    def places(self, gpus_per_worker: float) -> int:
        """Workers of one CPU and so many GPUs that there can be at a time, each wholly on one node."""
        now = {at: places(node, gpus_per_worker) for at, node in enumerate(self.now)}
        head = sum(n for at, n in now.items() if HEAD in self.now[at])
        each = [places(kind.resources, gpus_per_worker) for kind in self.kinds for _ in range(kind.most)]
        return max(sum(now.values()), head + sum(sorted(each, reverse=True)[: self.most]))

    @property
    def gpus_of_a_node(self) -> float:
        """Of the one that has most."""
        nodes = [*self.now, *(kind.resources for kind in self.kinds)]
        return max((node.get("GPU", 0.0) for node in nodes), default=0.0)


def fleet(wanted: ClusterConfig) -> Fleet:
    """Ray must be running. What may come is told by the config, else by the autoscaler if it is one of this machine."""
    now = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    kinds = [Kind({"CPU": kind.cpus, "GPU": kind.gpus}, kind.nodes) for kind in wanted.may_add]
    if kinds:
        return Fleet(now, kinds, sum(kind.most for kind in kinds))
    path = autoscaler_file(ray.get_runtime_context().gcs_address)
    return Fleet(now, [], 0) if path is None else Fleet(now, *_kinds_in(path))


def autoscaler_file(gcs_address: str) -> Path | None:
    """What the autoscaler of the cluster reads, from the command line of its process; None unless it runs here.

    `ray up` puts it at ~/ray_bootstrap_config.yaml of the head and leaves it there after `ray down`, so that the file
    alone says nothing about the cluster that runs now.
    """
    port = gcs_address.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = dict(word.partition("=")[::2] for word in process.info["cmdline"] or [] if word.startswith("--"))
        if words.get("--gcs-address", "").endswith(f":{port}") and "--autoscaling-config" in words:
            return Path(words["--autoscaling-config"]).expanduser()
    return None


def _kinds_in(path: Path) -> tuple[list[Kind], int]:
    """What a file of `ray up` lets the autoscaler add, and how many nodes in all."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    most = config.get("max_workers", 0)
    kinds = [
        Kind(of.get("resources", {}), of.get("max_workers", 0 if name == config["head_node_type"] else most))
        for name, of in config["available_node_types"].items()
    ]
    return [kind for kind in kinds if kind.most], most


def check_capacity(workers: int, nodes: Fleet, *, gpus_per_worker: float) -> None:
    """Nodes that may be added count, those busy with other work do as well.

    Raises:
        JobFailed: there is no place for so many workers of one CPU and so many GPUs each.
    """
    most = nodes.places(gpus_per_worker)
    if workers <= most:
        return
    needs = f"{workers} workers of 1 CPU" + (f" and {gpus_per_worker:g} GPU" if gpus_per_worker else "")
    has = {name: sum(node.get(name, 0.0) for node in nodes.now) for name in ("CPU", "GPU")}
    raise JobFailed(
        f"{needs} are asked for, but the cluster has {has['CPU']:g} CPUs and {has['GPU']:g} GPUs and may add "
        f"{nodes.most} nodes, a place for {most}: set `train.workers` to {max(most, 1)} or fewer"
        + (", `cluster.gpus_per_worker` to 0" if gpus_per_worker and not nodes.gpus_of_a_node else "")
        + f", add nodes, {MAY_ADD}"
    )


def places(resources: Mapping[str, float], gpus_per_worker: float) -> int:
    """Workers that fit into the resources of a node."""
    by_cpu = math.floor(resources.get("CPU", 0.0))
    if not gpus_per_worker:
        return by_cpu
    return min(by_cpu, math.floor(resources.get("GPU", 0.0) / gpus_per_worker + 1e-6))
