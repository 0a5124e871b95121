"""What can never run is said at once; Ray would wait for it without end."""

import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ray_explain.config import AddedNodes, ClusterConfig
from ray_explain.distributed.capacity import HEAD, Fleet, Kind, autoscaler_file, check_capacity, fleet, places
from ray_explain.distributed.checks import check_gpus
from ray_explain.distributed.cluster import check_shared
from ray_explain.errors import BadInput, JobFailed

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_worker_needs_its_cpu_and_its_gpus_on_one_node() -> None:
    assert places({"CPU": 3.5}, 0) == 3
    assert places({"CPU": 64, "GPU": 8}, 1) == 8
    assert places({"CPU": 4, "GPU": 8}, 1) == 4
    assert places({"CPU": 16, "GPU": 1}, 0.1) == 10
    assert places({"CPU": 16}, 1) == 0


def test_nodes_to_come_have_places_each_for_itself() -> None:
    gpu, cpu = Kind({"CPU": 4, "GPU": 1}, 8), Kind({"CPU": 64}, 2)
    head = {"CPU": 4.0, HEAD: 1.0}
    assert Fleet([head], [gpu], 8).places(1) == 8
    assert Fleet([head], [gpu], 8).places(2) == 0  # two nodes of one GPU are no node of two
    assert Fleet([head], [gpu], 8).places(0) == 4 + 8 * 4
    assert Fleet([head], [gpu, cpu], 3).places(0) == 4 + 2 * 64 + 4  # no more than three at a time
    assert Fleet([head, {"CPU": 4.0, "GPU": 1.0}], [gpu], 8).places(1) == 8  # one of the eight is there already
    assert Fleet([head], [gpu, Kind({"CPU": 96, "GPU": 8}, 1)], 9).gpus_of_a_node == 8


@pytest.fixture
def autoscaler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The cluster's own file where `ray up` puts it, and a process that has the command line of Ray's autoscaler."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ray_bootstrap_config.yaml").write_text((ROOT / "cluster.yaml").read_text())
    given = ["--logs-dir=/nowhere", "--gcs-address=10.0.0.1:64001", "--autoscaling-config=~/ray_bootstrap_config.yaml"]
    process = subprocess.Popen([sys.executable, "-c", "input()", *given], stdin=subprocess.PIPE)
    yield "127.0.0.1:64001"
    process.communicate(b"\n")


def connected_to(monkeypatch: pytest.MonkeyPatch, gcs_address: str, *nodes: dict[str, float]) -> None:
    alive = [{"Alive": True, "NodeManagerHostname": f"node {at}", "Resources": node} for at, node in enumerate(nodes)]
    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr("ray.get_runtime_context", lambda: type("Context", (), {"gcs_address": gcs_address}))


def test_what_the_autoscaler_may_add_is_read_from_its_own_file(
    autoscaler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected_to(monkeypatch, autoscaler, {"CPU": 4.0, HEAD: 1.0})  # as the project's cluster on AWS starts
    assert fleet(ClusterConfig()).kinds == [Kind({"CPU": 8, "GPU": 1}, 2), Kind({"CPU": 8, "GPU": 1}, 6)]
    check_gpus(ClusterConfig(gpus_per_actor=1, gpus_per_worker=1))
    check_capacity(8, fleet(ClusterConfig()), gpus_per_worker=1)
    with pytest.raises(BadInput, match=r"gpus_per_actor` = 2, but no node .* more than 1 GPUs: set it to 1 or less"):
        check_gpus(ClusterConfig(gpus_per_actor=2))
    with pytest.raises(JobFailed, match=r"may add 8 nodes, a place for 8"):
        check_capacity(9, fleet(ClusterConfig()), gpus_per_worker=1)


def test_a_file_that_no_autoscaler_of_this_cluster_reads_says_nothing(
    autoscaler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert autoscaler_file(autoscaler) == Path.home() / "ray_bootstrap_config.yaml"
    connected_to(monkeypatch, "127.0.0.1:64002", {"CPU": 4.0})
    assert fleet(ClusterConfig()) == Fleet([{"CPU": 4.0}], [], 0)


def test_the_config_says_what_an_autoscaler_elsewhere_may_add(monkeypatch: pytest.MonkeyPatch) -> None:
    connected_to(monkeypatch, "127.0.0.1:64001", {"CPU": 4.0, HEAD: 1.0})
    wanted = ClusterConfig(gpus_per_actor=1, may_add=[AddedNodes(nodes=4, cpus=7, gpus=1)])
    check_gpus(wanted)
    assert fleet(wanted).places(1) == 4
    with pytest.raises(BadInput, match=r"no node .* more than 0 GPUs.* `cluster.may_add`"):
        check_gpus(ClusterConfig(gpus_per_actor=1))


def test_gpus_of_several_nodes_are_not_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    connected_to(monkeypatch, "127.0.0.1:64001", {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0})
    check_gpus(ClusterConfig(gpus_per_actor=1))
    with pytest.raises(BadInput, match=r"more than 1 GPUs"):
        check_gpus(ClusterConfig(gpus_per_actor=2))


def test_a_local_path_is_refused_before_the_first_node_is_added(
    autoscaler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected_to(monkeypatch, autoscaler, {"CPU": 4.0, HEAD: 1.0})
    with pytest.raises(BadInput, match=r"'runs/demo' is a path of one machine.* has 1 nodes and may add 8"):
        check_shared("runs/demo", ClusterConfig())
    for shared in ("s3://bucket/demo", "file:///mnt/shared/demo"):
        check_shared(shared, ClusterConfig())


def test_the_kubernetes_job_says_what_its_cluster_may_add() -> None:
    cluster = yaml.safe_load((ROOT / "deploy/kuberay/raycluster.yaml").read_text())
    job = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    [group] = cluster["spec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    has = {
        "nodes": group["maxReplicas"],
        "cpus": int(container["resources"]["requests"]["cpu"]),
        "gpus": int(group["rayStartParams"]["num-gpus"]),
    }
    [told] = [word for word in shlex.split(job["spec"]["entrypoint"]) if word.startswith("cluster.may_add=")]
    assert yaml.safe_load(told.partition("=")[2]) == [has]


@pytest.mark.ray
def test_more_workers_than_the_cluster_can_have_are_refused_at_once(running_ray: None) -> None:
    started, nodes = time.monotonic(), fleet(ClusterConfig())
    check_capacity(4, nodes, gpus_per_worker=0)
    with pytest.raises(JobFailed, match=r"5 workers of 1 CPU .* has 4 CPUs .* `train.workers` to 4 or fewer"):
        check_capacity(5, nodes, gpus_per_worker=0)
    with pytest.raises(JobFailed, match=r"1 GPU are asked for.* 0 GPUs.* `cluster.gpus_per_worker` to 0"):
        check_capacity(1, nodes, gpus_per_worker=1)
    assert time.monotonic() - started < 30


@pytest.mark.ray
@pytest.mark.slow
def test_gpu_work_starts_on_a_cluster_that_has_none_yet_and_gets_its_node() -> None:
    folder = tempfile.mkdtemp(prefix="grow")  # Ray's sockets need a short path
    command = [sys.executable, "-m", "tests.growing", folder]
    try:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert "may add 2" in ended.stdout and "a node was added" in ended.stdout
