"""The questions about the ground truth."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import storage
from ray_explain.config import Task
from ray_explain.distributed.feature_plan import describes
from ray_explain.distributed.models import d_model, tokenizer_of
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.distributed.sources import check_found
from ray_explain.errors import BadInput
from ray_explain.ground_truth.balance import balanced
from ray_explain.ground_truth.directions import grouped_by_direction
from ray_explain.ground_truth.features import split_features
from ray_explain.ground_truth.mmlu import saying
from ray_explain.ground_truth.outcomes import special_answers
from ray_explain.ground_truth.positions import words_of_tokens
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.features import features_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.questions.wordings import says
from ray_explain.stages import Result


def make_questions(session: Session) -> None:
    """The questions about the effects, which must be there.

    Raises:
        BadInput: the training split or the one to be evaluated is empty.
    """
    plan = session.plan
    for target, task in plan.target_tasks():
        if not _is_asked(plan, task):
            session.say(f"{task} of {target}: no questions, `ground_truth.wording` has no words for this kind of patch")
            continue
        if task == "features":
            session.make_parts(plan.questions(task, target), partial(_features_questions, session, target))
        else:
            session.make_parts(plan.questions(task, target), partial(_questions, session, task, target))


def _is_asked(plan: Plan, task: Task) -> bool:
    """Whether there are words for what is measured."""
    section = plan.experiment.ground_truth.patching
    return task != "patching" or section is None or says(plan.experiment.ground_truth.wording, section.kind)


def check_asked(plan: Plan) -> None:
    """Raises: BadInput: there are no words for a question that explainers are to learn."""
    truth = plan.experiment.ground_truth
    for _, task in plan.target_tasks():
        if not _is_asked(plan, task):
            assert truth.patching is not None
            raise BadInput(
                f"`ground_truth.patching.kind` = {truth.patching.kind!r}: `wording` {truth.wording!r} has no words for "
                "it, so nothing can be trained on it; jobs/ground_truth.py and jobs/export.py measure it all the same"
            )


def _questions(session: Session, task: Task, target: str) -> Iterator[Result]:
    """Questions about patches or removals part by part, so that no more than a part of all vectors is in memory.

    Raises:
        BadInput: the training split or the one to be evaluated is empty.
    """
    plan, splits, dropped = session.plan, set[str](), list[tuple[str, str]]()
    kept, counts = _kept_by_balance(session, task, target)
    ask = _asking(plan, task, target)
    for part in storage.read_batches(plan.path(plan.effects(task, target))):
        made = ask(part if kept is None else part.filter(pc.is_in(part["case_id"], kept)))
        splits.update(made.table.column("split").to_pylist())
        dropped += made.dropped
        yield made._replace(measured=counts)
    check_found(plan, f"{task} of {target}", splits, dropped)


def _asking(plan: Plan, task: Task, target: str) -> Callable[[pa.Table], Result]:
    """What turns effects of a task into questions."""
    tokenizer, truth = tokenizer_of(plan, target), plan.experiment.ground_truth
    how: dict[str, Any] = {"wording": truth.wording, "seed": plan.experiment.seed}
    how["special"] = special_answers(tokenizer)
    if task == "patching":
        return partial(patching_questions, tokens_of=partial(words_of_tokens, tokenizer), **how)
    return partial(ablation_questions, said=saying(tokenizer), d_model=d_model(plan, target), **how)


def _kept_by_balance(session: Session, task: Task, target: str) -> tuple[pa.ChunkedArray | None, dict[str, Any]]:
    """The ids of the cases that balancing keeps, None for all; and how many of each kind there were and are."""
    plan, balance = session.plan, session.plan.balance(task)
    if balance is None:
        return None, {}
    told = session.table(plan.effects(task, target), ["case_id", "split", *balance.by])
    kept, before, after = balanced(told, balance.by, at_most=balance.at_most, seed=plan.experiment.seed)
    return kept["case_id"], {"cases before balancing": before, "cases after balancing": after}


def _features_questions(session: Session, target: str) -> Iterator[Result]:
    """Questions about features part by part, so that no more than a part of all vectors is in memory; those that
    nothing describes come last.

    Raises:
        BadInput: as `_questions`.
    """
    plan, splits, dropped = session.plan, set[str](), list[tuple[str, str]]()
    wording, seed = plan.experiment.ground_truth.wording, plan.experiment.seed
    unlabelled = describes(plan.experiment.ground_truth.features)  # else there is nothing to score their answers with
    for features, descriptions in _asked_features(session, target):
        made = features_questions(features, descriptions, wording=wording, seed=seed, unlabelled=unlabelled)
        splits.update(made.table.column("split").to_pylist())
        dropped += made.dropped
        yield made
    check_found(plan, f"features of {target}", splits, dropped)


def _asked_features(session: Session, target: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Features and descriptions, part by part; all at once where splits are to keep directions together."""
    plan, effects = session.plan, session.plan.effects("features", target)
    if plan.groups_features == "feature":
        yield from map(split_features, session.parts(effects))
    else:
        features, descriptions = split_features(session.table(effects))
        yield grouped_by_direction(features, seed=plan.experiment.seed), descriptions
    for own in plan.unlabelled("features", target):
        yield from map(split_features, session.parts(own.effects()))
