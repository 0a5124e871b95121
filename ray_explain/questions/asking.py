"""What the three kinds of questions have in common: rows become a table, and what cannot be asked is dropped."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.evaluation import answers
from ray_explain.ground_truth.outcomes import vectors_table
from ray_explain.questions import wordings
from ray_explain.stages import Result

SPECIAL = "the answer is a special token, which no explainer of its family can write"


def plain_columns(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table without their vectors, which are too many numbers for Python objects."""
    return table.drop_columns([name for name in table.column_names if name == "vectors"]).to_pylist()


def askable(
    effects: pa.Table, told: tuple[str, str], special: Collection[str], wrong: Sequence[str | None]
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The effects that can be asked about; and (id, reason) of those of which something is `wrong`, or whose answer is
    one of the `special` tokens.

    Args:
        told: The columns of the answers of both runs; asked for is the second where it is another, else the first.
    """
    before, after, changed, names = (effects[name].to_pylist() for name in (*told, "changed", "case_id"))
    answers = [b if differs else a for a, b, differs in zip(before, after, changed)]
    reasons = [why or (SPECIAL if answer.strip() in special else None) for why, answer in zip(wrong, answers)]
    dropped = [(name, why) for name, why in zip(names, reasons) if why]
    return effects.filter(pa.array([why is None for why in reasons], pa.bool_())) if dropped else effects, dropped


def fault(question: dict[str, Any], n_vectors: int) -> str | None:
    """Why a question cannot be asked or its answer not be scored; None if it can."""
    if question["prompt"].count(wordings.VECTOR) != n_vectors:
        return f"text holds the mark {wordings.VECTOR}"
    if question["task"] == "features":
        return None
    parsed = answers.parse(question["answer"], question["task"])
    readable = parsed.verdict == ("changed" if question["changed"] else "unchanged")
    return None if readable else "answer cannot be read back"


def asked(
    rows: Iterable[dict[str, Any]], vectors: list[np.ndarray], d_model: int, dropped: list[tuple[str, str]]
) -> Result:
    """The questions table of `rows` (all its columns but vectors and question_id), each with its vectors [n, d_model].

    A row with a `fault` is dropped, after those `dropped` already. `question_id` depends on what is asked and on the
    right answer, but not on the vectors, whose last bits differ between machines.
    """
    kept: list[dict[str, Any]] = []
    kept_vectors: list[np.ndarray] = []
    for row, row_vectors in zip(rows, vectors, strict=True):
        if reason := fault(row, len(row_vectors)):
            dropped.append((row["case_id"], reason))
            continue
        identity = records.content_id(row["case_id"], row["wording"], row["prompt"], row["answer"])
        kept.append({"question_id": identity, **row})
        kept_vectors.append(row_vectors)
    return Result(vectors_table(kept, kept_vectors, records.questions(d_model)), dropped)
