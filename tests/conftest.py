"""One Ray for the whole test session, and the smallest experiment that runs from end to end."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ray_explain.distributed  # noqa: F401 - sets how Ray behaves, before anything imports it
from tests.object_store import FlakyProxy, Server, environment

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class ObjectStore(NamedTuple):
    """Where `s3://` leads in these tests."""

    server: Server
    proxy: FlakyProxy


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server behind a proxy; credentials and endpoint are in the environment."""
    server = Server(tmp_path_factory.mktemp("s3") / "server.log")
    proxy = FlakyProxy(server.port)
    before = dict(os.environ)
    os.environ.update(environment(proxy.port))
    yield ObjectStore(server, proxy)
    for name in environment(proxy.port):
        os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
    proxy.stop()
    server.stop()


@pytest.fixture(scope="session")
def running_ray(object_store: ObjectStore) -> Iterator[None]:
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
