"""Time and cost of the paper's full runs from measured speeds: `docs/scaling.md` explains the formulas.

    python tests/benchmarks/scaling.py measure --actors 1 2 4   # on a quiet machine: sets `actors` in docs/scaling.json
    python tests/benchmarks/scaling.py tables                   # writes the tables of docs/scaling.md anew

Everything that is measured or assumed stands in docs/scaling.json; nothing else goes into the tables.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
INPUTS, PAGE = ROOT / "docs" / "scaling.json", ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
GPUS = (1, 8, 64)


class Work(NamedTuple):
    """A stage of an experiment."""

    name: str
    flop: float
    slices: int  # pieces that are handed out whole; 0 for a training, which all GPUs share step by step
    vectors: int  # that each node holds in memory while it runs


def works(given: Mapping[str, Any]) -> Iterator[Work]:
    """The stages of the paper's runs on one 8B target with one explainer for each task."""
    n, d, layers, d_sae = (given["model"][key] for key in ("parameters", "d_model", "n_layers", "d_sae"))
    run, size = given["runs"], given["rows_per_slice"]
    exemplars = run["corpus_tokens"] * (2 * n + layers * 2 * d * d_sae)
    yield Work("exemplars of all features", exemplars, layers, 0)
    patches = run["patches"] * run["patch_tokens"] * 2 * n * run["patch_share"]
    yield Work("patching effects", patches, math.ceil(run["patches"] / size), 0)
    removals = run["ablations"] * 2 * run["ablation_tokens"] * 2 * n
    yield Work("ablation effects", removals, math.ceil(run["ablations"] / size), 0)
    for task, rows in (("features", layers * d_sae), ("patching", run["patches"]), ("ablation", run["ablations"])):
        flop = rows * run["epochs"] * run["question_tokens"][task] * 6 * n
        yield Work(f"training, {task}", flop, 0, rows if task != "ablation" else 0)
    asked = run["test_questions"] * (1 + run["controls"])
    answers = asked * (run["question_tokens"]["patching"] + run["answer_tokens"]) * 2 * n
    yield Work("answers, one explainer", answers, math.ceil(asked / size), 0)


def hours(work: Work, gpus: int, given: Mapping[str, Any]) -> float:
    """Wall time: the start, which nobody shares, and the work, which goes in whole slices."""
    rate = given["gpu"]["train_flops"] if not work.slices else given["gpu"]["forward_flops"]
    share = 1 / gpus if not work.slices else math.ceil(work.slices / gpus) / work.slices
    start = given["start_seconds"] + given["model"]["bytes"] / given["read_bytes_per_second"]
    return (start + work.flop * share / rate) / 3600


def predicted(seconds: Mapping[int, float], cores: int) -> dict[int, float]:
    """What `seconds` of one actor and of two foretell for each number of actors, on two cores at least: starting takes
    a core for a time for each actor, and the actors share the work and the cores."""
    work = 2 * (seconds[1] - seconds[2])
    return {n: (seconds[1] - work) * max(1, n / cores) + work / min(n, cores) for n in seconds}


def tables(given: Mapping[str, Any]) -> str:
    """All tables, as Markdown."""
    parts = [_runs(given), _matrix(given), _held(given)]
    if given.get("actors"):
        parts.append(_check(given["actors"]))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] + ["---:"] * (len(head) - 1), *rows)]
    return "\n".join(lines)


def _runs(given: Mapping[str, Any]) -> str:
    price, rows, total = given["gpu"]["dollars_per_hour"], [], dict.fromkeys(GPUS, 0.0)
    for work in works(given):
        times = [hours(work, n, given) for n in GPUS]
        for n, took in zip(GPUS, times):
            total[n] += took
        rows.append([work.name, f"{work.flop:.1e}", *map(_time, times)])
    rows.append(["all, one after the other", "", *(_time(total[n]) for n in GPUS)])
    rows.append([f"cost at ${price:g} a GPU hour", "", *(f"${total[n] * n * price:,.0f}" for n in GPUS)])
    return _table(["stage", "FLOP", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS)], rows)


def _matrix(given: Mapping[str, Any]) -> str:
    by_name, rows = {work.name: work for work in works(given)}, []
    for tasks in (("patching", "ablation"), ("patching", "ablation", "features")):
        pairing = [by_name[name] for name in (*(f"training, {task}" for task in tasks), "answers, one explainer")]
        trial = sum(hours(work, 1, given) for work in pairing)
        for explainers, targets, seeds in given["matrices"]:
            runs = explainers * targets * seeds
            times = [math.ceil(runs / n) * trial for n in GPUS]
            cost = f"${runs * trial * given['gpu']['dollars_per_hour']:,.0f}"
            size = f"{explainers} x {targets} x {seeds} seeds"
            rows.append([size, ", ".join(tasks), str(runs), *map(_time, times), cost])
    head = ["explainers x targets", "trained on", "trials", *(f"{n} GPU{'s' * (n > 1)}" for n in GPUS), "cost"]
    return _table(head, rows)


def _held(given: Mapping[str, Any]) -> str:
    """What a node holds of the questions while it trains: vectors once, on its disk, and token ids in each worker."""
    width, node, rows = given["model"]["d_model"] * 4, given["node"], []
    for work in works(given):
        if work.vectors:
            ids = work.vectors * given["bytes_per_question"] * node["gpus"]
            verdict = "fits" if ids < node["memory_bytes"] else "does not fit"
            sizes = [f"{size / 2**30:,.1f} GiB" for size in (work.vectors * width, ids)]
            rows.append([work.name, f"{work.vectors:,}", *sizes, verdict])
    workers, memory = f"token ids of {node['gpus']} workers", f"in {node['memory_bytes'] >> 30} GiB of memory"
    return _table(["stage", "questions", "vectors, on a node's disk", workers, memory], rows)


def _check(actors: Mapping[str, Any]) -> str:
    seconds = {int(n): took for n, took in actors["seconds"].items()}
    told = predicted(seconds, actors["cores"])
    rows = [[str(n), f"{took:.1f} s", f"{told[n]:.1f} s", f"{told[n] / took - 1:+.0%}"] for n, took in seconds.items()]
    return _table(
        [f"actors ({actors['cores']} cores, {actors['cases']:,} patches)", "measured", "model", "off by"], rows
    )


def _time(hours_: float) -> str:
    if hours_ < 1:
        return f"{hours_ * 60:.0f} min"
    return f"{hours_:.1f} h" if hours_ < 72 else f"{hours_ / 24:.1f} days"


def measure(actors: Sequence[int], cases: int) -> dict[str, Any]:
    """Seconds of the patching stage on a random model with so many actors, each time with new ones."""
    import ray

    from ray_explain import storage
    from ray_explain.artifacts import Artifact
    from ray_explain.config import ClusterConfig
    from ray_explain.distributed.run_stages import StageJob, run_stages
    from ray_explain.ground_truth.patching import PatchingStage
    from ray_explain.ground_truth.world_cases import patching_cases
    from ray_explain.world.facts import World
    from ray_explain.world.pretraining import TargetSize, new_target, save_target
    from ray_explain.world.tokenizer import world_tokenizer

    world, found = World(), dict[str, float]()
    tokenizer = world_tokenizer(world)
    ray.init(address="local", num_cpus=max(8, os.cpu_count() or 1), include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as root:
        size = TargetSize(d_model=512, n_layers=8, n_heads=8)
        save_target(new_target("llama", tokenizer, size, seed=0), tokenizer, Path(root, "model"))
        blocks = [(layer, layer) for layer in range(8)]
        made = patching_cases(world, tokenizer, n={"train": cases}, layers=blocks, seed=0)
        source = Artifact(kind="patching_cases", label="bench", config={})
        storage.write_table(made, f"{source.path(root)}/table.parquet", row_group_size=256)
        for n in actors:
            job = StageJob(
                stage=PatchingStage,
                config={"model": f"{root}/model", "revision": None, "dtype": "float32"},
                source=source.path(root),
                artifact=Artifact(kind="patching_effects", label="bench", config={"actors": n}, parents=(source,)),
            )
            started = time.monotonic()
            run_stages([job], root, ClusterConfig(actors=n, rows_per_slice=128))
            found[str(n)] = round(time.monotonic() - started, 2)
    ray.shutdown()
    return {"cores": os.cpu_count(), "cases": cases, "seconds": found}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "tables"])
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cases", type=int, default=8192)
    options = parser.parse_args()
    given = json.loads(INPUTS.read_text())
    if options.what == "measure":
        given["actors"] = measure(options.actors, options.cases)
        INPUTS.write_text(json.dumps(given, indent=2) + "\n")
        print(json.dumps(given["actors"]))
    PAGE.write_text(page(PAGE.read_text(), given))


def page(text: str, given: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables(given)}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
