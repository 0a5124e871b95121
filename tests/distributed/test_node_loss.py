"""Ground truth on several nodes: the same rows with 1, 2 or 4 actors, and when a whole node dies in the middle."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.config import ClusterConfig
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.world_cases import patching_cases
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

pytestmark = [pytest.mark.ray, pytest.mark.long]
N = 400


@pytest.fixture(scope="module")
def cases() -> pa.Table:
    """Every twentieth cannot be used."""
    world = World()
    made = patching_cases(world, world_tokenizer(world), n={"train": N}, layers=[(0, 0), (1, 1)], seed=0)
    rows = made.to_pylist()
    for row in rows[::20]:
        row["base_positions"] = [99]
    return pa.Table.from_pylist(rows, schema=made.schema)


def _is_actor(process: psutil.Process) -> bool:
    try:
        return process.cmdline()[0].startswith("ray::MapWorker")
    except (psutil.Error, IndexError):
        return False


def _run(cases: pa.Table, target: Path, root: Path, actors: int, meanwhile: Any = None) -> tuple[Any, Any]:
    """The artifact and its manifest, made in slices of 2 cases."""
    from ray_explain.distributed.run_stages import StageJob, run_stages

    source = Artifact(kind="patching_cases", label="target", config={})
    storage.write_table(cases, f"{source.path(str(root))}/table.parquet", row_group_size=50)
    artifact = Artifact(kind="patching_effects", label="target", config={}, parents=(source,))
    job = StageJob(
        stage=PatchingStage,
        config={"model": str(target), "revision": None, "dtype": "float32"},
        source=source.path(str(root)),
        artifact=artifact,
    )
    watcher = threading.Thread(target=meanwhile, args=(artifact.path(str(root)),), daemon=True)
    if meanwhile:
        watcher.start()
    [manifest] = run_stages([job], str(root), ClusterConfig(actors=actors, rows_per_slice=2, max_dropped=0.1))
    return artifact, manifest


def _exact(artifact: Artifact, root: Path) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    from ray_explain.distributed.run_stages import dropped_rows

    folder = artifact.path(str(root))
    rows = storage.read_table(folder)
    return rows.select(["case_id", "base_answer", "patched_answer", "changed"]).to_pylist(), dropped_rows(folder)


def test_rows_do_not_depend_on_the_number_of_actors_nor_on_a_lost_node(
    add_node: Callable[..., Any], cases: pa.Table, world_target: Path, tmp_path: Path
) -> None:
    second_node, lost_with = add_node(num_cpus=2), list[int]()  # room for three actors

    def lose_the_node(folder: str) -> None:
        """Once it has actors and there are parts, raylet and workers go at once, as when a machine is taken away."""
        raylet = psutil.Process(second_node.all_processes["raylet"][0].process.pid)
        while not (actors := [process for process in raylet.children() if _is_actor(process)]):
            time.sleep(0.05)
        while len(storage.list_files(folder, ".parquet")) < 3:
            time.sleep(0.005)
        for process in [raylet, *actors]:
            with suppress(psutil.NoSuchProcess):  # actors see that their raylet has gone, and may be faster
                process.kill()
        lost_with.append(len(actors))

    found = {}
    for actors, meanwhile in [(1, None), (2, None), (4, lose_the_node)]:
        root = tmp_path / str(actors)
        artifact, manifest = _run(cases, world_target, root, actors, meanwhile)
        assert manifest.rows + sum(manifest.dropped.values()) == N
        found[actors] = _exact(artifact, root)
    assert lost_with, "the run ended before the node could be killed"
    assert len(found[1][0]) == N - N // 20
    assert found[1] == found[2] == found[4]
