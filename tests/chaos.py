"""The pipeline on several nodes and S3, while parts of it are killed: `make chaos`.

The cluster is a head and two worker nodes on this machine. At random moments, drawn from the seed, one of each goes: a
ground-truth actor, a training worker, a whole worker node, the driver (which is then started again), and the storage
server, which stands still for a while. The tables must be those of a run that nothing disturbed.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

# Ray reads these when it is imported, which the next lines do.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=os.urandom(32).hex())

from tests.object_store import BUCKET, Server, environment
from tests.tiny import EXPERIMENT, config_in, plan_of, tables_of

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("actor", "train worker", "node", "driver", "storage")
LATEST = {"pipeline": 15.0, "ground_truth": 1.0}  # seconds between seeing something and killing it, at most
REPLACED_AFTER = 5.0  # seconds until there is a new node for a lost one
WORK = ("ray::MapWorker", "ray::RayTrainWorker")  # titles of actors and training workers
LONGEST = 1200.0  # seconds of a run
TABLES = {"pipeline": ("effects", "questions", "answers"), "ground_truth": ("effects", "questions")}


class Nodes:
    """A head and two worker nodes; lost ones are replaced."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        os.environ["RAY_TMPDIR"] = folder
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 150 * 2**20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self._workers = [self._new() for _ in range(2)]
        self._coming: list[tuple[float, Any]] = []  # when a lost node is replaced

    def _new(self) -> Any:
        return self._cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)

    def processes(self, title: str | tuple[str, ...]) -> list[psutil.Process]:
        """Those of this cluster whose title begins so, on worker nodes or the head."""
        nodes = [self._cluster.head_node, *self._workers]
        return [process for node in nodes for process in _children(node) if _title(process).startswith(title)]

    def at_work(self) -> list[psutil.Process]:
        """Actors and training workers, wherever they are."""
        return self.processes(WORK)

    def losable(self) -> list[Any]:
        """While there is work: the worker nodes that do some, or all of them where only the head does."""
        busy = [node for node in self._workers if any(map(_works, _children(node)))]
        return busy or (self._workers if self.at_work() else [])

    def lose(self, node: Any) -> None:
        """Raylet and workers at once, as when a machine is taken away. The job goes on while a new one comes."""
        victims = [_raylet(node), *_children(node)]
        self._workers.remove(node)
        for process in victims:
            _kill(process)
        self._coming.append((time.monotonic() + REPLACED_AFTER, node))

    def replace_lost(self) -> None:
        """Start new nodes for those that were lost some time ago; takes seconds, and the main thread."""
        due = [node for when, node in self._coming if when <= time.monotonic()]
        self._coming = [one for one in self._coming if one[1] not in due]
        for node in due:
            node.kill_all_processes(check_alive=False, allow_graceful=False)
            self._workers.append(self._new())

    def stop(self) -> None:
        lost = [node for _, node in self._coming]
        for node in [*lost, *self._workers, self._cluster.head_node]:
            node.kill_all_processes(check_alive=False, allow_graceful=False)


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _children(node: Any) -> list[psutil.Process]:
    try:
        return _raylet(node).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:
        return ""


def _works(process: psutil.Process) -> bool:
    return _title(process).startswith(WORK)


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


@dataclass
class Run:
    """One run of a job, disturbed by those of `kinds` that are still to come."""

    job: str
    config: str
    nodes: Nodes
    server: Server
    chance: random.Random
    kinds: list[str]
    started: float = field(default_factory=time.monotonic)
    driver: Any = None
    drivers: int = 0
    told: list[str] = field(default_factory=list)
    _due: dict[str, float] = field(default_factory=dict)

    def to_the_end(self) -> float:
        """Seconds until the job has ended well.

        Raises:
            AssertionError: it ended badly by itself, took too long, or ended before all was killed.
        """
        while self.driver is None or self.driver.poll() is None or self.driver.returncode == -signal.SIGKILL:
            if self.driver is None or self.driver.poll() is not None:
                self._start_driver()
            for kind in [kind for kind in self.kinds if self._is_due(kind)]:
                self.kinds.remove(kind)
                self._disturb(kind)
            self.nodes.replace_lost()
            assert time.monotonic() - self.started < LONGEST, f"not done after {LONGEST:.0f} s: {self._log()}"
            time.sleep(0.1)
        assert self.driver.returncode == 0, f"the job ended with {self.driver.returncode}: {self._log()}"
        assert not self.kinds, f"the job ended before these could be disturbed: {self.kinds}"
        return time.monotonic() - self.started

    def _start_driver(self) -> None:
        self.drivers += 1
        with open(Path(self.config).parent / f"driver-{self.drivers}.log", "wb") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs" / f"{self.job}.py"), "--config", self.config],
                cwd=Path(self.config).parent,
                env=os.environ | {"RAY_ADDRESS": self.nodes.address},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self) -> str:
        logs = sorted(Path(self.config).parent.glob("driver-*.log"))
        return "\n".join(logs[-1].read_text(errors="replace").splitlines()[-30:]) if logs else ""

    def _is_due(self, kind: str) -> bool:
        """A moment is drawn when there is first something to kill; it comes when there still is."""
        if not self._victims(kind):
            return False
        due = self._due.setdefault(kind, time.monotonic() + self.chance.uniform(0, LATEST[self.job]))
        return time.monotonic() >= due

    def _victims(self, kind: str) -> Sequence[Any]:
        find: dict[str, Callable[[], Sequence[Any]]] = {
            "actor": lambda: self.nodes.processes("ray::MapWorker"),
            "train worker": lambda: self.nodes.processes("ray::RayTrainWorker"),
            "node": self.nodes.losable,
            "driver": self.nodes.at_work,  # so that it dies at work
            "storage": self.nodes.at_work,
        }
        return find[kind]()

    def _disturb(self, kind: str) -> None:
        victims = self._victims(kind)
        if not victims:
            self.kinds.append(kind)
            return
        if kind == "storage":
            seconds = self.chance.uniform(5, 15)
            self.server.process.send_signal(signal.SIGSTOP)
            threading.Timer(seconds, self.server.process.send_signal, [signal.SIGCONT]).start()
            return self._tell(f"storage stands still for {seconds:.0f} s")
        if kind == "driver":
            os.killpg(self.driver.pid, signal.SIGKILL)
            return self._tell(f"driver {self.driver.pid} killed")
        victim = self.chance.choice(list(victims))
        if kind == "node":
            self._tell(f"node with {', '.join(sorted(_title(p) for p in _children(victim) if _works(p)))} lost")
            return self.nodes.lose(victim)
        self._tell(f"{kind} killed: {_title(victim)} ({victim.pid})")
        return _kill(victim)

    def _tell(self, what: str) -> None:
        self.told.append(what)
        print(f"  {time.monotonic() - self.started:6.1f} s  {what}", flush=True)


@contextmanager
def running(folder: str) -> Iterator[Nodes]:
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.stop()


def run_once(job: str, server: Server, label: str, seed: int, kinds: Sequence[str]) -> tuple[float, dict[str, Any]]:
    """Seconds and tables of one run, on a cluster and in a folder of its own."""
    # Sockets lie in the cluster's folder, and their paths may not be long.
    with (
        tempfile.TemporaryDirectory(prefix="chaos-") as work,
        tempfile.TemporaryDirectory(prefix="rc-", ignore_cleanup_errors=True) as sessions,
    ):
        train = EXPERIMENT["train"] | {"checkpoint_every": 3}
        config = config_in(Path(work), storage=f"s3://{BUCKET}/{label}", train=train)
        with running(sessions) as nodes:
            run = Run(job, config, nodes, server, random.Random(seed), list(kinds))
            seconds = run.to_the_end()
        tables = tables_of(plan_of(config), TABLES[job])
    print(f"{label}: {seconds:.0f} s, {run.drivers} driver{'s' if run.drivers > 1 else ''}", flush=True)
    return seconds, tables


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every seed gave the tables of the undisturbed run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--job", choices=list(TABLES), default="pipeline")
    parser.add_argument("--undisturbed", help="config of a finished run of the tiny experiment, instead of a first run")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "server.log")
        os.environ.update(environment(server.port))
        os.environ.update(PYTHONPATH=str(ROOT))
        try:
            if arguments.undisturbed:
                calm, expected = 0.0, tables_of(plan_of(arguments.undisturbed), TABLES[arguments.job])
            else:
                calm, expected = run_once(arguments.job, server, "undisturbed", 0, [])
            for seed in arguments.seeds:
                print(f"seed {seed}", flush=True)
                seconds, found = run_once(arguments.job, server, f"seed-{seed}", seed, arguments.kinds)
                same = found == expected
                print(
                    f"seed {seed}: {'the same tables' if same else 'OTHER TABLES'}, {seconds - calm:+.0f} s", flush=True
                )
                if not same:
                    return 1
        finally:
            server.process.send_signal(signal.SIGCONT)
            server.stop()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
