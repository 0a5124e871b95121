"""One run of a job: what steps of an experiment share."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.distributed.plan import Plan
from ray_explain.stages import Result

ROWS_PER_GROUP = 256  # of the Parquet files that actors read slices of
TABLE = "table.parquet"


@dataclass
class Session:
    """One run of a job: its plan, a console, and Ray, which starts when something first needs it."""

    plan: Plan
    console: Console = field(default_factory=lambda: Console(markup=False))  # errors of others hold [brackets]
    _stack: ExitStack = field(default_factory=ExitStack)
    _started: bool = False
    _trains: bool = False

    def __enter__(self) -> "Session":
        if storage.is_remote(self.plan.root):
            from ray_explain.distributed.checks import check_storage

            check_storage(self.plan.root)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start_ray(self) -> None:
        """Ray is running afterwards.

        Raises:
            BadInput: the cluster is not there, or cannot be used for this experiment.
        """
        # These take a second that a finished experiment can save.
        from ray_explain.distributed.checks import check_gpus, unused_gpus
        from ray_explain.distributed.cluster import check_shared, cluster

        wanted = self.plan.experiment.cluster
        if self._started:
            check_shared(self.plan.experiment.storage, wanted)  # nodes may have come since
        else:
            self._stack.enter_context(cluster(self.plan.experiment.storage, wanted))
            check_gpus(wanted)
            if (told := unused_gpus(wanted)) is not None:
                self.say(told)
            self._started = True
            self._check_workers()

    def start_early(self, ends: Iterable[Artifact], *, trains: bool = False) -> None:
        """Where some of what the job ends with is missing, and is to be made on a cluster of others or with GPUs, Ray
        starts now: who has none is told before anything is read. `trains` says that explainers will be trained.

        Raises:
            BadInput: as `start_ray`.
            JobFailed: the cluster can never have the workers of a training that is still to come.
        """
        self._trains, wanted = self._trains or trains, self.plan.experiment.cluster
        needs_more = os.environ.get("RAY_ADDRESS") or wanted.gpus_per_actor or wanted.gpus_per_worker
        if needs_more and not self._started and self.missing(list(ends)):
            self.start_ray()

    def _check_workers(self) -> None:
        from ray_explain.distributed.capacity import check_capacity, fleet

        plan, wanted = self.plan, self.plan.experiment.cluster
        missing = [run for run in plan.runs() if self.missing([plan.explainer(run)])]
        if self._trains and missing:
            most = max(plan.train_config(run).workers for run in missing)
            check_capacity(most, fleet(wanted), gpus_per_worker=wanted.gpus_per_worker)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def missing(self, artifacts: Sequence[Artifact]) -> list[Artifact]:
        """Those that are not finished."""
        return [artifact for artifact in artifacts if finished(artifact, self.plan.root) is None]

    def table(self, artifact: Artifact, columns: list[str] | None = None) -> pa.Table:
        """The rows of a finished table; all columns unless some are named."""
        return storage.read_table(self.plan.path(artifact), columns)

    def split(self, artifact: Artifact, split: str) -> pa.Table:
        """The rows of a split; those of the others, with their vectors, may be more than the driver's memory holds."""
        rows = np.flatnonzero(pc.equal(self.table(artifact, ["split"])["split"], split))
        return pa.concat_tables(storage.read_rows(self.plan.path(artifact), rows))

    def parts(self, artifact: Artifact) -> Iterator[pa.Table]:
        """The rows of a finished table, some at a time: what was made on the driver lies in one file."""
        return storage.read_batches(self.plan.path(artifact))

    def make_table(self, artifact: Artifact, make: Callable[[], pa.Table | Result]) -> None:
        """A table that is made on the driver, unless it is there."""

        def parts() -> Iterator[Result]:
            made = make()
            yield made if isinstance(made, Result) else Result(made, [])

        self.make_parts(artifact, parts)

    def make_parts(self, artifact: Artifact, parts: Callable[[], Iterator[Result]]) -> None:
        """As `make_table`, part by part; there is at least one."""
        if not self.missing([artifact]):
            return
        started, rows, reasons = time.monotonic(), 0, Counter[str]()
        measured: dict[str, Any] = {}
        with storage.table_writer(f"{self.plan.path(artifact)}/{TABLE}", row_group_size=ROWS_PER_GROUP) as write:
            for made in parts():
                write(made.table)
                rows += made.table.num_rows
                reasons.update(reason for _, reason in made.dropped)
                measured |= made.measured
        seconds = time.monotonic() - started
        finish(artifact, self.plan.root, rows=rows, dropped=reasons, seconds=seconds, measured=measured)
