"""The scores of an experiment: answers held against the truth."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import storage
from ray_explain.artifacts import Artifact, finish, finished
from ray_explain.config import Task
from ray_explain.distributed.answers import answer_jobs, make_asked
from ray_explain.distributed.explainers import train_missing
from ray_explain.distributed.feature_plan import FeaturePlan, describes, tells_all_concepts
from ray_explain.distributed.features import score_answers
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.questions import check_asked
from ray_explain.distributed.session import TABLE, Session
from ray_explain.endpoints import Chat, Endpoint
from ray_explain.errors import JobFailed
from ray_explain.evaluation.baselines import baselines
from ray_explain.evaluation.comparisons import comparisons
from ray_explain.evaluation.grading import best_of, grade
from ray_explain.evaluation.metrics import scores
from ray_explain.evaluation.simulations import GOLD, answered, gold_answers, labelled, simulated
from ray_explain.ground_truth.features import split_features
from ray_explain.ground_truth.splits import training_rows
from ray_explain.questions.prompting import BEST_SELFIE, selfie_label


def evaluate(session: Session) -> None:
    """Every explainer's answers to the held-out questions, and all scores.

    Scores that lack some of a judge's marks are made again with those that it gives now.

    Raises:
        BadInput: as `train_explainers`; or the questions do not allow a control, which is found before any training.
        JobFailed: there are no scores yet, and a judge does not answer.
    """
    plan = session.plan
    check_asked(plan)
    session.start_early([plan.scores()], trains=True)
    make_ground_truth(session)
    make_asked(session)
    train_missing(session)
    answers = plan.scores().parents
    if session.missing(answers):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Evaluation: asking the explainers")
        session.start_ray()
        run_stages(answer_jobs(plan), plan.root, plan.experiment.cluster)
    if session.missing([plan.scores()]):
        session.say("Evaluation: scoring the answers")
        _make_scores(session)
    elif unscored := marked(plan).get("unscored"):
        session.say(f"Evaluation: asking the judge again about {unscored:,} answers that it did not mark")
        try:
            _make_scores(session)
        except JobFailed as error:
            session.say(f"The scores stay as they were: {error}")


def marked(plan: Plan) -> dict[str, int]:
    """How many `answers` a judge was to mark for the scores, and how many it left `unscored`; empty without a judge and
    without scores."""
    manifest = finished(plan.scores(), plan.root)
    return {} if manifest is None else manifest.measured.get("judge", {})


def _make_scores(session: Session) -> None:
    """Tables `graded`, `scores` and `comparisons` in the scores' directory."""
    plan, started = session.plan, time.monotonic()
    graded = pa.concat_tables(_graded(session, target, task) for target, task in plan.target_tasks())
    evaluate, seed, folder = plan.experiment.evaluate, plan.experiment.seed, plan.path(plan.scores())
    compared = graded.filter(pc.not_equal(graded["explainer"], GOLD))
    tables = {
        "graded": graded,
        "scores": scores(graded, seed=seed, resamples=evaluate.resamples),
        "comparisons": comparisons(
            compared, trained=plan.experiment.explainers, seed=seed, resamples=evaluate.resamples
        ),
    }
    measured = {"judge": _marked(graded)} if evaluate.judge and "features" in plan.experiment.tasks else {}
    storage.remove(folder)  # scores that lack marks are there already
    for name, table in tables.items():
        storage.write_table(table, f"{folder}/{name}/{TABLE}")
    seconds = time.monotonic() - started
    finish(plan.scores(), plan.root, rows=graded.num_rows, seconds=seconds, measured=measured)


def _marked(graded: pa.Table) -> dict[str, int]:
    """Of answers to questions that have a right one: a judge has nothing to hold others against."""
    judged = graded.filter(pc.and_(pc.equal(graded["task"], "features"), graded["exact"].is_valid()))["judged"]
    return {"answers": len(judged), "unscored": judged.null_count}


def _graded(session: Session, target: str, task: Task) -> pa.Table:
    """All answers about a target on a task held against the truth, those of baselines among them."""
    plan = session.plan
    held_out = session.split(plan.questions(task, target), plan.experiment.evaluate.split)
    given = _given(session, target, task, held_out)
    section = plan.experiment.ground_truth.features if task == "features" else None
    described, of_world = describes(section), section is not None and tells_all_concepts(section)
    descriptions = _descriptions(session, target, held_out) if of_world else None
    marks = _marks(session) if task == "features" else []
    alike: dict[tuple[int, float], list[pa.Table]] = {}
    for seed, fraction, answers in given:
        alike.setdefault((seed, fraction), []).append(answers)
    sets = [(held_out, key, pa.concat_tables(tables)) for key, tables in alike.items()]
    if described and FeaturePlan(plan, target).scores_descriptions:
        known = labelled(held_out)
        sets.append((known, (0, 0.0), gold_answers(known)))
        scored = _scored_answers(session, target, held_out, [said for _, _, said in sets])
        marks.append(partial(simulated, scored=scored))
    parts = []
    for questions, (seed, fraction), said in sets:
        part = grade(questions, said, descriptions, target=target, seed=seed, fraction=fraction)
        for mark in marks:
            part = mark(part, questions, said)
        parts.append(part)
    graded = pa.concat_tables(parts)
    if task != "features" or not plan.experiment.evaluate.selfie:
        return graded
    scales = [selfie_label(scale) for scale in plan.experiment.evaluate.selfie]
    return pa.concat_tables([graded, best_of(graded, scales, BEST_SELFIE)])


def _given(session: Session, target: str, task: Task, held_out: pa.Table) -> list[tuple[int, float, pa.Table]]:
    """Answers of explainers and baselines, each with the seed of its training and its share of the data."""
    plan = session.plan
    runs = [run for run in plan.runs() if _about(run, target, task)]
    given = [(run.seed, run.fraction, session.table(plan.answers(run, task))) for run in runs]
    asked = [one for one in plan.untrained() if (one.target, one.task) == (target, task)]
    given += [(0, 0.0, session.table(plan.untrained_answers(one))) for one in asked]
    for fraction in plan.experiment.fractions:
        with _training(session, plan.questions(task, target), fraction) as known:
            given += [(0, fraction, answers) for answers in baselines(known, held_out)]
    return given


def _training(session: Session, questions: Artifact, fraction: float) -> AbstractContextManager[pa.Table]:
    """The training questions within a fraction, on disk: with their vectors they may be more than memory holds."""
    keys = session.table(questions, ["split", "group"])
    keys = keys.append_column("row", pa.array(np.arange(keys.num_rows)))
    rows = training_rows(keys, fraction)["row"].to_numpy()
    return storage.mapped(storage.read_rows(session.plan.path(questions), rows))


def _scored_answers(session: Session, target: str, questions: pa.Table, answers: Sequence[pa.Table]) -> pa.Table:
    """What a simulator or a detector makes of all answers about the features of a target."""
    plan = session.plan
    parents = [plan.answers(run, "features") for run in plan.runs() if _about(run, target, "features")]
    parents += [
        plan.untrained_answers(one) for one in plan.untrained() if (one.target, one.task) == (target, "features")
    ]
    own = FeaturePlan(plan, target)
    return pa.concat_tables(
        score_answers(session, one, parents, answered(session.table(one.descriptions()), questions, answers))
        for one in [own, *own.unlabelled]
    )


def _marks(session: Session) -> list[Callable[[pa.Table, pa.Table, pa.Table], pa.Table]]:
    """What marks descriptions beside exact match, as far as the experiment asks for it: of graded answers, questions
    and answers each makes graded answers."""
    evaluate, found = session.plan.experiment.evaluate, list[Callable[[pa.Table, pa.Table, pa.Table], pa.Table]]()
    if evaluate.embedding is not None:
        from ray_explain.evaluation.embeddings import compared, sentence_encoder

        found.append(partial(compared, encoder=sentence_encoder(evaluate.embedding)))
    if evaluate.judge is not None:
        from ray_explain.evaluation.judges import Judge, judged

        endpoint = Endpoint(cache=f"{session.plan.root}/judge", **evaluate.judge.model_dump(exclude={"kind"}))
        found.append(partial(judged, judge=Judge(Chat(endpoint))))
    return found


def _descriptions(session: Session, target: str, questions: pa.Table) -> pa.Table:
    """All descriptions, gold or not, of the features that the questions are about."""
    effects = session.table(session.plan.effects("features", target), ["case_id", "descriptions"])
    asked = pc.is_in(effects.column("case_id"), pc.unique(questions.column("case_id")))
    return split_features(effects.filter(asked))[1]


def _about(run: Run, target: str, task: Task) -> bool:
    return run.target == target and task in run.asked
