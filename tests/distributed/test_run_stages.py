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
from ray_explain.stages import Result
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

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


class Echo:
    """Gives back its cases, but those whose id begins with "bad"."""

    schema_in = schema_out = pa.schema([pa.field("case_id", pa.string(), nullable=False)])

    def __init__(self, config: dict[str, Any]) -> None:
        pass

    def __call__(self, table: pa.Table) -> Result:
        ids = table["case_id"].to_pylist()
        kept = [name for name in ids if not name.startswith("bad")]
        dropped = [(name, "bad") for name in ids if name not in kept]
        return Result(pa.table({"case_id": kept}, schema=self.schema_out), dropped)


class Deadly(Echo):
    """As Echo, but a case "deadly" ends its process at once, as the kernel does where memory is short."""

    def __call__(self, table: pa.Table) -> Result:
        if "deadly" in table["case_id"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


class Slow(Echo):
    """As Echo, after a while."""

    def __call__(self, table: pa.Table) -> Result:
        time.sleep(4)
        return super().__call__(table)


def echo_job(names: list[str], root: Path, stage: type[Echo] = Echo) -> Any:
    from ray_explain.distributed.run_stages import StageJob

    source = Artifact(kind="cases", label="echo", config={})
    storage.write_table(pa.table({"case_id": names}, schema=Echo.schema_in), f"{source.path(str(root))}/table.parquet")
    artifact = Artifact(kind="effects", label="echo", config={}, parents=(source,))
    return StageJob(stage=stage, config={}, source=source.path(str(root)), artifact=artifact)


def effects(of: Any, root: Path) -> list[dict[str, Any]]:
    rows = storage.read_table(of.artifact.path(str(root))).drop_columns(["vectors"]).to_pylist()
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


@pytest.mark.ray
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


@pytest.mark.ray
def test_a_slice_at_which_every_actor_dies_fails_its_stage_with_the_way_out(
    running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_explain.distributed import run_stages

    names = [f"case {i}" for i in range(9)]
    names[4] = "deadly"
    work, pool = echo_job(names, tmp_path, Deadly), ClusterConfig(actors=1, rows_per_slice=2)
    monkeypatch.setattr(run_stages, "_MOST_LOST", 2)
    with pytest.raises(JobFailed, match=r"effects echo: 2 actors died .* rows 4 to 5.*lower `cluster.memory_budget`"):
        run_stages.run_stages([work], str(tmp_path), pool)
    assert finished(work.artifact, str(tmp_path)) is None
    assert storage.list_files(work.artifact.path(str(tmp_path)), ".parquet")


@pytest.mark.ray
def test_a_slice_may_take_longer_than_ray_data_allows_and_other_datasets_keep_their_limit(
    running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.data import DataContext

    from ray_explain.distributed.run_stages import run_stages

    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 2)
    work = echo_job(["a case"], tmp_path, Slow)
    [manifest] = run_stages([work], str(tmp_path), ClusterConfig(actors=1))
    assert manifest.rows == 1
    assert DataContext.get_current().execution_no_progress_timeout_s == 2


@pytest.mark.ray
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


@pytest.mark.ray
def test_dropped_rows_are_counted_and_too_many_fail_the_stage(
    running_ray: None, cases: pa.Table, world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.run_stages import run_stages

    rows = cases.slice(0, 20).to_pylist()
    rows[3]["base_prompt"] = ""
    rows[7]["base_positions"] = [99]
    poisoned = pa.Table.from_pylist(rows, schema=cases.schema)
    work = job(poisoned, world_target, tmp_path)
    with pytest.raises(JobFailed, match=r"cases: 2 of 20 were dropped.*" + rows[3]["case_id"]):
        run_stages([work], str(tmp_path), ClusterConfig(actors=1))
    assert finished(work.artifact, str(tmp_path)) is None
    [manifest] = run_stages([work], str(tmp_path), ClusterConfig(actors=1, max_dropped=0.1))
    assert manifest.rows + sum(manifest.dropped.values()) == 20
    assert len(manifest.dropped) == 2


def stopped_after(parts: list[tuple[int, int]], job: Any, root: Path) -> dict[str, int]:
    """As a run leaves it that was stopped after these slices; the time of each part."""
    from ray_explain.distributed.checks import code_here
    from ray_explain.distributed.run_stages import _Worker

    worker = _Worker([job], str(root), code_here())
    for start, stop in parts:
        worker.make(0, start, stop)
    folder = job.artifact.path(str(root))
    return {name: os.stat(f"{folder}/{name}").st_mtime_ns for name in storage.list_files(folder, ".parquet")}


@pytest.mark.parametrize("parts", [[(0, 4)], [(2, 4), (7, 9)], [(4, 10)], [(0, 10)], []])
@pytest.mark.parametrize("rows_per_slice", [1, 3, 4, 100])
def test_going_on_with_slices_of_another_size_keeps_the_parts_and_makes_every_row_once(
    tmp_path: Path, parts: list[tuple[int, int]], rows_per_slice: int
) -> None:
    from ray_explain.distributed.run_stages import make_here

    names = [f"case {i}" for i in range(10)]
    work = echo_job(names, tmp_path)
    kept, folder = stopped_after(parts, work, tmp_path), work.artifact.path(str(tmp_path))
    make_here([work], str(tmp_path), ClusterConfig(rows_per_slice=rows_per_slice))
    assert storage.read_table(folder)["case_id"].to_pylist() == names
    assert finished(work.artifact, str(tmp_path)).rows == 10
    assert {name: os.stat(f"{folder}/{name}").st_mtime_ns for name in kept} == kept


def test_of_a_table_of_many_files_a_slice_opens_those_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_explain.distributed import run_stages

    names = [f"case {i}" for i in range(20)]
    work = echo_job(names, tmp_path)
    for start in range(0, 20, 2):
        part = pa.table({"case_id": names[start : start + 2]}, schema=Echo.schema_in)
        storage.write_table(part, f"{work.source}/part-{start:02d}.parquet")
    storage.remove_file(f"{work.source}/table.parquet")
    opened: list[int] = []
    open_file, read_footer = run_stages.pq.ParquetFile, run_stages.pq.read_metadata
    monkeypatch.setattr(run_stages.pq, "ParquetFile", lambda file: [opened.append(1), open_file(file)][1])
    monkeypatch.setattr(run_stages.pq, "read_metadata", lambda *a, **kw: [opened.append(1), read_footer(*a, **kw)][1])
    worker = run_stages._Worker([work], str(tmp_path), "")
    for start in range(0, 20, 3):
        worker.make(0, start, min(start + 3, 20))
    assert storage.read_table(work.artifact.path(str(tmp_path)))["case_id"].to_pylist() == names
    assert len(opened) == 10 + 13  # each once to know what it holds, then one or two for each slice


@pytest.mark.parametrize("parts", [[(0, 4), (3, 6)], [(0, 4), (2, 3)]])
def test_parts_that_hold_a_row_twice_fail_the_job_with_the_way_out(
    tmp_path: Path, parts: list[tuple[int, int]]
) -> None:
    from ray_explain.distributed.run_stages import make_here

    work = echo_job([f"case {i}" for i in range(10)], tmp_path)
    stopped_after(parts, work, tmp_path)
    with pytest.raises(JobFailed, match=r"twice.*Remove the folder"):
        make_here([work], str(tmp_path), ClusterConfig(rows_per_slice=3))
    assert finished(work.artifact, str(tmp_path)) is None


def test_a_stage_is_not_finished_while_rows_are_missing(tmp_path: Path) -> None:
    from ray_explain.distributed.run_stages import make_here

    work = echo_job([f"case {i}" for i in range(10)], tmp_path)
    stopped_after([(0, 4)], work, tmp_path)
    part = f"{work.artifact.path(str(tmp_path))}/part-0000000000-0000000004.parquet"
    storage.write_table(storage.read_table(work.artifact.path(str(tmp_path))).slice(0, 3), part)
    with pytest.raises(JobFailed, match="9 rows and 0 dropped of 10 cases"):
        make_here([work], str(tmp_path), ClusterConfig(rows_per_slice=4))
    assert finished(work.artifact, str(tmp_path)) is None


def test_a_stage_stops_once_too_many_cases_are_dropped_and_says_so_at_once_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray_explain.distributed.run_stages import make_here

    names = [f"{'bad' if i in (1, 2, 5) else 'case'} {i}" for i in range(20)]
    work, pool = echo_job(names, tmp_path), ClusterConfig(rows_per_slice=2, max_dropped=0.1)
    folder = work.artifact.path(str(tmp_path))
    with pytest.raises(JobFailed, match=r"cases: 3 of 20 were dropped.*0.1; the first: bad 1: bad; bad 2: bad; bad 5"):
        make_here([work], str(tmp_path), pool)
    assert len(storage.list_files(folder, ".parquet")) == 3
    with monkeypatch.context() as patched, pytest.raises(JobFailed, match="3 of 20 were dropped"):
        patched.setattr(Echo, "__call__", None)
        make_here([work], str(tmp_path), pool)
    make_here([work], str(tmp_path), pool.model_copy(update={"max_dropped": 0.15}))
    made = finished(work.artifact, str(tmp_path))
    assert made is not None and (made.rows, made.dropped) == (17, {"bad": 3})
