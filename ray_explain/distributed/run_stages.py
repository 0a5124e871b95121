"""Stages over a pool of Ray Data actors: every row once, in the order of the cases, whatever dies on the way.

The driver hands out *slices* (row ranges of the cases' Parquet file), not rows: each actor reads its slice from storage
and writes what it made as one file named after the slice. So nothing large travels, a slice that an actor lost half-way
is simply done again, and going on after a stop means cutting what no file holds yet into slices.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from ray_explain import storage
from ray_explain.artifacts import Artifact, Manifest, finish, finished
from ray_explain.config import ClusterConfig
from ray_explain.distributed.checks import check_worker, code_here
from ray_explain.distributed.progress import Teller, watching
from ray_explain.errors import BadInput, JobFailed
from ray_explain.records import conform
from ray_explain.stages import Stage, check_dropped

_DROPPED = b"dropped"  # key of the part's Parquet metadata: JSON list of [id, reason]
_MEASURED = b"measured"  # and another: JSON object of numbers
_TOLD: dict[str, type[BadInput] | type[JobFailed]] = {"BadInput": BadInput, "JobFailed": JobFailed}  # or a child
_ROWS_PER_GROUP = 8192  # so that a later stage can read some rows without the others
_MOST_LOST = 5  # actors that a slice may cost: nodes are lost now and then, but a row that is too large takes every one


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One stage over one table."""

    stage: type[Stage]
    config: dict[str, Any]  # what the stage is made from; it may hold paths, so it is not the artifact's config
    source: str  # directory of the table read
    artifact: Artifact  # what is made
    rows_per_slice: int | None = None  # the pool's unless given
    expands: bool = False  # a case gives any number of rows; then `max_dropped` says nothing


class _Worker:
    """An actor: keeps the stage of the job it works on, and where that job's rows lie, until a slice of another job
    comes."""

    def __init__(
        self, jobs: Sequence[StageJob], root: str, code: str, board: Any = None, most_lost: int = _MOST_LOST
    ) -> None:
        self._jobs, self._root, self._code, self._board, self._most_lost = jobs, root, code, board, most_lost
        self._stage: tuple[int, Stage, list[tuple[str, int, int]]] | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch is one slice: columns job, start, stop; comes back with the cases it dropped, the seconds it took
        and, where input cannot be used or work cannot be done, the sentence that says so: Ray Data would tell the
        driver of some failure, not of which.
        """
        started, wrong, dropped = time.monotonic(), ["", ""], 0
        try:
            check_worker(self._root, self._code)
            number, start, stop = (int(batch[name][0]) for name in ("job", "start", "stop"))
            self._check_lost(number, start, stop)
            dropped = self.make(number, start, stop)
        except tuple(_TOLD.values()) as error:
            wrong = [next(name for name, kind in _TOLD.items() if isinstance(error, kind)), str(error)]
        seconds = time.monotonic() - started
        return batch | {"dropped": np.array([dropped]), "seconds": np.array([seconds]), "wrong": np.array([wrong])}

    def _check_lost(self, number: int, start: int, stop: int) -> None:
        """Ray hands a slice whose actor is lost to the next one, without end. The board knows how often it was begun;
        Ray's own count of retries is no measure, since it counts the slices that waited with the lost actor too.

        Raises:
            JobFailed: too many actors were lost at this slice.
        """
        lost = ray.get(self._board.begin.remote((number, start, stop))) - 1
        if lost >= self._most_lost:
            artifact = self._jobs[number].artifact
            raise JobFailed(
                f"{artifact.kind} {artifact.label}: {lost} actors died one after the other at rows {start} to "
                f"{stop - 1}, as they do where memory is short: lower `cluster.memory_budget` or "
                "`cluster.rows_per_slice` and start again; the slices that are made stay"
            )

    def make(self, number: int, start: int, stop: int) -> int:
        """Rows `start` to `stop` of the job with this number, as one file; returns how many cases it dropped."""
        job = self._jobs[number]
        if self._stage is None or self._stage[0] != number:
            self._stage = None  # the old model goes before the new one comes
            self._stage = (number, job.stage(job.config), _row_groups(job.source))
        _, stage, groups = self._stage
        cases = _rows(job.source, groups, start, stop)
        table, dropped, measured = stage(conform(cases, stage.schema_in))
        if not job.expands and table.num_rows + len(dropped) != cases.num_rows:
            raise JobFailed(
                f"{job.artifact.kind}: {cases.num_rows} cases gave {table.num_rows} rows and {len(dropped)} dropped"
            )
        notes = {_DROPPED: json.dumps(dropped).encode(), _MEASURED: json.dumps(dict(measured)).encode()}
        made = conform(table, stage.schema_out).replace_schema_metadata(notes)
        part = f"{job.artifact.path(self._root)}/{_part_name(start, stop)}"
        storage.write_table(made, part, row_group_size=_ROWS_PER_GROUP)
        return len(dropped)


def _part_name(start: int, stop: int) -> str:
    return f"part-{start:010d}-{stop:010d}.parquet"


def _ranges(folder: str, size: int) -> list[tuple[int, int]]:
    """(start, stop) of the rows that each part of an artifact was made from, in order.

    Raises:
        JobFailed: two parts are of the same row, or one is of rows beyond `size`.
    """
    names = storage.list_files(folder, ".parquet")
    words = [name.removesuffix(".parquet").split("-") for name in names]
    ranges = [(int(start), int(stop)) for _, start, stop in words]
    for (_, stop), (start, _) in zip(ranges, [*ranges[1:], (size, size)]):
        if stop > start:
            raise JobFailed(
                f"{folder}: its parts {ranges} hold row {start} of {size} twice, or one that is not there: was it made "
                "by two jobs at once? Remove the folder, and it is made anew"
            )
    return ranges


@storage.patient
def _row_groups(folder: str) -> list[tuple[str, int, int]]:
    """(file, number in it, rows) of each row group of a table, in order, from the footers of its files."""
    system, path = storage.filesystem(folder)
    found: list[tuple[str, int, int]] = []
    for name in storage.list_files(folder, ".parquet"):
        footer = pq.read_metadata(f"{path}/{name}", filesystem=system)
        found += [(name, group, footer.row_group(group).num_rows) for group in range(footer.num_row_groups)]
    return found


@storage.patient
def _rows(folder: str, groups: Iterable[tuple[str, int, int]], start: int, stop: int) -> pa.Table:
    """Rows `start` to `stop` of a table, reading only those of its row groups that they lie in."""
    system, path = storage.filesystem(folder)
    pieces, seen = [], 0
    for name, group, size in groups:
        low, high = max(start - seen, 0), min(stop - seen, size)
        if low < high:
            with system.open_input_file(f"{path}/{name}") as file:
                pieces.append(pq.ParquetFile(file).read_row_group(group).slice(low, high - low))
        seen += size
    return pa.concat_tables(pieces).replace_schema_metadata(None)


@storage.patient
def count_rows(folder: str) -> int:
    """Rows of the Parquet files of a directory, from their footers."""
    system, path = storage.filesystem(folder)
    return sum(
        pq.read_metadata(f"{path}/{name}", filesystem=system).num_rows
        for name in storage.list_files(folder, ".parquet")
    )


def run_stages(jobs: Sequence[StageJob], root: str, pool: ClusterConfig) -> list[Manifest]:
    """Make each job's artifact; those that are finished are left as they are, a half-made one goes on.

    All jobs share one pool of actors, so that models and interpreters start once per actor, not once per stage.

    Raises:
        JobFailed: a stage dropped more than `pool.max_dropped` of its cases; the first are shown. Or a stage raised it,
            or every actor dies at one slice.
        BadInput: a stage raised it, or an actor's node has other code than the driver or does not see the storage.
    """
    open_jobs = [job for job in jobs if finished(job.artifact, root) is None]
    if open_jobs:
        sizes = [count_rows(job.source) for job in open_jobs]
        with watching() as board:
            seconds = _run_slices(open_jobs, sizes, root, pool, board)
        for number, (job, size) in enumerate(zip(open_jobs, sizes)):
            _finish(job, size, root, seconds[number])
    manifests = [finished(job.artifact, root) for job in jobs]
    return [manifest for manifest in manifests if manifest is not None]


def _run_slices(
    jobs: Sequence[StageJob], sizes: Sequence[int], root: str, pool: ClusterConfig, board: Any
) -> Mapping[int, float]:
    """Make every slice that has no part yet; returns the seconds that actors spent on each job.

    Raises:
        JobFailed: too many cases of a job are dropped, which is told as soon as it cannot be mended any more.
    """
    done, seconds = Counter[int](), defaultdict[int, float](float)
    limits = [_Limit(job, size, root, pool.max_dropped) for job, size in zip(jobs, sizes)]
    todo = []
    for number, (job, size) in enumerate(zip(jobs, sizes)):
        missing = _missing_slices(job, size, root, pool)
        todo += [{"job": number, "start": start, "stop": stop} for start, stop in missing]
        done[number] = size - sum(stop - start for start, stop in missing)
    tellers = [Teller(board, f"{job.artifact.kind} {job.artifact.label}") for job in jobs]
    for number, size in enumerate(sizes):
        tellers[number](done[number], size)
    for batch in _slices_made(jobs, todo, root, pool, board):
        kind, sentence = map(str, batch["wrong"][0])
        if kind:
            raise _TOLD[kind](sentence)
        number = int(batch["job"][0])
        limits[number].add(int(batch["dropped"][0]))
        done[number] += int(batch["stop"][0] - batch["start"][0])
        seconds[number] += float(batch["seconds"][0])
        tellers[number](done[number], sizes[number])
    return seconds


def _missing_slices(job: StageJob, size: int, root: str, pool: ClusterConfig) -> list[tuple[int, int]]:
    """(start, stop) of the slices to be made: the rows that no part holds, whatever slices the parts were made in."""
    step, at = job.rows_per_slice or pool.rows_per_slice, 0
    slices: list[tuple[int, int]] = []
    for start, stop in [*_ranges(job.artifact.path(root), size), (size, size)]:
        slices += [(low, min(low + step, start)) for low in range(at, start, step)]
        at = stop
    return slices


def make_here(jobs: Sequence[StageJob], root: str, pool: ClusterConfig) -> None:
    """As `run_stages`, but all in this process, for one that holds its share of the cluster already.

    Raises:
        JobFailed: a stage dropped more than `pool.max_dropped` of its cases.
    """
    worker = _Worker(jobs, root, code_here())
    for number, job in enumerate(jobs):
        if finished(job.artifact, root) is None:
            started, size = time.monotonic(), count_rows(job.source)
            limit = _Limit(job, size, root, pool.max_dropped)
            for start, stop in _missing_slices(job, size, root, pool):
                limit.add(worker.make(number, start, stop))
            _finish(job, size, root, time.monotonic() - started)


def _slices_made(
    jobs: Sequence[StageJob], todo: list[dict[str, int]], root: str, pool: ClusterConfig, board: Any
) -> Iterable[dict[str, np.ndarray]]:
    if not todo:
        return []
    slices = ray.data.from_items(todo, override_num_blocks=len(todo))
    slices.context.execution_no_progress_timeout_s = -1  # a slice may take longer than any guard allows
    # Half a CPU each: actors that took every CPU would leave none for the tasks that feed them.
    made = slices.map_batches(
        _Worker,
        fn_constructor_args=(list(jobs), root, code_here(), board, _MOST_LOST),
        batch_size=1,
        batch_format="numpy",
        compute=_actors(min(pool.actors, len(todo))),
        num_cpus=0.5,
        num_gpus=pool.gpus_per_actor or None,
    )
    return made.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=0)


def _actors(n: int) -> ray.data.ActorPoolStrategy:
    """All start at once, and the pool may shrink to one when nodes die. Two slices wait with each busy actor, which so
    never stands still until the driver hands it the next: two actors on two cores are 1.8 times one, 1.7 with one slice
    waiting, 1.2 where they ask. No more than two, since some slices take a hundred times as long as others."""
    return ray.data.ActorPoolStrategy(min_size=1, initial_size=n, max_size=n, max_tasks_in_flight_per_actor=3)


@storage.patient
def dropped_rows(folder: str) -> list[tuple[str, str]]:
    """(id, reason) of the cases that gave no row, from the parts of an artifact."""
    system, path = storage.filesystem(folder)
    found: list[tuple[str, str]] = []
    for name in storage.list_files(folder, ".parquet"):
        metadata = pq.read_schema(f"{path}/{name}", filesystem=system).metadata or {}
        found.extend((case, reason) for case, reason in json.loads(metadata.get(_DROPPED, b"[]")))
    return found


def _numbers(folder: str) -> dict[str, float]:
    """Sums over the parts of an artifact of what its stage counted, such as calls and cost."""
    system, path = storage.filesystem(folder)
    sums = defaultdict[str, float](float)
    for name in storage.list_files(folder, ".parquet"):
        metadata = pq.read_schema(f"{path}/{name}", filesystem=system).metadata or {}
        for what, number in json.loads(metadata.get(_MEASURED, b"{}")).items():
            sums[what] += number
    return dict(sums)


class _Limit:
    """How many cases of a job are dropped so far, those of the parts that are there among them.

    Raises:
        JobFailed: more than `max_dropped` of all its cases.
    """

    def __init__(self, job: StageJob, size: int, root: str, max_dropped: float) -> None:
        self._job, self._size, self._root, self._max = job, size, root, max_dropped
        self._dropped = 0
        self.add(len(dropped_rows(job.artifact.path(root))))

    def add(self, dropped: int) -> None:
        """So many more. Raises: as the class."""
        self._dropped += dropped
        if dropped and not self._job.expands and self._dropped > self._max * self._size:
            artifact = self._job.artifact
            shown = dropped_rows(artifact.path(self._root))
            check_dropped(f"{artifact.kind} {artifact.label}: cases", shown, self._size, self._max)


def _finish(job: StageJob, size: int, root: str, seconds: float) -> None:
    """Raises: JobFailed: rows and dropped are not as many as the cases."""
    folder = job.artifact.path(root)
    dropped = dropped_rows(folder)
    reasons = Counter(reason for _, reason in dropped)
    rows, numbers = count_rows(folder), _numbers(folder)
    if not job.expands and rows + len(dropped) != size:
        raise JobFailed(f"{folder}: {rows} rows and {len(dropped)} dropped of {size} cases: remove it and start again")
    finish(job.artifact, root, rows=rows, dropped=reasons, seconds=seconds, measured=numbers)
