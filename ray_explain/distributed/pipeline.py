"""The report of an experiment, and the whole way to it."""

import os
import platform
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from ray_explain import storage
from ray_explain.artifacts import Artifact, Manifest, commit, finished, versions
from ray_explain.config import Task
from ray_explain.distributed.evaluation import evaluate, marked
from ray_explain.distributed.explainers import train_explainers
from ray_explain.distributed.ground_truth import export_ground_truth, make_ground_truth
from ray_explain.distributed.models import make_models
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.power import say_power
from ray_explain.distributed.session import Session
from ray_explain.distributed.training_plan import plan_training
from ray_explain.evaluation.calibration import calibrations
from ray_explain.evaluation.comparisons import self_advantage
from ray_explain.evaluation.grading import rows_of, series_of
from ray_explain.evaluation.metrics import headline, measured
from ray_explain.evaluation.shares import Shares, shown
from ray_explain.report.data import ReportData, WorkedExample
from ray_explain.report.examples import examples_of
from ray_explain.report.page import write_report

NO_LABEL = "not known: nobody described this vector"  # instead of the truth of a question

__all__ = [
    "Plan",
    "Session",
    "evaluate",
    "export_ground_truth",
    "make_ground_truth",
    "make_models",
    "make_report",
    "plan_training",
    "run_pipeline",
    "run_sweep",
    "say_power",
    "train_explainers",
]


def run_pipeline(session: Session) -> None:
    """Everything, then a table of what was made and where the report is."""
    started = time.monotonic()
    report = make_report(session)
    _say_summary(session, time.monotonic() - started, report)


def run_sweep(session: Session) -> None:
    """All trials of the experiment, then the report of those that did best."""
    from ray_explain.distributed.sweep import sweep  # Ray Tune takes a second to import

    sweep(session)


def make_report(session: Session, *, notes: Sequence[str] = ()) -> str:
    """The report, written anew each time: it costs a second and may hold words of a newer version. `notes` are what its
    reader has to know before the numbers, beside what the plan says of itself."""
    evaluate(session)
    plan = session.plan
    return write_report(_report_data(session, notes), f"{plan.root}/report")


def all_artifacts(plan: Plan) -> Iterator[Artifact]:
    """Everything the scores are made from, parents first, each once."""

    def below(artifact: Artifact, seen: dict[str, Artifact]) -> dict[str, Artifact]:
        for parent in artifact.parents:
            below(parent, seen)
        seen.setdefault(artifact.fingerprint, artifact)
        return seen

    return iter(below(plan.scores(), {}).values())


def _manifests(plan: Plan) -> list[Manifest]:
    found = (finished(artifact, plan.root) for artifact in all_artifacts(plan))
    return [manifest for manifest in found if manifest is not None]


def _report_data(session: Session, notes: Sequence[str]) -> ReportData:
    plan, folder = session.plan, session.plan.path(session.plan.scores())
    graded, scores, comparisons = (
        storage.read_table(f"{folder}/{name}") for name in ("graded", "scores", "comparisons")
    )
    explainers = plan.experiment.explainers
    seed, resamples = plan.experiment.seed, plan.experiment.evaluate.resamples
    asked = graded.filter(pc.is_in(graded["explainer"], pa.array(explainers)))
    as_shown = shown(asked, Shares(series_of(asked), explainers))
    headlines = {task: headline(task, [metric.name for metric in measured(graded)]) for task in plan.experiment.tasks}
    right_or_wrong = pa.array([task for task, metric in headlines.items() if metric == "exact_match"], pa.string())
    manifests = _manifests(plan)
    return ReportData(
        title=f"{plan.experiment.name}: language models explaining their own computations",
        scores=scores,
        comparisons=comparisons,
        explainers={name: name for name in explainers},
        examples=list(_examples(session, as_shown, headlines)),
        advantages=self_advantage(asked, seed=seed, resamples=resamples),
        calibrations=calibrations(
            as_shown.filter(pc.is_in(as_shown["task"], right_or_wrong)), explainers, seed=seed, resamples=resamples
        ),
        targets={target: _target_facts(session, target) for target in plan.experiment.targets},
        provenance=manifests,
        run=_run_facts(manifests),
        notes=[*notes, *_notes(plan)],
    )


def _run_facts(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """Which code ran where, how much it made, and for how long."""
    return {
        "versions": versions() | {"commit": commit()},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        },
        "sizes": _sizes(manifests),
        "seconds": _seconds(manifests),
    }


def _notes(plan: Plan) -> list[str]:
    """What a reader has to know before the numbers."""
    notes, judge = list[str](), marked(plan)
    if plan.experiment.evaluate.split == "validation":
        notes.append(
            "Scored on the validation questions: where these chose among settings or explainers too (`sweep.metric`, "
            "`train.keep: best`), new questions may be answered worse."
        )
    if judge.get("unscored"):
        notes.append(
            f"The judge gave no mark for {judge['unscored']:,} of {judge['answers']:,} answers: these are unscored, "
            "and left out of its score. jobs/evaluate.py asks for them again."
        )
    return notes


def _target_facts(session: Session, target: str) -> dict[str, Any]:
    """What a target has learned, and how often an intervention changes its answer."""
    plan, facts = session.plan, dict[str, Any]()
    model = finished(plan.model(target), plan.root)
    if model is not None:
        facts |= {name.replace("_", " "): value for name, value in model.measured["quality"].items()}
        facts["parameters"] = model.measured["parameters"]
    for task in plan.experiment.tasks:
        column = "descriptions" if task == "features" else "changed"
        told = session.table(plan.effects(task, target), [column])[column]
        if task == "features":
            facts["features described"] = pc.sum(pc.greater(pc.list_value_length(told), 0)).as_py()
        else:
            facts[f"{task} changes the answer"] = pc.mean(told.cast(pa.float64())).as_py()
    return facts


def _sizes(manifests: Iterable[Manifest]) -> dict[str, int]:
    """Rows of each kind of table."""
    sizes: dict[str, int] = {}
    for manifest in manifests:
        if manifest.kind.endswith(("_effects", "_questions", "_answers")):
            sizes[manifest.kind.replace("_", " ")] = sizes.get(manifest.kind.replace("_", " "), 0) + manifest.rows
    return sizes


def _seconds(manifests: Iterable[Manifest]) -> dict[str, float]:
    """Seconds of work on each kind of artifact; several are made side by side."""
    seconds: dict[str, float] = {}
    for manifest in manifests:
        kind = manifest.kind.replace("_", " ")
        seconds[kind] = seconds.get(kind, 0.0) + manifest.seconds
    return {kind: took for kind, took in seconds.items() if took >= 1}


def _examples(session: Session, graded: pa.Table, headlines: Mapping[Task, str]) -> Iterator[WorkedExample]:
    """Some questions of every task, target and explainer with its answers as the report shows them, of its first seed
    there; `graded` holds these alone."""
    plan = session.plan
    told = {(one["task"], one["target"], one["explainer"], one["seed"], one["fraction"]) for one in series_of(graded)}
    for target, task in plan.target_tasks():
        chosen = {
            run: examples_of(rows_of(graded, _series(run, task)), headlines[task])
            for run in shown_runs(plan, task, target, told)
        }
        ids = [one.question_id for those in chosen.values() for one in those]
        asked = _rows_about(ids, session.table(plan.questions(task, target), ["question_id", "prompt", "answer"]))
        questions = {row["question_id"]: row for row in asked}
        for run, those in chosen.items():
            said: dict[str, dict[str, str]] = {}
            for row in _rows_about(ids, session.table(plan.answers(run, task), ["question_id", "control", "text"])):
                said.setdefault(row["question_id"], {})[row["control"]] = row["text"]
            for one in those:
                question, answers = questions[one.question_id], said[one.question_id]
                yield WorkedExample(
                    task=task,
                    target=target,
                    explainer=run.explainer,
                    question=question["prompt"],
                    truth=question["answer"] or NO_LABEL,
                    answer=answers["none"],
                    right=one.right,
                    score=one.score,
                    controls={control: text for control, text in answers.items() if control != "none"},
                )


def _series(run: Run, task: Task) -> dict[str, Any]:
    return {"task": task, "target": run.target, "explainer": run.explainer, "seed": run.seed, "control": "none"}


def shown_runs(plan: Plan, task: Task, target: str, told: Container[tuple[str, str, str, int, float]]) -> Iterable[Run]:
    """The first run of each explainer that was asked about a task of the target, of the series in `told` (task, target,
    explainer, seed, fraction)."""
    first: dict[str, Run] = {}
    for run in plan.runs():
        asked = run.target == target and task in run.tasks and not run.text_only
        if asked and (task, target, run.explainer, run.seed, run.fraction) in told:
            first.setdefault(run.explainer, run)
    return first.values()


def _rows_about(question_ids: Sequence[str], table: pa.Table) -> list[dict[str, Any]]:
    """The few rows that are shown, of maybe millions."""
    return table.filter(pc.is_in(table["question_id"], pa.array(question_ids, pa.string()))).to_pylist()


def _say_summary(session: Session, seconds: float, report: str) -> None:
    manifests, kinds = _manifests(session.plan), dict[str, list[Manifest]]()
    for manifest in manifests:
        kinds.setdefault(manifest.kind.replace("_", " "), []).append(manifest)
    table = Table(title=f"{session.plan.experiment.name}: what was made", title_justify="left")
    for name, justify in [("artifact", "left"), ("number", "right"), ("rows", "right"), ("dropped", "right")]:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("seconds of work", justify="right")
    for kind, members in kinds.items():
        dropped = sum(sum(member.dropped.values()) for member in members)
        rows, took = sum(member.rows for member in members), sum(member.seconds for member in members)
        table.add_row(kind, str(len(members)), f"{rows:,}", f"{dropped:,}" if dropped else "", f"{took:.0f}")
    session.console.print(table)
    session.say(f"{seconds:.0f} seconds. The report: {report}")
