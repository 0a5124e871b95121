"""How large a study has to be, from a finished one as pilot."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from scipy import stats

from ray_explain.evaluation.comparisons import pilot
from ray_explain.evaluation.grading import series_of
from ray_explain.evaluation.intervals import CONFIDENCE, Pilot, questions_needed

WANTED = (0.02, 0.05, 0.10)  # differences of self and cross in exact match
POWER = 0.8
MOST_SEEDS = 50


@dataclass(frozen=True, kw_only=True)
class Need:
    """What it takes to find a difference: questions with as many seeds as the pilot had, and seeds with its questions.

    None where no number of questions, or not even `MOST_SEEDS` seeds, would do.
    """

    wanted: float
    questions: int | None
    seeds: int | None


@dataclass(frozen=True, kw_only=True)
class Size:
    """For self minus one other explainer, on one task and target."""

    task: str
    target: str
    against: str
    questions: int  # of the pilot
    seeds: int
    seed_variance: float | None  # None with one seed, which says nothing of others
    detectable: float | None  # the difference that a study like the pilot finds with probability `POWER`
    needs: Sequence[Need]  # none, as `detectable`, where both sides were right on the same questions: no spread is seen


def sizes(graded: pa.Table, trained: Sequence[str], *, seed: int, resamples: int = 2000) -> Iterator[Size]:
    """One for each target that explains itself and each other trained explainer of it.

    At the largest share of the training data, on exact match over all questions, for a two-sided test at 5 %.
    """
    asked = [one for one in series_of(graded) if one["control"] == "none" and one["explainer"] in trained]
    largest = max((one["fraction"] for one in asked), default=0.0)
    seeds: dict[tuple[str, str, str], set[int]] = {}
    for one in asked:
        if one["fraction"] == largest:
            seeds.setdefault((one["task"], one["target"], one["explainer"]), set()).add(one["seed"])
    for task, target, against in sorted(seeds):
        if against == target or (task, target, target) not in seeds:
            continue
        names = {"task": task, "target": target, "explainer": target, "against": against}
        known = pilot(graded, **names, fraction=largest, seed=seed, resamples=resamples)
        n_seeds = len(seeds[task, target, target] & seeds[task, target, against])
        yield _size(task, target, against, known, _questions(graded, task, target), n_seeds)


def _questions(graded: pa.Table, task: str, target: str) -> int:
    rows = graded.select(["task", "target", "question_id"]).to_pylist()
    return len({row["question_id"] for row in rows if (row["task"], row["target"]) == (task, target)})


def _size(task: str, target: str, against: str, known: Pilot, questions: int, seeds: int) -> Size:
    seen = known.group_variance > 0
    return Size(
        task=task,
        target=target,
        against=against,
        questions=questions,
        seeds=seeds,
        seed_variance=known.seed_variance if seeds > 1 else None,
        detectable=detectable(known, questions, seeds) if seen else None,
        needs=[_need(wanted, known, questions, seeds) for wanted in WANTED] if seen else [],
    )


def detectable(known: Pilot, questions: int, seeds: int, *, power: float = POWER) -> float:
    """The true difference that a study of so many questions and seeds finds with this probability; the inverse of
    `intervals.questions_needed`."""
    spread = math.sqrt(known.group_variance * known.questions_per_group / questions + known.seed_variance / seeds)
    return float((stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(power)) * spread)


def _need(wanted: float, known: Pilot, questions: int, seeds: int) -> Need:
    enough = (n for n in range(1, MOST_SEEDS + 1) if detectable(known, questions, n) <= wanted)
    try:
        needed: int | None = questions_needed(wanted, known, seeds=seeds, power=POWER)
    except ValueError:  # the seeds alone spread more than that
        needed = None
    return Need(wanted=wanted, questions=needed, seeds=next(enough, None))
