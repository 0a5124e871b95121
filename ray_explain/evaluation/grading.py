"""Each answer held against the truth: one row per answer, from which every score is a sum."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation.answers import Parsed, normalise, parse

GRADED = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("target", pa.string(), nullable=False),
        pa.field("explainer", pa.string(), nullable=False),
        pa.field("control", pa.string(), nullable=False),
        pa.field("seed", pa.int32(), nullable=False),  # of the explainer's training
        pa.field("fraction", pa.float64(), nullable=False),  # of the training data that it knows; 0 if untrained
        pa.field("layer", pa.string(), nullable=False),  # "2", a block "0-3", or "" without a vector
        pa.field("role", pa.string(), nullable=False),
        pa.field("stratum", pa.string(), nullable=False),
        pa.field("changed", pa.bool_()),  # what the intervention does; null for features
        pa.field("predicted_changed", pa.bool_()),  # what the answer says; null for features and what cannot be read
        pa.field("verdict_right", pa.bool_()),  # null for features
        pa.field("content", pa.bool_()),  # whether the content is right, whatever the verdict; null for features
        pa.field("exact", pa.bool_()),  # null where no right answer is known
        pa.field("parsed", pa.bool_(), nullable=False),
        pa.field("similarity", pa.float64()),  # words shared with the nearest right description; features only
        pa.field("correlation", pa.float64()),  # of the answered description with the activations; features only
        pa.field(
            "embedding", pa.float64()
        ),  # cosine with the nearest right description (embeddings.compared); features
        pa.field("simulated", pa.float64()),  # simulator correlation (simulations.simulated); features only
        pa.field("detection", pa.float64()),  # balanced accuracy (simulations.simulated); features only
        pa.field("judged", pa.float64()),  # by a language model (judges.judged), 0 to 1; features only
        pa.field("logprob", pa.float32()),  # of the answer, summed over its tokens
    ]
)
# What marks free descriptions, the most telling first.
OF_FREE_TEXT = ("simulated", "judged", "embedding", "detection")
_OF_FIXED = ("exact", "correlation", "judged", "embedding", "similarity")  # those of a fixed vocabulary
_ASKED = ("question_id", "case_id", "group", "task", "answer", "answers", "layers", "role", "stratum", "changed")


def grade(
    questions: pa.Table,
    answers: pa.Table,
    descriptions: pa.Table | None = None,
    *,
    target: str,
    seed: int,
    fraction: float = 1.0,
) -> pa.Table:
    """One row of GRADED per answer, in the order of `answers`; an answer that cannot be read counts as wrong.

    Exact match, verdict and content are the paper's (section 5), on normalised texts. A description is an exact match
    if it is one of the right ones; its similarity is the best F1 of its words with those of a right one; its
    correlation is its score in `descriptions` (gold or not) for this feature. With `descriptions`, a text that is not
    among them has correlation 0 and counts as unread, and one that is there unscored has a null; without them every
    correlation is null. Where no right answer is known, exact match and similarity are null.

    Args:
        target: Name of the model that the questions are about.
        seed: With which the explainer was trained.
        fraction: Of the training questions that it was trained on or, for a baseline, looked into; 0 for none.

    Raises:
        BadInput: an answer is to no question of this table, a question has two answers of one explainer under one
            control or none, or a question has no group.
    """
    asked = {row["question_id"]: row for row in questions.select(_ASKED).to_pylist()}
    _check(asked, answers)
    scores = None if descriptions is None else _description_scores(descriptions)
    facts: dict[str, Any] = {"target": target, "seed": seed, "fraction": fraction}
    facts |= dict.fromkeys(("judged", "embedding", "simulated", "detection"))
    rows = [_graded(asked[row["question_id"]], row, scores) | facts for row in answers.to_pylist()]
    return records.rows_table(rows, GRADED)


def layer_label(layers: Sequence[int]) -> str:
    """A block of layers as it stands in a table: "2", "0-3", or "" for none."""
    return "-".join(str(layer) for layer in dict.fromkeys([min(layers), max(layers)])) if layers else ""


def word_f1(text: str, right: str) -> float:
    """Harmonic mean of the shares of words that two normalised texts have in common, counted with repeats; 0 to 1."""
    words, right_words = Counter(text.split()), Counter(right.split())
    shared = (words & right_words).total()
    return 2 * shared / (words.total() + right_words.total()) if shared else 0.0


def _check(asked: Mapping[str, dict[str, Any]], answers: pa.Table) -> None:
    unknown = [question for question in answers["question_id"].to_pylist() if question not in asked]
    if unknown:
        raise BadInput(
            f"{len(unknown)} of {answers.num_rows} answers are to no question of this table (such as {unknown[0]}): "
            "score them with the questions that were asked"
        )
    ungrouped = [row["question_id"] for row in asked.values() if not row["group"]]
    if ungrouped:
        raise BadInput(
            f"{len(ungrouped)} questions have no group (such as {ungrouped[0]}): intervals resample groups; "
            "give their cases a `group`"
        )
    for key, series in _by_series(answers).items():
        counts = Counter(series)
        repeated, unanswered = len(series) - len(counts), len(asked) - len(counts)
        if repeated:
            raise BadInput(f"{repeated} questions are answered twice by {key}: keep one answer of each")
        if unanswered:
            raise BadInput(f"{unanswered} of {len(asked)} questions have no answer by {key}: score what was asked")


def _by_series(answers: pa.Table) -> dict[str, list[str]]:
    """The questions that each explainer answered under each control, repeats kept."""
    found: dict[str, list[str]] = {}
    for explainer, control, question in zip(*(answers[n].to_pylist() for n in ("explainer", "control", "question_id"))):
        found.setdefault(f"{explainer!r} under control {control!r}", []).append(question)
    return found


def _description_scores(descriptions: pa.Table) -> dict[str, dict[str, float | None]]:
    """feature -> normalised description -> its best score; None if it has none."""
    found: dict[str, dict[str, float | None]] = {}
    texts = descriptions["description"].to_pylist()
    plain = {text: normalise(text) for text in set(texts)}  # many features share the texts of few concepts
    for case_id, text, score in zip(descriptions["case_id"].to_pylist(), texts, descriptions["score"].to_pylist()):
        scores = found.setdefault(case_id, {})
        known = [value for value in (scores.get(plain[text]), score) if value is not None]
        scores[plain[text]] = max(known, default=None)
    return found


def _graded(
    question: dict[str, Any], answer: dict[str, Any], scores: Mapping[str, Mapping[str, float | None]] | None
) -> dict[str, Any]:
    parsed = parse(answer["text"], question["task"])
    common = {name: question[name] for name in ("question_id", "group", "task", "role", "stratum", "changed")}
    common |= {name: answer[name] for name in ("explainer", "control", "logprob")}
    common["layer"] = layer_label(question["layers"])
    if question["task"] == "features":
        known = None if scores is None else scores.get(question["case_id"], {})
        return common | _description_grade(parsed, [normalise(text) for text in question["answers"]], known)
    return common | _effect_grade(question, parsed, normalise(answer["text"]))


def _effect_grade(question: dict[str, Any], parsed: Parsed, text: str) -> dict[str, Any]:
    truth = parse(question["answer"], question["task"])
    return {
        "predicted_changed": None if parsed.verdict is None else parsed.verdict == "changed",
        "verdict_right": parsed.verdict == truth.verdict,
        "content": parsed.content == truth.content,
        "exact": parsed.verdict is not None and text == normalise(question["answer"]),
        "parsed": parsed.verdict is not None,
        "similarity": None,
        "correlation": None,
    }


def _description_grade(
    parsed: Parsed, right: Iterable[str], known: Mapping[str, float | None] | None
) -> dict[str, Any]:
    text, right = parsed.content or "", list(right)  # none is right where nobody knows
    return {
        "predicted_changed": None,
        "verdict_right": None,
        "content": None,
        "exact": text in right if right else None,
        "parsed": bool(text) if known is None else text in known,
        "similarity": max((word_f1(text, each) for each in right), default=None),
        "correlation": None if known is None else known.get(text, 0.0),
    }


def best_of(graded: pa.Table, names: Sequence[str], name: str) -> pa.Table:
    """The best answer to each question among those of the explainers `names`, as one explainer's `name`.

    It is chosen by the scores themselves, the task's headline (`metrics.headline`) first, as the paper does with
    SelfIE's scales: an advantage that no real answer has.
    """
    of_fixed_vocabulary = graded["correlation"].null_count < graded.num_rows
    scored = _OF_FIXED if of_fixed_vocabulary else (*OF_FREE_TEXT, *_OF_FIXED)
    best: dict[str, tuple[tuple[float, ...], dict[str, Any]]] = {}
    for row in graded.filter(pc.is_in(graded["explainer"], pa.array(names, pa.string()))).to_pylist():
        value = tuple(-1.0 if row[column] is None else float(row[column]) for column in scored)
        if row["question_id"] not in best or value > best[row["question_id"]][0]:
            best[row["question_id"]] = (value, row | {"explainer": name})
    return records.rows_table([row for _, row in best.values()], graded.schema)


def series_of(graded: pa.Table) -> list[dict[str, Any]]:
    """The different (task, target, explainer, control, seed, fraction) of a table, sorted."""
    keys = ["task", "target", "explainer", "control", "seed", "fraction"]
    return graded.group_by(keys).aggregate([]).sort_by([(key, "ascending") for key in keys]).to_pylist()


def rows_of(graded: pa.Table, series: Mapping[str, Any]) -> pa.Table:
    """The rows of one series, sorted by question, so that sums do not depend on the order of a table."""
    mask = None
    for key, value in series.items():
        equal = pc.equal(graded[key], value)
        mask = equal if mask is None else pc.and_(mask, equal)
    return graded.filter(mask).sort_by([("group", "ascending"), ("question_id", "ascending")])
