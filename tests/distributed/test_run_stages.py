"""Stages on actors: the same rows whoever makes them, none twice, none lost."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from ray_explain import storage
from ray_explain.artifacts import Artifact, finished
from ray_explain.config import ClusterConfig
from ray_explain.errors import JobFailed
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.world_cases import patching_cases
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

pytestmark = pytest.mark.ray
N = 120


@pytest.fixture(scope="module")
def cases() -> pa.Table:
    world = World()
    return patching_cases(world, world_tokenizer(world), n={"train": N}, layers=[(0, 0), (1, 1)], seed=0)


def job(cases: pa.Table, target: Path, root: Path, label: str = "target") -> Any:
    from ray_explain.distributed.run_stages import StageJob

    source = Artifact(kind="patching_cases", label=label, config={})
    storage.write_table(cases, f"{source.path(str(root))}/table.parquet", row_group_size=50)
    return StageJob(
        stage=PatchingStage,
        config={"model": str(target), "revision": None, "dtype": "float32"},
        source=source.path(str(root)),
        artifact=Artifact(kind="patching_effects", label=label, config={}, parents=(source,)),
    )


def effects(of: Any, root: Path) -> list[dict[str, Any]]:
    rows = storage.read_table(of.artifact.path(str(root))).drop_columns(["vectors"]).to_pylist()
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def test_rows_do_not_depend_on_actors_nor_on_a_killed_one(
    running_ray: None, cases: pa.Table, world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.run_stages import make_here, run_stages

    quiet, noisy = job(cases, world_target, tmp_path / "a"), job(cases, world_target, tmp_path / "b")
    run_stages([quiet], str(tmp_path / "a"), ClusterConfig(actors=1, rows_per_slice=N))
    killed = _kill_an_actor_after_the_first_part(noisy.artifact.path(str(tmp_path / "b")))
    [manifest] = run_stages([noisy], str(tmp_path / "b"), ClusterConfig(actors=2, rows_per_slice=1))
    assert killed(), "the run ended before an actor could be killed"
    assert manifest.rows == N
    assert effects(noisy, tmp_path / "b") == effects(quiet, tmp_path / "a")
    alone = job(cases, world_target, tmp_path / "c")
    make_here([alone], str(tmp_path / "c"), ClusterConfig(rows_per_slice=50))
    assert effects(alone, tmp_path / "c") == effects(quiet, tmp_path / "a")


def _actors() -> set[int]:
    """Process ids of the pool's actors on this machine."""
    named = ((process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return {pid for pid, words in named if "ray::MapWorker" in " ".join(words)}


def _kill_an_actor_after_the_first_part(folder: str) -> Any:
    """Starts to watch; the function that is returned says, once, whether an actor was killed."""
    killed: list[int] = []
    leaving = _actors()  # of the pool before: one of these would be killed in vain

    def watch() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            actors = _actors() - leaving
            if actors and storage.list_files(folder, ".parquet"):
                with suppress(ProcessLookupError):
                    os.kill(min(actors), signal.SIGKILL)
                    killed.append(min(actors))
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()

    def was_killed() -> bool:
        thread.join()
        return bool(killed)

    return was_killed


def test_going_on_makes_only_what_is_missing(
    running_ray: None, cases: pa.Table, world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.run_stages import run_stages

    root, pool = str(tmp_path), ClusterConfig(actors=1, rows_per_slice=60)
    work = job(cases, world_target, tmp_path)
    folder = work.artifact.path(root)
    run_stages([work], root, pool)
    whole = effects(work, tmp_path)
    first, second = storage.list_files(folder, ".parquet")
    made_at = os.stat(f"{folder}/{first}").st_mtime_ns
    os.remove(f"{folder}/{second}")
    os.remove(f"{folder}/manifest.json")
    run_stages([work], root, pool)
    assert effects(work, tmp_path) == whole
    assert os.stat(f"{folder}/{first}").st_mtime_ns == made_at


def test_dropped_rows_are_counted_and_too_many_fail_the_stage(
    running_ray: None, cases: pa.Table, world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.run_stages import run_stages

    rows = cases.slice(0, 20).to_pylist()
    rows[3]["base_prompt"] = ""
    rows[7]["base_positions"] = [99]
    poisoned = pa.Table.from_pylist(rows, schema=cases.schema)
    work = job(poisoned, world_target, tmp_path)
    with pytest.raises(JobFailed, match=r"2 of 20 cases were dropped.*" + rows[3]["case_id"]):
        run_stages([work], str(tmp_path), ClusterConfig(actors=1))
    assert finished(work.artifact, str(tmp_path)) is None
    [manifest] = run_stages([work], str(tmp_path), ClusterConfig(actors=1, max_dropped=0.1))
    assert manifest.rows + sum(manifest.dropped.values()) == 20
    assert len(manifest.dropped) == 2
