"""One Ray for the whole test session, and the smallest experiment that runs from end to end."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_explain.distributed  # noqa: F401 - sets how Ray behaves, before anything imports it

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def running_ray() -> Iterator[None]:
    """Ray with four logical CPUs: on fewer, training workers would leave none for those who feed them."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def world_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer target with the world's tokenizer, as a Hugging Face folder."""
    from ray_explain.world.facts import World
    from ray_explain.world.pretraining import TargetSize, new_target, save_target
    from ray_explain.world.tokenizer import world_tokenizer

    folder = tmp_path_factory.mktemp("target")
    tokenizer = world_tokenizer(World())
    model = new_target("llama", tokenizer, TargetSize(d_model=32, n_layers=2, n_heads=2), seed=0)
    save_target(model, tokenizer, folder)
    return folder
