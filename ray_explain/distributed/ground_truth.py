"""What the targets really do, measured or taken over; with the questions about it, and as files for others."""

from functools import partial
from typing import Any

import pyarrow as pa

from ray_explain import storage
from ray_explain.config import Task
from ray_explain.distributed.feature_plan import FeaturePlan, describes
from ray_explain.distributed.features import make_features
from ray_explain.distributed.models import check_describers, check_explainers, make_models, tokenizer_of
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.questions import make_questions
from ray_explain.distributed.session import Session
from ray_explain.distributed.sources import cases_of, feature_layers, released_effects
from ray_explain.ground_truth.features import FeatureStage
from ray_explain.ground_truth.released_exemplars import write_exemplars
from ray_explain.ground_truth.released_files import write_folder


def make_ground_truth(session: Session) -> None:
    """What the targets really do, and the questions about it.

    Raises:
        BadInput: as `make_models`; a model that is to be an explainer could not end its answers; or one that is to
            describe features cannot be read.
    """
    plan = session.plan
    session.start_early(plan.effects(task, target) for target, task in plan.target_tasks())
    make_models(session)
    check_explainers(session)
    check_describers(session)
    released = [(target, task) for target, task in plan.target_tasks() if _is_taken_over(plan, task)]
    for target, task in released:
        session.make_parts(plan.effects(task, target), partial(released_effects, plan, task, target))
    measured = [pair for pair in plan.target_tasks() if pair not in released]
    for target, task in measured:
        session.make_table(plan.cases(task, target), lambda k=task, t=target: cases_of(plan, k, t))  # type: ignore[misc]
    if describes(plan.experiment.ground_truth.features):
        make_features(session, {target: feature_layers(plan, target) for target in plan.experiment.targets})
        measured = [(target, task) for target, task in measured if task != "features"]
    if session.missing([plan.effects(task, target) for target, task in measured]):
        from ray_explain.distributed.run_stages import run_stages

        session.say("Ground truth: intervening on the targets")
        session.start_ray()
        run_stages([_stage_job(plan, task, target) for target, task in measured], plan.root, plan.experiment.cluster)
    make_questions(session)


def _is_taken_over(plan: Plan, task: Task) -> bool:
    """Whether the effects are those of a released data set as they are: nothing is described or scored anew."""
    section = getattr(plan.experiment.ground_truth, task)
    is_described = task == "features" and describes(section)
    return getattr(section, "source", None) == "released" and not is_described


def _stage_job(plan: Plan, task: Task, target: str) -> Any:
    from ray_explain.distributed.run_stages import StageJob
    from ray_explain.ground_truth.ablation import AblationStage
    from ray_explain.ground_truth.patching import PatchingStage

    config = plan.target_place(target)
    if task == "features":
        section = plan.experiment.ground_truth.features
        assert section is not None
        config |= section.model_dump(include={"d_sae", "k", "steps", "documents", "min_correlation"}) | {
            "seed": plan.experiment.seed,
            "world": plan.experiment.world.model_dump(),
        }
    stages = {"patching": PatchingStage, "ablation": AblationStage, "features": FeatureStage}
    return StageJob(
        stage=stages[task],  # type: ignore[arg-type]
        config=config,
        source=plan.path(plan.cases(task, target)),
        artifact=plan.effects(task, target),
        rows_per_slice=1 if task == "features" else None,
        expands=task == "features",
    )


def export_ground_truth(session: Session) -> None:
    """The effects in the schemas of the paper's released data sets, below `released/` in the storage; features with
    their exemplars, where those were looked for, and vectors that nothing describes in a folder for each kind."""
    plan = session.plan
    make_ground_truth(session)
    for target, task in plan.target_tasks():
        _export_to(session, target, task, task)
        for own in plan.unlabelled(task, target):
            _export_to(session, target, task, f"{task}_{own.section.vectors or own.section.source}", own)


def _export_to(session: Session, target: str, task: Task, name: str, unlabelled: FeaturePlan | None = None) -> None:
    place = f"{session.plan.root}/released/{target}/{name}"
    try:
        with storage.new_folder(place) as folder:
            told = _export(session, target, task, folder, unlabelled)
    except ValueError as error:
        session.say(f"{name} of {target}: not written: {error}")
        return
    counts = ", ".join(
        f"{split} {n:,} rows" + (f" ({left} left out)" if left else "") for split, (n, left) in told.items()
    )
    session.say(f"{name} of {target}: {counts} in {place}")


def _export(
    session: Session, target: str, task: Task, folder: str, unlabelled: FeaturePlan | None
) -> dict[str, tuple[int, int]]:
    """What was written and left out, by split.

    Raises:
        ValueError: the effects have no place in the released schema.
    """
    plan = session.plan
    effects = session.table(unlabelled.effects() if unlabelled else plan.effects(task, target))
    section, tokenizer = getattr(plan.experiment.ground_truth, task), tokenizer_of(plan, target)
    mmlu = section.path if getattr(section, "source", None) == "mmlu" else None
    has_exemplars = task == "features" and (unlabelled is not None or describes(section))
    told = write_folder(effects, task, folder, tokenizer, mmlu=mmlu, listed=has_exemplars)
    if has_exemplars:
        _export_exemplars(session, unlabelled or FeaturePlan(plan, target), effects, folder)
    return told


def _export_exemplars(session: Session, own: FeaturePlan, effects: pa.Table, folder: str) -> None:
    plan, section, target = session.plan, own.section, own.target
    about = {
        "hf_model_id": plan.model_place(target)["model"],
        "hf_dataset_configs": [{"hf_dataset_id": section.path or section.corpus.path or "the synthetic world"}],
        "seed": plan.experiment.seed,
    }
    exemplars = session.table(own.exemplars())
    n, left_out = write_exemplars(exemplars, effects, folder, tokenizer_of(plan, target), about=about)
    lost = "".join(f", {count:,} left out: {reason}" for reason, count in left_out.items())
    session.say(f"features of {target}: {n:,} windows of exemplars{lost}")
