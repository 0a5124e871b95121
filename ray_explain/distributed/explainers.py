"""The explainers of an experiment, trained."""

from collections.abc import Iterable, Sequence
from typing import Any

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.distributed.features import corpus_of
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.questions import check_asked
from ray_explain.distributed.session import Session
from ray_explain.ground_truth.splits import training_rows
from ray_explain.models import files_fingerprint
from ray_explain.world.corpus import replay_texts


def train_explainers(session: Session) -> None:
    """An explainer for each run of the plan.

    Raises:
        BadInput: as `check_asked`.
    """
    plan = session.plan
    check_asked(plan)
    session.start_early(map(plan.explainer, plan.runs()), trains=True)
    make_ground_truth(session)
    train_missing(session)


def train_missing(session: Session) -> None:
    """The explainers that are not there yet; the questions must be."""
    plan = session.plan
    missing = [run for run in plan.runs() if session.missing([plan.explainer(run)])]
    if missing:
        from ray_explain.distributed.train import train_all

        session.say(f"Explainers: training {len(missing)}")
        session.start_ray()
        align(session, missing)
        train_all([train_run(session, run) for run in missing], plan.root, plan.experiment.cluster)


def align(session: Session, runs: Sequence[Run]) -> None:
    """The maps that ridge projections of these runs start from; Ray must be running.

    Raises:
        BadInput: the corpus of features cannot be read, or there is too little text.
    """
    from ray_explain.distributed.alignment import AlignmentJob, align_all

    plan = session.plan
    jobs = [
        AlignmentJob(
            artifact=artifact,
            target=plan.model_place(run.target),
            explainer=plan.model_place(run.explainer),
            questions=tuple(plan.path(plan.questions(task, run.target)) for task in run.tasks),
            corpus=plan.path(corpus_of(session, run.target)) if "features" in run.tasks else None,
        )
        for run in runs
        if (artifact := plan.alignment(run)) is not None and session.missing([artifact])
    ]
    align_all(jobs, plan.root, gpus=plan.experiment.cluster.gpus_per_actor)


def train_run(session: Session, run: Run) -> Any:
    """What the workers of a run are given; its questions must be there."""
    from ray_explain.distributed.train import TrainRun

    plan = session.plan
    train, questions = plan.train_config(run), [plan.questions(task, run.target) for task in run.tasks]
    n_texts = round(_asked_in(session, questions, run.fraction) * train.replay) if train.replay else 0
    texts = replay_texts(plan.experiment.world.world(), n_texts, run.seed)
    return TrainRun(
        artifact=plan.explainer(run),
        model=plan.model_place(run.explainer),
        target=target_of(plan, run.target),
        questions=tuple(plan.path(table) for table in questions),
        replay=tuple(texts),
        train=train,
        seed=run.seed,
        wording=plan.experiment.ground_truth.wording,
        text_only=run.text_only,
        fraction=run.fraction,
        alignment=None if (maps := plan.alignment(run)) is None else plan.path(maps),
    )


def _asked_in(session: Session, questions: Iterable[Artifact], fraction: float) -> int:
    tables = (session.table(each, ["split", "group"]) for each in questions)
    return sum(training_rows(table, fraction).num_rows for table in tables)


def target_of(plan: Plan, name: str) -> dict[str, Any]:
    """What an explainer's sidecar says of its target, and is held against. Weights on S3 are not copied here for it."""
    place = plan.model_place(name)
    at_hand = not storage.is_remote(place["model"])
    weights = files_fingerprint(place["model"], place["revision"]) if at_hand else None
    return {"name": name, "revision": place["revision"], "weights": weights}
