"""What can never run is said at once; Ray would wait for it without end."""

import time

import pytest

from ray_explain.distributed.capacity import check_capacity, places
from ray_explain.errors import JobFailed


def test_a_worker_needs_its_cpu_and_its_gpus_on_one_node() -> None:
    assert places({"CPU": 3.5}, 0) == 3
    assert places({"CPU": 64, "GPU": 8}, 1) == 8
    assert places({"CPU": 4, "GPU": 8}, 1) == 4
    assert places({"CPU": 16, "GPU": 1}, 0.1) == 10
    assert places({"CPU": 16}, 1) == 0


@pytest.mark.ray
def test_more_workers_than_the_cluster_can_have_are_refused_at_once(running_ray: None) -> None:
    started = time.monotonic()
    check_capacity(4, gpus_per_worker=0)
    with pytest.raises(JobFailed, match=r"5 workers of 1 CPU .* has 4 CPUs .* `train.workers` to 4 or fewer"):
        check_capacity(5, gpus_per_worker=0)
    with pytest.raises(JobFailed, match=r"1 GPU are asked for.* 0 GPUs.* `cluster.gpus_per_worker` to 0"):
        check_capacity(1, gpus_per_worker=1)
    assert time.monotonic() - started < 30
