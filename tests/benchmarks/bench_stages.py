"""What Ray costs the ground truth, how it grows with actors, and whether an actor's memory stays flat.

`make bench`, or `python tests/benchmarks/bench_stages.py [--cases 20000] [--memory-cases 100000] [--actors 1 2 4]`;
prints Markdown. The target has the demo's size and random weights: speed does not depend on them. Every contestant
writes the same slices of the same cases to disk; its rate is that of the second half of them, since starting
interpreters is paid once, however many cases there are (the time to the first slice is shown beside).
"""

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# As in one process: Ray gives its workers a lower priority than the driver, and so than whatever else runs.
os.environ.setdefault("RAY_worker_niceness", "0")

import psutil
import pyarrow as pa
import torch

import ray_explain.distributed  # noqa: F401 - sets how Ray behaves
from ray_explain import records, storage
from ray_explain.artifacts import Artifact
from ray_explain.config import ClusterConfig
from ray_explain.distributed.cluster import cluster
from ray_explain.distributed.run_stages import StageJob, run_stages
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.world_cases import patching_cases
from ray_explain.world.facts import LAYER_NUMBERS, World
from ray_explain.world.pretraining import TargetSize, new_target, save_target
from ray_explain.world.tokenizer import world_tokenizer

ROWS_PER_SLICE = 256
SIZE = TargetSize(d_model=96, n_layers=4, n_heads=4)
PREFIX = "{} {} {} : "  # words of the world


class Measured(NamedTuple):
    rate: float  # cases a second
    first_slice: float  # seconds from the start


def save_random_target(folder: Path) -> None:
    tokenizer = world_tokenizer(World())
    save_target(new_target("llama", tokenizer, SIZE, seed=0), tokenizer, folder)


def distinct_cases(n: int) -> pa.Table:
    """World cases, each behind a number of its own: no prompt comes twice, so nothing can be answered from a cache."""
    world, n_pairs = World(), min(n, 4000)
    blocks = [(layer, layer) for layer in range(SIZE.n_layers)]
    rows = patching_cases(world, world_tokenizer(world), n={"train": n_pairs}, layers=blocks, seed=0).to_pylist()
    made = []
    for i in range(n):
        row, prefix = rows[i % n_pairs], PREFIX.format(*_digits(i))
        moved = {name: [p + len(prefix.split()) for p in row[name]] for name in ("base_positions", "source_positions")}
        texts = {name: prefix + row[name] for name in ("base_prompt", "source_prompt")}
        made.append(row | moved | texts | {"case_id": f"case {i}"})
    return records.rows_table(made, records.PATCHING_CASES)


def _digits(i: int) -> tuple[int, int, int]:
    return i // LAYER_NUMBERS**2 % LAYER_NUMBERS, i // LAYER_NUMBERS % LAYER_NUMBERS, i % LAYER_NUMBERS


def job(cases: pa.Table, target: Path, root: str, name: str) -> StageJob:
    source = Artifact(kind="patching_cases", label=name, config={})
    storage.write_table(cases, f"{source.path(root)}/table.parquet", row_group_size=ROWS_PER_SLICE)
    return StageJob(
        stage=PatchingStage,
        config={"model": str(target), "revision": None, "dtype": "float32"},
        source=source.path(root),
        artifact=Artifact(kind="patching_effects", label=name, config={}, parents=(source,)),
    )


def measured(folder: str, started: float) -> Measured:
    """From the times at which the slices were written; the rate is that of the second half, when all processes work."""
    made = sorted(path.stat().st_mtime for path in Path(folder).glob("part-*.parquet"))
    half = len(made) // 2
    return Measured((len(made) - 1 - half) * ROWS_PER_SLICE / (made[-1] - made[half]), made[0] - started)


def plain_loop(work: StageJob, root: str) -> Measured:
    """The same slices in this process, without Ray."""
    started, stage = time.time(), work.stage(work.config)
    cases = storage.read_table(work.source).replace_schema_metadata(None)
    folder = work.artifact.path(root)
    for start in range(0, cases.num_rows, ROWS_PER_SLICE):
        made, dropped, _ = stage(cases.slice(start, ROWS_PER_SLICE))
        assert not dropped, dropped[0]
        storage.write_table(made, f"{folder}/part-{start:010d}.parquet")
    return measured(folder, started)


def with_ray(work: StageJob, root: str, actors: int) -> Measured:
    started = time.time()
    run_stages([work], root, ClusterConfig(actors=actors, rows_per_slice=ROWS_PER_SLICE))
    return measured(work.artifact.path(root), started)


def cost_of_ray(n: int, actors: list[int], target: Path, root: str) -> None:
    cases, plain = distinct_cases(n), "a plain loop in one process"
    results = {plain: plain_loop(job(cases, target, root, "plain"), root)}
    for count in actors:
        results[f"Ray Data, {count} actor{'s' if count > 1 else ''}"] = with_ray(
            job(cases, target, root, f"{count}"), root, count
        )
    print(f"\n### {n:,} patching interventions on a target of the demo's size, a thread a process\n")
    print("| | interventions/s | of the plain loop | of one actor | seconds to the first slice |")
    print("| --- | ---: | ---: | ---: | ---: |")
    one = results.get("Ray Data, 1 actor", results[plain]).rate
    for name, (rate, first) in results.items():
        of_one = "" if name == plain else f"{rate / one:.2f}x"
        print(f"| {name} | {rate:,.0f} | {rate / results[plain].rate:.0%} | {of_one} | {first:.1f} |")


@contextmanager
def memory_watched(folder: str, seen: list[tuple[int, int]]) -> Iterator[None]:
    """Appends (cases done, bytes resident in the actor) to `seen` twice a second."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            actors = [
                p for p in psutil.process_iter(["cmdline"]) if "ray::MapWorker" in " ".join(p.info["cmdline"] or [])
            ]
            done = len(storage.list_files(folder, ".parquet")) * ROWS_PER_SLICE
            seen.extend((done, p.memory_info().rss) for p in actors if _ours(p))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _ours(process: psutil.Process) -> bool:
    return os.getpid() in [parent.pid for parent in process.parents()]


def memory(n: int, target: Path, root: str) -> None:
    work, seen = job(distinct_cases(n), target, root, "memory"), list[tuple[int, int]]()
    with memory_watched(work.artifact.path(root), seen):
        rate = with_ray(work, root, actors=1).rate
    print(f"\n### Resident memory of one actor over {n:,} cases ({rate:,.0f} a second), no prompt twice\n")
    print("| cases done | MiB | of that after 10 % |\n| ---: | ---: | ---: |")
    marks = [n * share // 100 for share in (10, 25, 50, 75, 99)]
    at = [next(resident for done, resident in seen if done >= mark) for mark in marks]
    for mark, resident in zip(marks, at):
        print(f"| {mark:,} | {resident / 2**20:,.0f} | {resident / at[0]:.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--memory-cases", type=int, default=100_000, help="0: leave it out")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root, cluster(root, ClusterConfig()):
        target = Path(root) / "target"
        target.mkdir()
        save_random_target(target)
        cost_of_ray(given.cases, given.actors, target, root)
        if given.memory_cases:
            memory(given.memory_cases, target, root)


if __name__ == "__main__":
    main()
