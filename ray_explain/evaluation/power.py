"""How large a study has to be, from a finished one as pilot."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from scipy import stats

from ray_explain.evaluation.comparisons import pilot
from ray_explain.evaluation.grading import series_of
from ray_explain.evaluation.intervals import CONFIDENCE, Pilot, questions_needed
from ray_explain.evaluation.metrics import headline, measured
from ray_explain.evaluation.shares import Shares

WANTED = (0.02, 0.05, 0.10)  # differences of self and cross in the headline metric
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
    fraction: float  # of the training data that both know
    metric: str  # the task's headline
    questions: int  # of the pilot
    seeds: int
    seed_variance: float | None  # None with one seed, which says nothing of others
    detectable: float | None  # the difference that a study like the pilot finds with probability `POWER`
    needs: Sequence[Need]  # none, as `detectable`, where the two differ alike in all groups: no spread is seen


def sizes(graded: pa.Table, trained: Sequence[str], *, seed: int, resamples: int = 2000) -> Iterator[Size]:
    """One for each target that explains itself and each other trained explainer of it that knows a same share of the
    training data (`shares.Shares.of_pair`) with a same seed.

    On the task's headline metric over all questions, for a two-sided test at 5 %.
    """
    asked = [one for one in series_of(graded) if one["control"] == "none" and one["explainer"] in trained]
    shares, seeds = Shares(asked, trained), dict[tuple[str, str, str, float], set[int]]()
    for one in asked:
        seeds.setdefault((one["task"], one["target"], one["explainer"], one["fraction"]), set()).add(one["seed"])
    known = [metric.name for metric in measured(graded)]
    for task, target, against in sorted({key[:3] for key in seeds}):
        fraction = shares.of_pair(task, target, target, against)
        if against == target or fraction is None:
            continue
        n_seeds = len(seeds[task, target, target, fraction] & seeds[task, target, against, fraction])
        if n_seeds:
            names = {"task": task, "target": target, "against": against}
            metric = headline(task, known)
            found = pilot(
                graded, **names, explainer=target, metric=metric, fraction=fraction, seed=seed, resamples=resamples
            )
            questions = _questions(graded, task, target)
            yield _size(found, questions, n_seeds, **names, fraction=fraction, metric=metric)


def _questions(graded: pa.Table, task: str, target: str) -> int:
    rows = graded.select(["task", "target", "question_id"]).to_pylist()
    return len({row["question_id"] for row in rows if (row["task"], row["target"]) == (task, target)})


def _size(known: Pilot, questions: int, seeds: int, **identity: Any) -> Size:
    seen = known.group_variance > 0
    return Size(
        **identity,
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
