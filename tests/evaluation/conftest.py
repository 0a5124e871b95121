"""Small tables of questions and answers, made from the columns that a test is about."""

import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records

D = 4
UNCHANGED = "The output would remain unchanged from <<<{}>>>."
CHANGED = "The most likely output would change to <<<{}>>>."


@pytest.fixture
def say():
    """say(True, "rome"): the sentence that says the output changes to rome."""
    return lambda changed, content: (CHANGED if changed else UNCHANGED).format(content)


@pytest.fixture
def questions():
    """questions(row, ..., vectors=...): a table of patching questions; rows give the columns that differ."""

    def make(*rows, vectors=None):
        full = []
        for i, row in enumerate(rows):
            changed = row.get("changed", True)
            content = row.get("content", f"x{i}")
            answer = row.get("answer", (CHANGED if changed else UNCHANGED).format(content))
            defaults = {
                "question_id": f"q{i}",
                "case_id": f"c{i}",
                "group": f"g{i}",
                "split": "test",
                "task": "patching",
                "prompt": "at <vector>",
                "answer": answer,
                "answers": [answer],
                "layers": [0],
                "role": "final",
                "stratum": "lives",
                "changed": changed,
                "wording": "brief/patching/1",
            }
            full.append(defaults | {name: value for name, value in row.items() if name in defaults})
        schema = records.questions(D)
        columns = {
            field.name: pa.array([row.get(field.name) for row in full], field.type)
            for field in schema
            if field.name != "vectors"
        }
        own = vectors if vectors is not None else [np.full((1, D), i + 1, np.float32) for i in range(len(rows))]
        columns["vectors"] = records.vectors_array(own, own[0].shape[1] if len(own) else D)
        return records.conform(pa.table(columns), records.questions(own[0].shape[1] if len(own) else D))

    return make


@pytest.fixture
def answers():
    """answers(questions, texts, explainer=..., control=...): what an explainer said to each question."""

    def make(table, texts, explainer="self", control="none"):
        rows = [
            {
                "question_id": question,
                "explainer": explainer,
                "control": control,
                "text": text,
                "logprob": -1.0,
                "n_tokens": 5,
            }
            for question, text in zip(table["question_id"].to_pylist(), texts, strict=True)
        ]
        return records.rows_table(rows, records.ANSWERS)

    return make
