"""The questions that are asked for the scores, and the answers to them."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.distributed.explainers import target_of
from ray_explain.distributed.models import d_model
from ray_explain.distributed.plan import SELFIE, Plan
from ray_explain.distributed.session import Session
from ray_explain.evaluation.controls import under_control
from ray_explain.questions.prompting import prompted, shown_examples
from ray_explain.stages import Result

CONTROL = pa.field("control", pa.string(), nullable=False)  # column of the questions that are asked


def make_asked(session: Session) -> None:
    """The questions that are asked for the scores; those of the experiment must be there."""
    for asked in dict.fromkeys(answers.parents[-1] for answers in session.plan.scores().parents):
        session.make_parts(asked, partial(_asked, session, asked))


def _asked(session: Session, asked: Artifact) -> Iterator[Result]:
    """The questions of the split, once for each control, or with answered examples before them."""
    config, every = asked.config, asked.parents[0]
    questions = session.split(every, config["split"])
    if "shots" in config:
        questions = prompted(questions, _examples(session, every, config["shots"], config["seed"]))
    for control in ["none", *config.get("controls", [])]:
        made = under_control(questions, control, config["seed"])
        yield Result(made.append_column(CONTROL, pa.array([control] * made.num_rows)), [])


def _examples(session: Session, questions: Artifact, shots: int, seed: int) -> pa.Table:
    """The training questions that prompts show, in their order there."""
    training = session.table(questions, ["split", "group", "changed"])
    rows = np.flatnonzero(pc.equal(training["split"], "train"))
    shown = rows[shown_examples(training.take(pa.array(rows)), shots=shots, seed=seed)]
    found = pa.concat_tables(storage.read_rows(session.plan.path(questions), np.sort(shown)))
    return found.take(pa.array(np.argsort(np.argsort(shown))))


def answer_jobs(plan: Plan) -> list[Any]:
    """A stage for each of the answers that the scores are made from."""
    from ray_explain.distributed.run_stages import StageJob
    from ray_explain.evaluation.answering import AnswerStage, SelfieStage

    evaluate, longest = plan.experiment.evaluate, plan.experiment.train.max_tokens
    common = {"max_new_tokens": evaluate.max_new_tokens, "batch_size": evaluate.batch_size, "max_tokens": longest}
    return [
        StageJob(
            stage=SelfieStage if "scales" in own else AnswerStage,
            config=common | own | {"d_target": d_model(plan, target)},
            source=plan.path(answers.parents[-1]),
            artifact=answers,
            expands="scales" in own,
        )
        for target, own, answers in [*_of_explainers(plan), *_of_untrained(plan)]
    ]


def _of_explainers(plan: Plan) -> Iterator[tuple[str, dict[str, Any], Artifact]]:
    """Target, config and artifact of the answers of each explainer on each task."""
    targets = {name: target_of(plan, name) for name in plan.experiment.targets}
    for run in plan.runs():
        own: dict[str, Any] = {
            "explainer": run.speaker,
            "folder": plan.path(plan.explainer(run)),
            "target": run.target,
            "target_revision": targets[run.target]["revision"],
            "target_weights": targets[run.target]["weights"],
        }
        own |= {"text_only": True} if run.text_only else {}
        yield from ((run.target, own, plan.answers(run, task)) for task in run.asked)


def _of_untrained(plan: Plan) -> Iterator[tuple[str, dict[str, Any], Artifact]]:
    """The same of targets that are asked without any training."""
    injection = plan.experiment.train.injection.model_dump(exclude={"projection"})
    for one in plan.untrained():
        own = {"explainer": one.way, **plan.model_place(one.target), "injection": injection}
        own |= {"max_tokens": plan.experiment.train.max_tokens * (one.shots + 1)} if one.shots else {}
        if one.way == SELFIE:
            brief = plan.experiment.ground_truth.wording == "brief"
            own |= {"scales": plan.experiment.evaluate.selfie, "brief": brief}
        yield one.target, own, plan.untrained_answers(one)
