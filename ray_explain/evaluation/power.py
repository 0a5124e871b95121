"""How large a study has to be, from a finished one as pilot."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_explain.evaluation.comparisons import pilot
from ray_explain.evaluation.grading import rows_of, series_of
from ray_explain.evaluation.intervals import CONFIDENCE, Pilot, detectable, questions_needed
from ray_explain.evaluation.metrics import METRICS, headline, measured
from ray_explain.evaluation.shares import Shares

WANTED = (0.02, 0.05, 0.10)  # differences of self and cross in the headline metric
POWER = 0.8
MOST_SEEDS = 50


@dataclass(frozen=True, kw_only=True)
class Need:
    """What it takes to find a difference: questions with as many seeds as the pilot had, and seeds with its questions.

    A pilot of several seeds is told at least two, since a study of one says nothing of others. None where no number of
    questions, or not even `MOST_SEEDS` seeds, would do.
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
    n_tests: int  # of self minus cross on the task, over which p-values are corrected
    questions: int  # of the pilot, that have the metric
    seeds: int
    seed_variance: float | None  # None with one seed, which says nothing of others
    detectable: float | None  # the difference that a study like the pilot finds with probability `POWER`
    needs: Sequence[Need]  # none, as `detectable`, where the two differ alike in all groups: no spread is seen


def sizes(graded: pa.Table, trained: Sequence[str], *, seed: int, resamples: int = 2000) -> Iterator[Size]:
    """One for each target that explains itself and each other trained explainer of it that knows a same share of the
    training data (`shares.Shares.of_pair`) with a same seed.

    On the task's headline metric over all questions, for a two-sided test at 5 % that is corrected over all of these
    comparisons of a task: as large as the smallest of Holm's p-values asks for.
    """
    asked = [one for one in series_of(graded) if one["control"] == "none" and one["explainer"] in trained]
    shares, seeds = Shares(asked, trained), dict[tuple[str, str, str, float], set[int]]()
    for one in asked:
        seeds.setdefault((one["task"], one["target"], one["explainer"], one["fraction"]), set()).add(one["seed"])
    found = []
    for task, target, against in sorted({key[:3] for key in seeds}):
        fraction = shares.of_pair(task, target, target, against)
        if against != target and fraction is not None:
            both = seeds[task, target, target, fraction] & seeds[task, target, against, fraction]
            found += [(task, target, against, fraction, len(both))] if both else []
    tests, known = Counter(task for task, *_ in found), [metric.name for metric in measured(graded)]
    for task, target, against, fraction, n_seeds in found:
        identity: dict[str, Any] = {"task": task, "target": target, "against": against, "fraction": fraction}
        metric = headline(task, known)
        spread = pilot(graded, **identity, explainer=target, metric=metric, seed=seed, resamples=resamples)
        scored = _questions(graded, metric, task=task, target=target, fraction=fraction, explainers=(target, against))
        yield _size(spread, scored, n_seeds, tests[task], **identity, metric=metric)


def _questions(graded: pa.Table, metric: str, *, explainers: tuple[str, str], **of: Any) -> int:
    """Those whose answers by both explainers all have the metric: what nobody marked tells nothing."""
    asked = [rows_of(graded, of | {"explainer": name, "control": "none"}) for name in explainers]
    rows, counted = pa.concat_tables(asked), next(it.counted for it in METRICS if it.name == metric)
    ids, known = rows["question_id"].to_numpy(zero_copy_only=False), counted(rows)
    return len(set(ids) - set(ids[~known]))


def _size(known: Pilot, questions: int, seeds: int, n_tests: int, **identity: Any) -> Size:
    seen, alpha = known.group_variance > 0, (1 - CONFIDENCE) / n_tests
    return Size(
        **identity,
        n_tests=n_tests,
        questions=questions,
        seeds=seeds,
        seed_variance=known.seed_variance if seeds > 1 else None,
        detectable=detectable(known, questions, seeds=seeds, power=POWER, alpha=alpha) if seen else None,
        needs=[_need(wanted, known, questions, seeds, alpha) for wanted in WANTED] if seen else [],
    )


def _need(wanted: float, known: Pilot, questions: int, seeds: int, alpha: float) -> Need:
    test, least = {"power": POWER, "alpha": alpha}, min(seeds, 2)
    enough = (n for n in range(least, MOST_SEEDS + 1) if detectable(known, questions, seeds=n, **test) <= wanted)
    try:
        needed: int | None = questions_needed(wanted, known, seeds=seeds, **test)
    except ValueError:  # the seeds alone spread more than that
        needed = None
    return Need(wanted=wanted, questions=needed, seeds=next(enough, None))
