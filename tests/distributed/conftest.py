"""Questions to train on, about a random target, and more nodes for the session's Ray."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ray_explain import storage
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.positions import words_of_tokens
from ray_explain.ground_truth.world_cases import ablation_cases, patching_cases
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer


@pytest.fixture(scope="session")
def questions(world_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of 64 questions about patching and 32 about ablation, and 16 and 8 of the validation split."""
    folder, world = tmp_path_factory.mktemp("questions"), World()
    tokenizer = world_tokenizer(world)
    config = {"model": str(world_target), "revision": None, "dtype": "float32"}
    effects = PatchingStage(config)(
        patching_cases(world, tokenizer, n={"train": 64, "validation": 16}, layers=[(0, 0), (1, 1)], seed=0)
    )
    asked = patching_questions(effects.table, partial(words_of_tokens, tokenizer), wording="brief", seed=0)
    storage.write_table(asked.table, f"{folder}/patching/table.parquet")
    ablated = AblationStage(config)(ablation_cases(world, n={"train": 32, "validation": 8}, seed=0))
    asked = ablation_questions(ablated.table, str, d_model=32, wording="brief", seed=0)
    storage.write_table(asked.table, f"{folder}/ablation/table.parquet")
    return f"{folder}/patching", f"{folder}/ablation"


@pytest.fixture
def add_node(running_ray: None) -> Iterator[Callable[..., Any]]:
    """Starts another raylet on this machine, with these arguments of Ray's, joined to the session's Ray."""
    import ray
    from ray.cluster_utils import Cluster

    def is_alive(node: Any) -> bool:
        return any(one["NodeID"] == node.node_id and one["Alive"] for one in ray.nodes())

    def add(**given: Any) -> Any:
        cluster = Cluster()
        cluster.head_node = ray._private.worker._global_node
        added.append(cluster.add_node(wait=False, object_store_memory=80 * 2**20, **given))
        _wait(lambda: is_alive(added[-1]), "the node did not join")
        return added[-1]

    added: list[Any] = []
    yield add
    for node in added:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    _wait(lambda: not any(map(is_alive, added)), "a node is not taken for dead")


def _wait(until: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.2)
