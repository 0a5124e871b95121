"""How many questions and seeds a wanted difference needs, told from a finished experiment."""

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput
from ray_explain.evaluation.power import MOST_SEEDS, Need, Size, sizes
from ray_explain.report import numbers


def say_power(session: Session) -> None:
    """A table for the person who plans the next experiment; makes nothing.

    Raises:
        BadInput: the experiment is not scored yet, or holds no target that explains itself beside another explainer.
    """
    plan = session.plan
    if finished(plan.scores(), plan.root) is None:
        raise BadInput("`--power` plans from finished scores: run jobs/evaluate.py with this config first, without it")
    graded = storage.read_table(f"{plan.path(plan.scores())}/graded")
    experiment = plan.experiment
    found = list(sizes(graded, experiment.explainers, seed=experiment.seed, resamples=experiment.evaluate.resamples))
    if not found:
        raise BadInput("no target of this experiment is explained by itself and by another model: nothing to compare")
    session.say("Self minus cross; found in 4 of 5 studies by a two-sided test at 5 %, corrected over those of a task:")
    for one in found:
        session.say("\n".join(told(one)))
    if any(one.seed_variance is None for one in found):
        session.say("One seed says nothing of how much seeds differ: these sizes hold for these explainers only.")


def told(one: Size) -> list[str]:
    """The lines that say what a study like the pilot finds, and what it takes to find more."""
    size = f"{one.questions:,} questions, {numbers.plural(one.seeds, 'seed')}"
    share = "" if one.fraction == 1 else f", at {numbers.share_label(one.fraction)}"
    what = f"{numbers.task_label(one.task)}, {numbers.metric_label(one.metric)}"
    head = f"{what}, {one.target} itself against {one.against}{share} ({size})"
    if one.detectable is None:
        return [
            f"{head}: they answered alike, or differ by the same in every group; that says nothing of what it takes"
        ]
    return [
        f"{head}: finds {numbers.signed(one.detectable, 3)} or more",
        *[f"  {numbers.signed(need.wanted)} needs {_need(need, one)}" for need in one.needs],
    ]


def _need(need: Need, one: Size) -> str:
    if one.seed_variance is None:
        return f"{need.questions:,} questions"
    seeds = f"{need.seeds} seeds" if need.seeds else f"more than {MOST_SEEDS} seeds"
    asked = "" if need.questions is None else f"{need.questions:,} questions with {one.seeds} seeds, or "
    return f"{asked}{seeds} with {one.questions:,} questions"
