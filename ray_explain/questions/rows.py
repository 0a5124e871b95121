"""The rows of a questions table as questions."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.explainer.examples import Question


def questions_of(table: pa.Table) -> Iterator[Question]:
    """The rows of a questions table as the explainer package takes them."""
    vectors = records.vectors_of(table.column("vectors"))
    columns = ("question_id", "task", "prompt", "answer", "layers")
    for row, own in zip(table.select(columns).to_pylist(), vectors, strict=True):
        yield Question(row["question_id"], row["task"], row["prompt"], row["answer"], own, tuple(row["layers"]))


def without_vectors(question: Question) -> Question:
    """The same words, and nothing where the vectors were: all their numbers are 0."""
    return question._replace(vectors=np.zeros_like(question.vectors))
