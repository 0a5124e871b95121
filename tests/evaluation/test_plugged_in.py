"""Explainers whose use of the vector is known, from their answers to the sentence in the report."""

import numpy as np
import pyarrow as pa
import pytest

from ray_explain.evaluation.comparisons import comparisons
from ray_explain.evaluation.controls import CONTROLS
from ray_explain.evaluation.metrics import grade, scores
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Scores
from ray_explain.report.findings import Findings
from ray_explain.report.page import page

N = 200


@pytest.fixture
def told(questions, answers, say):
    """The report's finding on the vectors of an explainer that is right on these shares under each control."""
    rng = np.random.default_rng(0)
    table = questions(*[{"group": f"g{i // 4}", "changed": bool(rng.random() < 0.4)} for i in range(N)])
    truths = table["answer"].to_pylist()

    def make(own, controlled):
        parts = []
        for control in ("none", *CONTROLS):
            share = own if control == "none" else controlled
            said = [truth if i < share * N else say(True, "nonsense") for i, truth in enumerate(truths)]
            parts.append(grade(table, answers(table, said, "a", control), target="a", seed=0))
        graded = pa.concat_tables(parts)
        data = ReportData(
            title="plugged in",
            scores=scores(graded, seed=0, resamples=300),
            comparisons=comparisons(graded, trained=["a"], seed=0, resamples=300, permutations=499),
            explainers={"a": "a"},
        )
        (found,) = Findings(data, Scores(data)).vector_use()
        assert found.text.split(":")[0] in page(data, Scores(data))
        return found

    return make


def test_of_an_explainer_that_ignores_vectors_the_report_says_that_there_is_no_evidence_of_their_use(told):
    found = told(0.6, 0.6)
    assert found.verdict == "not shown"
    assert found.text.startswith("No evidence that a, explaining itself, uses the vector")


def test_of_an_oracle_the_uplift_is_its_accuracy_minus_the_controls(told):
    found = told(1.0, 0.3)
    assert found.verdict == "shown"
    assert [row["difference"] for row in found.differences] == pytest.approx([0.7] * len(CONTROLS))


def test_of_one_that_vectors_mislead_the_report_says_so(told):
    assert told(0.3, 0.6).verdict == "opposite"
