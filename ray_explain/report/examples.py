"""Which answers a report shows as worked examples."""

from typing import NamedTuple

import pyarrow as pa

PER_CELL = 4  # of each task, target and explainer


class Chosen(NamedTuple):
    """An answer to be shown, and how it was judged."""

    question_id: str
    right: bool | None  # None where answers are scored, not right or wrong
    score: float | None  # by the headline metric, where that is not exact match


def examples_of(graded: pa.Table, metric: str) -> list[Chosen]:
    """`PER_CELL` of the graded answers of one series, the same in every report, whichever way they came out.

    On exact match half of them right and half wrong, as far as there are both, the first by id. On another metric those
    at evenly spaced ranks, the best of them first; what was not scored is left out.
    """
    if metric == "exact_match":
        return _right_and_wrong(graded)
    rows = graded.select(["question_id", metric]).to_pylist()
    ranked = sorted((-row[metric], row["question_id"]) for row in rows if row[metric] is not None)
    n = min(PER_CELL, len(ranked))
    return [
        Chosen(question, None, -score)
        for score, question in (ranked[(2 * i + 1) * len(ranked) // (2 * n)] for i in range(n))
    ]


def _right_and_wrong(graded: pa.Table) -> list[Chosen]:
    rows = graded.select(["question_id", "exact"]).sort_by("question_id").to_pylist()
    right, wrong = (
        [Chosen(row["question_id"], is_right, None) for row in rows if row["exact"] is is_right]
        for is_right in (True, False)
    )
    half = PER_CELL // 2
    n_right = min(len(right), max(half, PER_CELL - len(wrong)))
    return right[:n_right] + wrong[: PER_CELL - n_right]
