"""Sweeps: every explainer, target, seed, share of the data and training setting as a trial of Ray Tune.

A trial is a training as `train` does it, then the explainer's answers and their scores. What trials share (targets,
ground truth, questions) is made once before. Everything lies at its fingerprint, so a sweep that was interrupted runs
only the trials that have not ended, and ASHA holds them against what all reported before; Tune's own state is not
needed for that, and never read.
"""

import itertools
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from rich.table import Table

from ray_explain import records, storage
from ray_explain.artifacts import Artifact, Manifest, finish, finished
from ray_explain.config import AshaConfig, ClusterConfig, SweepConfig
from ray_explain.distributed.answers import answer_jobs, make_asked
from ray_explain.distributed.capacity import check_capacity, fleet
from ray_explain.distributed.checks import check_worker, code_here, way_out
from ray_explain.distributed.explainers import align, train_run
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.halting import verdicts_here
from ray_explain.distributed.pipeline import make_report
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.progress import watching
from ray_explain.distributed.questions import check_asked
from ray_explain.distributed.run_stages import StageJob, make_here
from ray_explain.distributed.session import TABLE, Session
from ray_explain.distributed.train import TrainRun, fit
from ray_explain.errors import BadInput, JobFailed
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.metrics import scores

logger = logging.getLogger(__name__)
TRIALS = "trials"
_RESTARTS = 3  # of a trial whose process died with its machine
# What a lost process or machine looks like from another: an actor's, a task's, or their results'.
_DEATHS = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,
)
_TO_HAVE_THEM = (
    "To have those that were stopped, start it again with sweep.asha=null and the chosen settings alone in "
    "`sweep.parameters`; what is done stays."
)
# Tune would send keys along in the environments of trials, which Ray writes to its logs. Nodes have their own.
class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
_MEMORY = 2**20  # bytes that a trial's own process reserves: without any resource Tune refuses it

TRIALS_SCHEMA = pa.schema(
    [
        pa.field("trial", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("tasks", pa.string(), nullable=False),  # joined by "+"
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("fraction", pa.float64(), nullable=False),
        pa.field("parameters", pa.string(), nullable=False),  # JSON
        pa.field("status", pa.string(), nullable=False),  # done | stopped (by ASHA) | failed
        pa.field("error", pa.string()),  # why it failed
        pa.field("chosen", pa.bool_(), nullable=False),  # of its run, the one for the report: its settings did best
        pa.field("in_report", pa.bool_(), nullable=False),  # of the chosen ones, those that are done
        pa.field("steps", pa.int32()),
        pa.field("loss", pa.float64()),  # of training, the last that is known
        pa.field("exact_match", pa.float64()),  # on the held-out questions of all its tasks
        pa.field("seconds", pa.float64()),  # of training
    ]
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One explainer with one choice of settings. All in it is plain, so that it can travel."""

    run: Run
    parameters: Mapping[str, Any]  # fields of `train`
    train: TrainRun
    answers: tuple[StageJob, ...]
    scores: Artifact  # the last thing that is made
    stopped: Artifact  # stands in for all of it when ASHA has stopped the training
    resamples: int

    @property
    def name(self) -> str:
        """Unique in the sweep."""
        return self.train.name

    @property
    def config(self) -> dict[str, Any]:
        """What TensorBoard shows beside its metrics."""
        shown = {**self.run._asdict(), "tasks": "+".join(self.run.tasks), **self.parameters}
        return {"name": self.name, **shown}


def sweep(session: Session) -> None:
    """Every trial, then one report of the settings that did best, and a table of all trials.

    Raises:
        JobFailed: some trials failed; the others are done, and in the report.
    """
    check_asked(session.plan)
    session.start_early((), trains=True)
    make_ground_truth(session)
    make_asked(session)
    trials, root = trials_of(session), session.plan.root
    todo = [trial for trial in trials if ended(trial, root) is None]
    failures: dict[str, str] = {}
    if todo:
        session.start_ray()
        n = concurrent(todo, session.plan.experiment.cluster)
        _align(session, todo)
        session.say(f"Sweep: {len(todo)} of {len(trials)} trials to do, {n} at a time")
        failures = _run(todo, session.plan, n, _cells(trials))
    best = best_settings(trials, root, session.plan.experiment.sweep)
    chosen = _with(trials, best)
    _tell(session, trials, failures, chosen)
    _report(session, chosen, best, failures)
    if failures:
        told = "; ".join(f"{name}: {failure}" for name, failure in failures.items())
        raise JobFailed(f"{len(failures)} of {len(trials)} trials failed: {told}")


def _report(
    session: Session,
    chosen: Sequence[Trial],
    best: Mapping[tuple[str, str], Mapping[str, Any]],
    failures: Mapping[str, str],
) -> None:
    """Of those of the chosen trials that are done, with a note of what it lacks."""
    statuses = {trial.run: _status(trial, session.plan.root, failures) for trial in chosen}
    without = {run for run, status in statuses.items() if status != "done"}
    note = lacking(statuses)
    if note:
        session.say(f"{note} {_TO_HAVE_THEM}" if "stopped" in statuses.values() else note)
    if len(without) == len(session.plan.runs()):
        session.say("No report: no trial of the chosen settings is done")
        return
    plan = Plan(session.plan.experiment.trained_with(best), without=without)
    try:
        session.say(f"The report: {make_report(replace(session, plan=plan), notes=[note] if note else [])}")
    except ValueError as error:  # what scores cannot be made with, such as an embedding model: the trials are done
        session.say(f"No report: {error}")


def lacking(statuses: Mapping[Run, str]) -> str:
    """What a report lacks of the runs with these statuses, as a sentence for people; empty where all are done."""
    series = defaultdict[Run, dict[int, str]](dict)
    for run, status in statuses.items():
        series[run._replace(seed=0)][run.seed] = status
    cut = {run: seeds for run, seeds in series.items() if set(seeds.values()) != {"done"}}
    told = [f"{_series_name(run)}: {_of_seeds(seeds)}" for run, seeds in cut.items()]
    return f"Not all trials of the chosen settings came to their end. {'; '.join(told)}." if told else ""


def _series_name(run: Run) -> str:
    return f"{run.speaker} of {run.target}, {'+'.join(run.tasks)}, fraction {run.fraction:g}"


def _of_seeds(statuses: Mapping[int, str]) -> str:
    """Of the seeds with these statuses: "of 3 seeds 1 stopped early (2), the report has 2"."""
    parts = []
    for status, told in (("stopped", "stopped early"), ("failed", "failed")):
        seeds = sorted(seed for seed, own in statuses.items() if own == status)
        if seeds:
            parts.append(f"{len(seeds)} {told} ({', '.join(map(str, seeds))})")
    left = sum(status == "done" for status in statuses.values())
    return f"of {len(statuses)} seed{'s' * (len(statuses) > 1)} {' and '.join(parts)}, the report has {left or 'none'}"


def _align(session: Session, todo: Sequence[Trial]) -> None:
    experiment, runs = session.plan.experiment, defaultdict[str, list[Run]](list)
    for trial in todo:
        runs[json.dumps(trial.parameters)].append(trial.run)
    pairs = list(itertools.product(experiment.explainers, experiment.targets))
    for parameters, some in runs.items():
        plan = Plan(experiment.trained_with({pair: json.loads(parameters) for pair in pairs}))
        align(replace(session, plan=plan), some)


# -- what there is to do ----------------------------------------------------------------------------------------------


def trials_of(session: Session) -> list[Trial]:
    """All trials of the experiment; those that would make the same explainer are one. Questions must be there."""
    experiment = session.plan.experiment
    pairs = list(itertools.product(experiment.explainers, experiment.targets))
    found: dict[str, Trial] = {}
    for parameters in experiment.sweep.combinations:
        plan = Plan(experiment.trained_with({pair: parameters for pair in pairs}))
        jobs = answer_jobs(plan)
        for run in plan.runs():
            explainer = plan.explainer(run)
            if explainer.fingerprint not in found:
                own = tuple(job for job in jobs if explainer in job.artifact.parents)
                found[explainer.fingerprint] = _trial_of(replace(session, plan=plan), run, parameters, own)
    return list(found.values())


def _trial_of(session: Session, run: Run, parameters: Mapping[str, Any], answers: tuple[StageJob, ...]) -> Trial:
    plan = session.plan
    evaluate, rules = plan.experiment.evaluate, plan.experiment.sweep
    config = {"resamples": evaluate.resamples, "seed": plan.experiment.seed, "split": evaluate.split}
    halted = {"metric": rules.metric, "asha": rules.asha and rules.asha.model_dump()}
    parents = tuple(job.artifact for job in answers)
    return Trial(
        run=run,
        parameters=dict(parameters),
        train=train_run(session, run),
        answers=answers,
        scores=Artifact(kind="trial_scores", label=run.name, config=config, parents=parents),
        stopped=Artifact(kind="stopped_trials", label=run.name, config=halted, parents=(plan.explainer(run),)),
        resamples=evaluate.resamples,
    )


def ended(trial: Trial, root: str) -> Manifest | None:
    """What says that nothing is left to do; None for a trial to be run."""
    return finished(trial.scores, root) or finished(trial.stopped, root)


def concurrent(trials: Iterable[Trial], cluster: ClusterConfig) -> int:
    """How many of the trials fit into the cluster side by side. Ray must be running.

    A trial takes its workers' CPUs and GPUs, and after its training one CPU and an actor's GPUs for its answers: it
    never waits for more than there is for it while others wait for it. Nodes that may be added count. On one machine no
    more CPUs count than it really has.

    Raises:
        JobFailed: the workers of a trial fit into no cluster that there will be.
    """
    workers, nodes = max(trial.train.train.workers for trial in trials), fleet(cluster)
    check_capacity(workers, nodes, gpus_per_worker=cluster.gpus_per_worker)
    most = nodes.places(cluster.gpus_per_worker)
    if len(nodes.now) == 1 and not nodes.most and not (cluster.gpus_per_worker or cluster.gpus_per_actor):
        most = min(most, os.cpu_count() or 1)
    return max(1, min(most // workers, nodes.places(cluster.gpus_per_actor)))


# -- running ----------------------------------------------------------------------------------------------------------


def _run(trials: Sequence[Trial], plan: Plan, n: int, cells: Mapping[str, int]) -> dict[str, str]:
    """Run the trials, `n` at a time; returns why some failed, by name. `cells` are those of all trials of the sweep."""
    rules, outcomes, verdicts = plan.experiment.sweep, _Outcomes(), verdicts_here()
    heard = f"{plan.root}/sweep/reports"
    with watching() as board:
        known = {"trials": {trial.name: trial for trial in trials}, "root": plan.root, "verdicts": verdicts}
        trainable = tune.with_parameters(
            _trial, **known, board=board, cluster=plan.experiment.cluster, code=code_here()
        )
        tune.Tuner(
            tune.with_resources(trainable, {"CPU": 0, "memory": _MEMORY}),
            param_space={"trial": tune.grid_search([trial.config for trial in trials])},
            tune_config=tune.TuneConfig(
                scheduler=None if rules.asha is None else PerCell(rules, rules.asha, verdicts, cells, heard),
                max_concurrent_trials=n,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=_run_config(plan.root, outcomes),
        ).fit()
    ray.kill(verdicts)
    lost = {trial.name for trial in trials if ended(trial, plan.root) is None} - set(outcomes.failures)
    return outcomes.failures | {
        name: f"its process died, more often than it is started again: {outcomes.deaths.get(name, '')}" for name in lost
    }


def _run_config(root: str, outcomes: "_Outcomes") -> tune.RunConfig:
    system, logs = storage.filesystem(f"{root}/tensorboard")
    return tune.RunConfig(
        name=f"sweep-{time.strftime('%Y%m%d-%H%M%S')}",
        storage_path=logs,
        storage_filesystem=system,
        callbacks=[outcomes],
        failure_config=tune.FailureConfig(max_failures=_RESTARTS),
        verbose=0,
    )


def _name_of(trial: Any) -> str:
    return trial.config["trial"]["name"]


def _cells(trials: Sequence[Trial]) -> dict[str, int]:
    """Trial -> number of its cell: of the run, which trials of one cell have in common."""
    numbers = {run: number for number, run in enumerate(dict.fromkeys(trial.run for trial in trials))}
    return {trial.name: numbers[trial.run] for trial in trials}


def _trial(
    config: dict[str, Any],
    *,
    trials: Mapping[str, Trial],
    root: str,
    verdicts: Any,
    board: Any,
    cluster: ClusterConfig,
    code: str,
) -> None:
    """One trial, in its own process. A failure is told at once, to who watches and to Tune, and not raised: Tune starts
    again what a machine lost."""
    trial = trials[config["trial"]["name"]]
    try:
        check_worker(root, code)
        told = _outcome(trial, root, verdicts, board, cluster)
    except _DEATHS:
        raise
    except Exception as error:  # whatever it is, it is this trial's alone, and is listed with it
        logger.exception("trial %s failed", trial.name)
        told = {"failure": _reason(error)}
    if "failure" in told:
        board.say.remote(f"trial {trial.name} failed: {told['failure']}")
    tune.report(told)


def _outcome(trial: Trial, root: str, verdicts: Any, board: Any, cluster: ClusterConfig) -> dict[str, Any]:
    """Train, answer and score, as far as that is not done; returns what Tune is told at the end."""
    train = trial.train
    if finished(train.artifact, root) is None:
        failure = fit(train, root, cluster, board, verdicts=verdicts, callbacks=[TuneReportCallback()])
        if failure is not None:
            return {"failure": failure}
    trained = finished(train.artifact, root)
    if trained is None:
        seen = ray.get(verdicts.end_of.remote(trial.name))
        finish(trial.stopped, root, measured=seen)
        return {"stopped": True, **seen}
    # Not in the trial's own placement group, which has no CPU.
    evaluation = _evaluate.options(num_gpus=cluster.gpus_per_actor, scheduling_strategy="DEFAULT")
    scored = ray.get(evaluation.remote(trial, root, cluster, code_here()))
    return {"progress": 100, **trained.measured, **scored}


def _reason(error: Exception) -> str:
    """In a line."""
    told = way_out(error)
    if told is not None:
        return told
    last = (str(error).strip().splitlines() or [""])[-1]
    says_what_it_is = isinstance(error, BadInput | JobFailed | ray.exceptions.RayTaskError)
    return last if says_what_it_is else f"{type(error).__name__}: {last}"


@ray.remote(num_cpus=1, max_retries=_RESTARTS)
def _evaluate(trial: Trial, root: str, cluster: ClusterConfig, code: str) -> dict[str, float]:
    """The answers of a trial's explainer and their scores; returns the exact match of each task."""
    check_worker(root, code)
    started = time.monotonic()
    make_here(trial.answers, root, cluster)
    made = trial_scores(trial, root)
    storage.write_table(made, f"{trial.scores.path(root)}/{TABLE}")
    finish(trial.scores, root, rows=made.num_rows, seconds=time.monotonic() - started)
    return {f"{row['task']}_exact_match": row["value"] for row in _headline(made)}


def trial_scores(trial: Trial, root: str) -> pa.Table:
    """Scores (records.SCORES) of the answers of a trial, over all questions and by what changed."""
    graded = []
    for job in trial.answers:
        plain = [name for name in storage.read_schema(job.source).names if name != "vectors"]
        asked = storage.read_table(job.source, plain)
        held_out = asked.filter(pc.equal(asked["control"], "none"))
        answers, run = storage.read_table(job.artifact.path(root)), trial.run
        graded.append(grade(held_out, answers, target=run.target, seed=run.seed, fraction=run.fraction))
    seed = trial.scores.config["seed"]
    return scores(pa.concat_tables(graded), by=("all", "changed"), seed=seed, resamples=trial.resamples)


def _headline(table: pa.Table) -> list[dict[str, Any]]:
    wanted = {"metric": "exact_match", "by": "all", "control": "none"}
    return [row for row in table.to_pylist() if all(row[key] == value for key, value in wanted.items())]


class _Named(NamedTuple):
    """What ASHA knows a trial by: its name, the same whenever the sweep is started again."""

    trial_id: str


class PerCell(FIFOScheduler):
    """ASHA among the trials of one cell, which differ in their settings alone. One that shall stop is told so, and ends
    by itself: Tune would kill it, with its workers' resources still taken.

    What trials report is written down at `heard`, and taken up from there when the sweep is started again.
    """

    def __init__(
        self, rules: SweepConfig, asha: AshaConfig, verdicts: Any, cells: Mapping[str, int], heard: str
    ) -> None:
        super().__init__()
        self._verdicts, self._cells, self._heard, self._judged_by = verdicts, cells, heard, rules.metric
        new = partial(
            AsyncHyperBandScheduler,
            time_attr="progress",
            metric=rules.metric,
            mode="min" if rules.metric == "loss" else "max",
            max_t=100,
            grace_period=max(1, round(100 * asha.grace)),
            reduction_factor=asha.reduction,
            stop_last_trials=False,
        )
        self._halving: dict[int, AsyncHyperBandScheduler] = defaultdict(new)
        self._reports = {name: self._heard_before(name) for name in cells}
        for name, reports in self._reports.items():
            self._of(name).on_trial_add(None, _Named(name))
            for report in reports:
                self._of(name).on_trial_result(None, _Named(name), report)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """It is in its cell already."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Always goes on; where ASHA says stop, the workers hear it at their next report."""
        name = _name_of(trial)
        self._keep(name, result)
        action = self._of(name).on_trial_result(tune_controller, _Named(name), result)
        if action == TrialScheduler.STOP and result["progress"] < 100:
            self._verdicts.stop.remote(name)
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Leaves its cell."""
        name = _name_of(trial)
        self._of(name).on_trial_complete(tune_controller, _Named(name), result)

    def _of(self, name: str) -> Any:  # it knows trials by more than the name
        return self._halving[self._cells[name]]

    def _heard_before(self, name: str) -> list[dict[str, float]]:
        with suppress(FileNotFoundError):
            return storage.read_json(f"{self._heard}/{name}.json")
        return []

    def _keep(self, name: str, result: Mapping[str, Any]) -> None:
        if "progress" in result and self._judged_by in result:
            self._reports[name].append({key: result[key] for key in ("progress", self._judged_by)})
            with suppress(OSError):  # of storage that is away for long: a later start then knows less
                storage.write_json(self._reports[name], f"{self._heard}/{name}.json")


class _Outcomes(tune.Callback):
    """Why trials failed: as they told it, and what Tune saw of those whose process died too often."""

    def __init__(self) -> None:
        self.failures: dict[str, str] = {}
        self.deaths: dict[str, str] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """A failed trial says so with its last result."""
        if "failure" in result:
            self.failures[_name_of(trial)] = result["failure"]

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """It is not started again."""
        self.deaths[_name_of(trial)] = (str(trial.get_error()).strip().splitlines() or [""])[-1]


# -- what came out ----------------------------------------------------------------------------------------------------


def best_settings(trials: Sequence[Trial], root: str, rules: SweepConfig) -> dict[tuple[str, str], dict[str, Any]]:
    """(explainer, target) -> the settings that did best, by the mean of `rules.metric` over its runs.

    Judged are a pairing's runs on the largest fraction on which one came to its end, and settings whose runs all did
    before those of which some did not. Held-out questions that are scored play no part in it, nor do runs without
    vectors: they are a control of the explainer, and have its settings.
    """
    done = [(trial.run, trial, made) for trial in trials if (made := finished(trial.train.artifact, root)) is not None]
    judged: dict[tuple[str, str], tuple[bool, float]] = {}
    for run, *_ in done:
        pair = (run.explainer, run.target)
        judged[pair] = max(judged.get(pair, (False, 0.0)), (not run.text_only, run.fraction))
    seen: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run, trial, made in done:
        pair = (run.explainer, run.target)
        if (not run.text_only, run.fraction) == judged[pair]:
            seen[pair][json.dumps(trial.parameters, sort_keys=True)].append(_metric(made, rules.metric))
    sign = 1 if rules.metric == "loss" else -1

    def rank(values: list[float]) -> tuple[int, float]:
        return -len(values), sign * sum(values) / len(values)

    return {pair: json.loads(min(tried, key=lambda key: rank(tried[key]))) for pair, tried in seen.items()}


def _metric(done: Manifest, name: str) -> float:
    """Of the explainer that the training left: with `keep: best`, the one that was kept, not the last.

    Raises:
        JobFailed: the training did not measure it.
    """
    if (kept := done.measured.get(f"kept_{name}")) is not None:
        return kept
    if name not in done.measured:
        raise JobFailed(
            f"`sweep.metric` = {name!r}: the training of {done.label} did not measure it, only "
            f"{', '.join(sorted(done.measured))}; choose one of these"
        )
    return done.measured[name]


def _with(trials: Sequence[Trial], best: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[Trial]:
    """The trials with the best settings of their pairing; one trial of each run where none came to its end."""
    chosen: dict[Run, Trial] = {}
    for trial in trials:
        pair = (trial.run.explainer, trial.run.target)
        if trial.run not in chosen or trial.parameters == best.get(pair):
            chosen[trial.run] = trial
    return list(chosen.values())


def _status(trial: Trial, root: str, failures: Mapping[str, str]) -> str:
    if trial.name in failures:
        return "failed"
    return "done" if finished(trial.scores, root) is not None else "stopped"


def _tell(
    session: Session,
    trials: Sequence[Trial],
    failures: Mapping[str, str],
    chosen: Sequence[Trial],
) -> None:
    """Tables `trials` and `scores` below `sweep`, of all trials, and a summary for the person who watches."""
    root, names = session.plan.root, {trial.name for trial in chosen}
    rows = [_row(trial, root, failures, chosen=trial.name in names) for trial in trials]
    storage.write_table(records.rows_table(rows, TRIALS_SCHEMA), f"{root}/sweep/{TRIALS}/{TABLE}")
    scored = [_scores_of(trial, root) for trial in trials if finished(trial.scores, root) is not None]
    if scored:
        storage.write_table(pa.concat_tables(scored), f"{root}/sweep/scores/{TABLE}")
    session.console.print(_summary(rows))


def _scores_of(trial: Trial, root: str) -> pa.Table:
    table = storage.read_table(trial.scores.path(root))
    names = {"trial": trial.name, "parameters": json.dumps(trial.parameters, sort_keys=True)}
    for name, value in names.items():
        table = table.append_column(name, pa.array([value] * table.num_rows, pa.string()))
    return table


def _row(trial: Trial, root: str, failures: Mapping[str, str], *, chosen: bool) -> dict[str, Any]:
    status = _status(trial, root, failures)
    made = finished(trial.train.artifact, root) or finished(trial.stopped, root)
    measured = {} if made is None else made.measured
    headline = _headline(storage.read_table(trial.scores.path(root))) if status == "done" else []
    return {
        **trial.run._asdict(),
        "trial": trial.name,
        "tasks": "+".join(trial.run.tasks),
        "parameters": json.dumps(trial.parameters, sort_keys=True),
        "status": status,
        "chosen": chosen,
        "in_report": chosen and status == "done",
        "error": failures.get(trial.name),
        "steps": measured.get("steps"),
        "loss": measured.get("loss"),
        "exact_match": sum(row["value"] for row in headline) / len(headline) if headline else None,
        "seconds": None if made is None else made.seconds,
    }


def _summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="trials", title_justify="left")
    for name in ("explainer", "target", "tasks", "seed", "fraction", "parameters", "loss", "exact_match", "status"):
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = [row[column.header.replace(" ", "_")] for column in table.columns[:-1]]  # type: ignore[union-attr]
        texts = [f"{cell:.3g}" if isinstance(cell, float) else str("" if cell is None else cell) for cell in cells]
        told = f"failed: {row['error']}" if row["error"] else row["status"]
        if row["chosen"]:
            told += ", chosen" if row["in_report"] else ", chosen but not in the report"
        table.add_row(*texts, told)
    return table
