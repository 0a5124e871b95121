"""Described answers by what a simulator, and a model that tells windows apart, make of them, where exemplars exist."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import records
from ray_explain.evaluation.answers import parse
from ray_explain.ground_truth.describers import DESCRIBED

GOLD = "gold descriptions"
"""Name under which the right descriptions themselves are scored beside explainers: the ceiling."""


def labelled(questions: pa.Table) -> pa.Table:
    """The questions to which a right answer is known."""
    return questions.filter(pc.greater(pc.list_value_length(questions["answers"]), 0))


def gold_answers(questions: pa.Table) -> pa.Table:
    """records.ANSWERS: the right description as the answer to each question."""
    pairs = zip(questions["question_id"].to_pylist(), questions["answer"].to_pylist(), strict=True)
    facts = {"explainer": GOLD, "control": "none", "logprob": None, "n_tokens": 0}
    return records.rows_table([{"question_id": one, "text": text} | facts for one, text in pairs], records.ANSWERS)


def answered(described: pa.Table, questions: pa.Table, answers: Iterable[pa.Table]) -> pa.Table:
    """`described` (describers.DESCRIBED) with the different answers to questions about each feature for descriptions;
    features without any answer, and empty answers, are left out."""
    case = _cases(questions)
    texts: dict[str, dict[str, None]] = defaultdict(dict)
    for table in answers:
        for question, text in zip(table["question_id"].to_pylist(), table["text"].to_pylist(), strict=True):
            if parse(text, "features").content is not None:
                texts[case[question]][text.strip()] = None
    kept = described.filter(pc.is_in(described["case_id"], pa.array(list(texts), pa.string())))
    told = [[{"description": t, "origin": "answer"} for t in texts[one]] for one in kept["case_id"].to_pylist()]
    at, field = kept.column_names.index("descriptions"), DESCRIBED.field("descriptions")
    return kept.set_column(at, field, pa.array(told, field.type))


def simulated(graded: pa.Table, questions: pa.Table, answers: pa.Table, scored: pa.Table) -> pa.Table:
    """`graded` with `simulated`, the correlation of what a simulator foretells from an answer with the activations of
    the feature asked about, and `detection`, the balanced accuracy of telling from it where the feature is active. Null
    for other tasks and what could not be scored; an empty answer has 0 and 0.5, unless none of the other answers about
    its feature has a score: then it is of those that cannot be told apart, as where a feature is on in one window only.
    A text from which the simulator foretells the same for all tokens has 0 (as in the paper, 4.2): it is not left out.

    Args:
        scored: What `ScoreStage` makes of `answered`.

    Raises:
        ValueError: `graded` is not of these answers, or one of them is not in `scored`.
    """
    case, known = _cases(questions), dict[str, dict[str, dict[str, Any]]]()
    for case_id, told in zip(scored["case_id"].to_pylist(), scored["descriptions"].to_pylist(), strict=True):
        known[case_id] = {one["description"]: one for one in told}
    unsaid = _of_empty([one for own in known.values() for one in own.values()])  # where all are empty
    keys = ("question_id", "explainer", "control")
    said = {tuple(row[key] for key in keys): row["text"].strip() for row in answers.to_pylist()}
    columns: dict[str, list[float | None]] = {name: [] for name in unsaid}
    for row in graded.select([*keys, "task"]).to_pylist():
        values: dict[str, float | None] = dict.fromkeys(columns)
        if row["task"] == "features":
            text = said.get(tuple(row[key] for key in keys))
            own = known.get(case[row["question_id"]], {})
            one = own.get(text or "")
            if text is None or (one is None and parse(text, "features").content is not None):
                raise ValueError(f"no simulated score of the answer by {row['explainer']!r} to {row['question_id']}")
            empty = _of_empty(own.values()) if own else unsaid
            values = {"simulated": _correlation(one), "detection": one["detection"]} if one else empty
        for name, value in values.items():
            columns[name].append(value)
    for name, column in columns.items():
        at = graded.column_names.index(name)
        graded = graded.set_column(at, graded.schema.field(name), pa.array(column, pa.float64()))
    return graded


def _of_empty(others: Collection[Mapping[str, Any]]) -> dict[str, float | None]:
    """What an answer without words has, beside others."""
    return {
        "simulated": 0.0 if any(_correlation(one) is not None for one in others) else None,
        "detection": 0.5 if any(one["detection"] is not None for one in others) else None,
    }


def _correlation(told: Mapping[str, Any]) -> float | None:
    return 0.0 if told["score"] is None and told["score_n"] else told["score"]


def _cases(questions: pa.Table) -> dict[str, str]:
    """question_id -> case_id."""
    return dict(zip(questions["question_id"].to_pylist(), questions["case_id"].to_pylist(), strict=True))
