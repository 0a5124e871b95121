import numpy as np
import pyarrow as pa
import pytest

from ray_explain.evaluation.calibration import calibrations
from ray_explain.evaluation.grading import GRADED
from ray_explain.records import rows_table


def graded(confidence, right, explainer="a", groups=None):
    rows = [
        {field.name: None for field in GRADED}
        | {name: "" for name in ("layer", "role", "stratum")}
        | {"question_id": f"q{i:05}", "group": f"g{i if groups is None else i % groups}", "task": "patching"}
        | {"target": "t", "explainer": explainer, "control": "none", "seed": 0, "exact": bool(hit), "parsed": True}
        | {"logprob": None if p is None else float(np.log(p))}
        for i, (p, hit) in enumerate(zip(confidence, right))
    ]
    if "fraction" in GRADED.names:
        rows = [row | {"fraction": 1.0} for row in rows]
    return rows_table(rows, GRADED)


def one(table, **changes):
    (found,) = calibrations(table, ["a"], **{"seed": 0, "resamples": 400, **changes})
    return found


def test_an_explainer_that_is_right_as_often_as_it_says_is_calibrated():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.05, 1, 4000)
    found = one(graded(confidence, rng.random(4000) < confidence))
    assert len(found.bins) == 8 and {bin.n for bin in found.bins} == {500}
    assert all(bin.low < bin.confidence + 0.02 and bin.high > bin.confidence - 0.02 for bin in found.bins)
    over, low, high = found.overconfidence
    assert low < over < high and low < 0 < high
    error, low, _ = found.error
    assert error < 0.04 and low == 0


def test_an_explainer_that_is_always_sure_and_half_right_is_overconfident_by_half():
    found = one(graded([0.98] * 400, [True, False] * 200))
    over, low, high = found.overconfidence
    assert over == pytest.approx(0.48) and low > 0.4 and high < 0.56
    error, low, high = found.error
    assert error == pytest.approx(0.48) and 0.35 < low < 0.44 and 0.52 < high < 0.6


@pytest.mark.parametrize("error", [0.0, 0.15])
def test_the_interval_of_the_error_holds_the_truth_in_95_percent_of_studies_or_more(error):
    """Percentiles of the bootstrap would hold an error of 0 never, since a resample is off by chance once more."""
    rng, held = np.random.default_rng(3), []
    for _ in range(200):
        confidence = rng.uniform(0.2, 0.95, 300)
        luck = rng.normal(0, 0.1, 60)[np.arange(300) % 60]
        found = one(graded(confidence, rng.random(300) < confidence - error + luck, groups=60), resamples=200)
        held.append(found.error[1] <= error <= found.error[2])
    assert np.mean(held) > 0.94


def test_intervals_resample_groups_and_few_answers_make_few_bins():
    rng = np.random.default_rng(1)
    hits = np.tile(rng.random(10) < 0.5, 40)  # all answers of a group are right, or none is
    clustered, free = (one(graded([0.5] * 400, hits, groups=g)).overconfidence for g in (10, 400))
    assert clustered[2] - clustered[1] > 3 * (free[2] - free[1])
    few = one(graded([0.5, 0.6, 0.7], [True, True, False]))
    assert [bin.n for bin in few.bins] == [3]


def test_answers_without_a_confidence_and_baselines_are_left_out_and_nothing_is_nan():
    table = pa.concat_tables([graded([0.5, None, 0.7], [True, False, True]), graded([0.5], [True], "majority")])
    found = one(table)
    assert found.n == 2 and found.explainer == "a"
    alone = one(graded([0.5], [True]))
    assert alone.overconfidence[1:] == alone.error[1:] == (None, None) and alone.bins[0].low is None
    assert calibrations(table.slice(0, 0), ["a"], seed=0) == []


def test_answers_that_nobody_can_call_right_or_wrong_are_left_out():
    known = graded([0.9] * 40, [True] * 40)
    other = graded([0.1] * 40, [True] * 40)
    at = other.column_names.index("exact")
    bare = other.set_column(at, other.schema.field("exact"), pa.nulls(40, pa.bool_()))
    assert one(pa.concat_tables([known, bare])) == one(known)
