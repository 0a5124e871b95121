"""On several machines, storage is a place that all of them see."""

from typing import Any

import pytest

from ray_explain.config import ClusterConfig

pytestmark = pytest.mark.ray


@pytest.fixture
def two_machines(running_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    nodes: list[dict[str, Any]] = [
        {"Alive": True, "NodeManagerHostname": name, "Resources": {}} for name in ("head", "worker")
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr("ray_explain.distributed.cluster.check_same_code", lambda: None)  # it would ask the second one


def test_a_local_path_on_several_machines_is_refused_with_the_reason(two_machines: None) -> None:
    from ray_explain.distributed.cluster import cluster
    from ray_explain.errors import BadInput

    with pytest.raises(BadInput, match=r"'runs/demo' is a path of one machine, and the cluster has 2 nodes"):
        cluster("runs/demo", ClusterConfig()).__enter__()


@pytest.mark.parametrize("storage", ["s3://bucket/demo", "file:///mnt/shared/demo"])
def test_a_place_that_all_machines_see_is_taken(two_machines: None, storage: str) -> None:
    import ray

    from ray_explain.distributed.cluster import cluster

    with cluster(storage, ClusterConfig()):
        assert ray.is_initialized()
