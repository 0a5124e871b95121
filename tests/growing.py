"""A cluster that starts as a head without GPU, and Ray's own autoscaler, which adds GPU nodes made of processes.

Run it in a process of its own, with a folder for Ray: `python -m tests.growing FOLDER`.
"""

import os
import socket
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

# Ray reads these when it is imported, which the next lines do. The newer autoscaler adds no such nodes (Ray 2.60).
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.urandom(32).hex())
os.environ.update(RAY_FAKE_CLUSTER="1", AUTOSCALER_UPDATE_INTERVAL_S="1", RAY_enable_autoscaler_v2="0")

from ray_explain.config import ClusterConfig
from ray_explain.distributed.capacity import Kind, check_capacity, fleet
from ray_explain.distributed.checks import check_gpus
from ray_explain.distributed.cluster import cluster
from ray_explain.errors import BadInput

MOST, PATIENCE = 2, 120  # GPU nodes; seconds until one is there
HEAD, HEAD_ID = "ray.head.default", "f" * 51 + "00000"  # so the fake provider calls it


def autoscaler_file(folder: Path, gcs: str) -> str:
    """As `ray up` leaves it on a head; `gcs` is where nodes join."""
    lists = ("file_mounts_sync_continuously", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    config = {
        "cluster_name": "growing",
        "max_workers": MOST,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": HEAD_ID,
            "gcs_address": gcs,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            HEAD: {"resources": {"CPU": 4, "GPU": 0}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": MOST},
        },
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "auth": {"ssh_user": "nobody"},
        "docker": {},
        "file_mounts": {},
        **{key: [] for key in lists},
        **{f"{command}_commands": [] for command in commands},
    } | {"file_mounts_sync_continuously": False}
    path = folder / "autoscaler.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def main(folder: Path) -> None:
    """Raises: AssertionError, BadInput, JobFailed, GetTimeoutError: something did not go as it should."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_TMPDIR"] = str(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = {"num_cpus": 4, "num_gpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20}
    config = autoscaler_file(folder, f"{ray.util.get_node_ip_address()}:{port}")
    head |= {"gcs_server_port": port, "autoscaling_config": config}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = nodes.address
    wanted = ClusterConfig(gpus_per_actor=1, gpus_per_worker=1)
    try:
        try:
            with cluster(str(folder), wanted):
                raise AssertionError("a path of the head was taken")
        except BadInput as refused:
            print(refused, flush=True)
        with cluster(f"file://{folder}", wanted):
            assert len(ray.nodes()) == 1 and fleet(wanted).kinds == [Kind({"CPU": 2, "GPU": 1}, MOST)]
            check_gpus(wanted)
            check_capacity(MOST, fleet(wanted), gpus_per_worker=1)
            where = ray.remote(num_gpus=1)(lambda: ray.get_runtime_context().get_node_id())
            assert ray.get(where.remote(), timeout=PATIENCE) != ray.get_runtime_context().get_node_id()
            print("a node was added, and did the work", flush=True)
    finally:
        family = psutil.Process().children(recursive=True)  # added nodes belong to the autoscaler
        nodes.shutdown()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
