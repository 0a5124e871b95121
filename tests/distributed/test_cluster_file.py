"""`cluster.yaml` is what Ray and EC2 understand, and nothing of it is open to the world."""

from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent.parent
GROUP = "sg-0123456789abcdef0"
IMAGE = "ami-0123456789abcdef0"


def cluster() -> dict[str, Any]:
    """The one of the project, with what a user fills in."""
    text = (ROOT / "cluster.yaml").read_text().replace("sg-FILL-IN", GROUP).replace("ami-FILL-IN", IMAGE)
    return yaml.safe_load(text)


def told(config: dict[str, Any], folder: Path) -> str:
    """What is said against it; nothing if it is fine."""
    from ray_explain.distributed.cluster_file import check_cluster_file
    from ray_explain.errors import BadInput

    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    try:
        check_cluster_file(str(path))
    except BadInput as error:
        return str(error)
    return ""


def test_the_projects_own_file_is_fine_once_filled_in(tmp_path: Path) -> None:
    assert told(cluster(), tmp_path) == ""


def test_the_file_as_it_comes_says_what_to_fill_in(capsys: pytest.CaptureFixture[str]) -> None:
    from ray_explain.distributed.cluster_file import main

    assert main([str(ROOT / "cluster.yaml")]) == 2
    told = capsys.readouterr().err
    assert "fill in the id of a security group" in told
    assert "fill in the id of an Ubuntu 22.04 or 24.04 image" in told


def test_workers_scale_from_zero_on_spot_and_on_demand_and_the_head_has_no_gpu() -> None:
    config = cluster()
    types = config["available_node_types"]
    workers = [types[name] for name in types if name != config["head_node_type"]]
    spot = ["InstanceMarketOptions" in worker["node_config"] for worker in workers]
    assert sorted(spot) == [False, True]
    assert all(worker["min_workers"] == 0 < worker["max_workers"] for worker in workers)
    assert all(worker["resources"]["GPU"] for worker in workers)
    assert types[config["head_node_type"]]["resources"]["GPU"] == 0
    assert sum(worker["max_workers"] for worker in workers) <= config["max_workers"]


FAULTS: list[tuple[str, Any, str]] = [
    ("max_worker", 3, "max_worker"),
    ("available_node_types.head.node_confg", {}, "node_confg"),
    ("head_node_type", "boss", "must be one of"),
    ("available_node_types.gpu_spot.min_workers", 9, "min_workers"),
    ("available_node_types.gpu_spot.min_workers", 1, "0 lets machines go"),
    ("provider", None, "`provider` is missing"),
    ("provider.type", "awss", "Unsupported node provider: awss"),
    ("provider.region", None, "a region is needed"),
    ("provider.region", "us-east", "a region is needed"),
    ("provider.availability_zone", "us-west-2a", "not in 'us-east-1'"),
    ("provider.regoin", "us-east-1", "no such key"),
    ("available_node_types.head.resources", {"CPU": 4}, "the head runs no GPU work"),
    ("available_node_types.head.node_config.InstanceTyp", "m7i.large", "InstanceTyp"),
    ("available_node_types.gpu_spot.node_config.InstanceMarketOptions", {"MarketTyp": "spot"}, "MarketTyp"),
    ("available_node_types.gpu_spot.node_config.SecurityGroupIds", [], "opens SSH to the world"),
    ("available_node_types.gpu_spot.node_config.IamInstanceProfile", None, "IamInstanceProfile"),
    ("available_node_types.gpu_spot.node_config.ImageId", None, "without one Ray takes Ubuntu 18.04"),
    ("available_node_types.gpu_spot.node_config.ImageId", "latest_dlami", "this is 'latest_dlami'"),
    ("file_mounts", {}, "every node needs the same token"),
    ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"], "without RAY_AUTH_MODE=token"),
    (
        "head_start_ray_commands",
        ["RAY_AUTH_MODE=token ray start --head --dashboard-host=0.0.0.0"],
        "to listen on 127.0.0.1",
    ),
]


@pytest.mark.parametrize(("key", "value", "said"), FAULTS, ids=[f"{key}-{value}" for key, value, _ in FAULTS])
def test_a_planted_fault_is_told(key: str, value: Any, said: str, tmp_path: Path) -> None:
    config = cluster()
    *parents, last = key.split(".")
    here = config
    for part in parents:
        here = here[part]
    here[last] = value
    if value is None:
        del here[last]
    assert said in told(config, tmp_path)


def test_every_file_that_nodes_get_is_there_and_the_environment_comes_from_the_lock() -> None:
    config = cluster()
    mounted = {here for here in config["file_mounts"].values() if not here.startswith("~")}
    assert all((ROOT / here).exists() for here in mounted) and "requirements.lock" in mounted
    assert any("-r ~/ray_explain/requirements.lock" in command for command in config["setup_commands"])
    assert "\nboto3==" in (ROOT / "requirements.lock").read_text()  # with which the head starts workers


def test_ray_itself_makes_of_the_file_what_was_meant() -> None:
    """Ray fills in what is left out; on AWS it must not have to make a security group or a role of its own."""
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(cluster())
    for node_type in prepared["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"] == [GROUP]
        assert node_type["node_config"]["ImageId"] == IMAGE
        assert node_type["node_config"]["IamInstanceProfile"] == {"Name": "ray-explain"}
    assert prepared["provider"]["cache_stopped_nodes"] is False


def test_the_autoscaler_on_kubernetes_reads_workers_from_zero_with_a_gpu_each() -> None:
    """By what Ray itself makes of the manifest, in a container beside the head."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    manifest = yaml.safe_load((ROOT / "deploy/kuberay/raycluster.yaml").read_text())
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] | {"memory": 0} == {"CPU": 4, "GPU": 0, "memory": 0}
    assert (types["gpu"]["min_workers"], types["gpu"]["max_workers"], config["idle_timeout_minutes"]) == (0, 8, 10)
    assert types["gpu"]["resources"] | {"memory": 0} == {"CPU": 7, "GPU": 1, "memory": 0}


def test_the_image_for_kubernetes_holds_what_the_lock_pins_and_the_jobs() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text()
    copied = {word for line in lines.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    assert copied == {"requirements.lock", "pyproject.toml", "README.md", "LICENSE", "ray_explain", "jobs"}
    pinned = {line.split("==")[1].split()[0] for line in lines.splitlines() if "uv==" in line}
    [uv] = [command for command in cluster()["setup_commands"] if "uv==" in command]
    assert pinned == {uv.split("==")[1].split()[0]}
