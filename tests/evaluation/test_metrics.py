import time

import numpy as np
import pytest
from sklearn.metrics import f1_score

from ray_explain import records
from ray_explain.evaluation.metrics import METRICS, grade, headline, scores, tally


@pytest.fixture
def scored(questions, answers):
    """scored(rows, texts): the scores as a mapping from (metric, by) to their row."""

    def score(rows, texts, **changes):
        table = questions(*rows)
        graded = grade(table, answers(table, texts), target="t", seed=0)
        found = scores(graded, seed=0, **{"resamples": 200, **changes})
        return {(row["metric"], row["by"]): row for row in found.to_pylist()}

    return score


def hand_worked(say):
    """Six questions: what is so, and what is said of it."""
    rows = [
        {"changed": True, "content": "rome", "layers": [0]},  # exact
        {"changed": True, "content": "rome", "layers": [0]},  # content wrong
        {"changed": True, "content": "rome", "layers": [1]},  # verdict wrong
        {"changed": False, "content": "oslo", "layers": [1]},  # exact
        {"changed": False, "content": "oslo", "layers": [1]},  # both wrong
        {"changed": False, "content": "oslo", "layers": [1]},  # unread
    ]
    texts = [say(True, "rome"), say(True, "bonn"), say(False, "rome"), say(False, "oslo"), say(True, "bonn"), "?"]
    return rows, texts


def test_scores_of_a_table_worked_by_hand(scored, say):
    found = scored(*hand_worked(say))
    value = {key: row["value"] for key, row in found.items()}
    assert value["exact_match", "all"] == pytest.approx(2 / 6)
    assert value["content_match", "all"] == pytest.approx(3 / 6)
    # changed: 2 found, 1 missed, 1 false; unchanged: 1 found, 2 missed (one of them unread), 1 false
    assert value["changed_f1", "all"] == pytest.approx((2 * 2 / (3 + 2 + 1) + 2 * 1 / (3 + 1 + 1)) / 2)
    assert value["exact_match", "changed=true"] == pytest.approx(1 / 3)
    assert value["content_match", "changed=true"] == pytest.approx(2 / 3)
    assert value["exact_match", "layer=1"] == pytest.approx(1 / 4)
    assert found["exact_match", "all"]["n"] == 6 and found["exact_match", "layer=0"]["n"] == 2
    assert found["exact_match", "all"]["unparsed"] == 1 and found["exact_match", "changed=true"]["unparsed"] == 0


def test_f1_is_scikit_learns_macro_f1_with_unread_answers_as_a_class_of_their_own(scored, say):
    rng = np.random.default_rng(0)
    truth, said = rng.random(300) < 0.3, rng.choice(["changed", "unchanged", "unread"], 300, p=[0.3, 0.6, 0.1])
    texts = ["?" if each == "unread" else say(each == "changed", "x") for each in said]
    found = scored([{"changed": bool(each)} for each in truth], texts)
    names = np.where(truth, "changed", "unchanged")
    wanted = f1_score(names, said, labels=["changed", "unchanged"], average="macro")
    assert found["changed_f1", "all"]["value"] == pytest.approx(wanted, abs=1e-12)


def test_f1_is_as_sure_as_the_groups_of_its_rarer_class_allow(scored, say):
    """Resamples without that class have no F1: over the others alone, one group of it would look like certainty."""
    rows = [{"changed": i < 6, "content": "x", "group": f"g{i // 6}"} for i in range(60)]
    texts = [say(row["changed"] and i % 3 > 0, "x") for i, row in enumerate(rows)]
    one = scored(rows, texts)
    assert one["changed_f1", "all"]["value"] == pytest.approx((8 / 10 + 108 / 110) / 2)
    assert one["changed_f1", "all"]["low"] is one["changed_f1", "all"]["high"] is None
    assert one["exact_match", "all"]["low"] < one["exact_match", "all"]["value"] < one["exact_match", "all"]["high"]
    rows = [row | {"group": f"g{i % 3}" if row["changed"] else row["group"]} for i, row in enumerate(rows)]
    three = scored(rows, texts)["changed_f1", "all"]
    assert three["value"] == one["changed_f1", "all"]["value"] and three["low"] < three["value"] < three["high"]


def test_a_class_that_does_not_occur_leaves_f1_undefined_and_never_nan(scored, say):
    for last in (False, True):  # whether or not it is falsely said to occur
        found = scored([{"changed": False, "content": "x"}] * 4, [say(False, "x")] * 3 + [say(last, "x")])
        assert [found["changed_f1", "all"][name] for name in ("value", "low", "high")] == [None, None, None]
        assert found["exact_match", "all"]["value"] == (0.75 if last else 1)
    assert ("exact_match", "changed=true") not in found
    assert all(value == value for row in found.values() for value in row.values())


def test_one_group_gives_a_value_without_an_interval(scored, say):
    found = scored([{"group": "g", "content": "x"}] * 4, [say(True, "x"), "?", "?", "?"])
    assert [found["exact_match", "all"][name] for name in ("value", "low", "high")] == [0.25, None, None]


def test_all_right_is_not_certainly_all_right(scored, say):
    found = scored([{"content": "x"}] * 10, [say(True, "x")] * 10)
    row = found["exact_match", "all"]
    assert row["high"] == 1
    assert row["low"] == pytest.approx(0.025 ** (1 / 10))  # where 10 of 10 right has probability 2.5 %


def test_the_order_of_rows_changes_nothing(questions, answers, say):
    rng = np.random.default_rng(1)
    rows = [{"group": f"g{rng.integers(9)}", "changed": bool(rng.integers(2)), "role": "ab"[i % 2]} for i in range(60)]
    table = questions(*rows)
    told = answers(table, [say(bool(rng.integers(2)), f"x{i + rng.integers(2)}") for i in range(60)])
    graded = grade(table, told, target="t", seed=0)
    order = rng.permutation(60)
    mixed = grade(table.take(rng.permutation(60)), told.take(order), target="t", seed=0)
    assert scores(mixed, seed=5, resamples=300).equals(scores(graded, seed=5, resamples=300))


def test_questions_of_a_group_count_as_one_in_the_interval(scored, say):
    rows = [{"group": f"g{i // 20}", "content": "x"} for i in range(400)]
    texts = [say(True, "x" if i // 20 % 2 else "y") for i in range(400)]  # a group is all right or all wrong
    together = scored(rows, texts, resamples=1000)["exact_match", "all"]
    apart = scored([{"content": "x"}] * 400, texts, resamples=1000)["exact_match", "all"]
    width = [row["high"] - row["low"] for row in (together, apart)]
    assert width[0] / width[1] == pytest.approx(20**0.5, rel=0.15)


def test_features_have_their_own_metrics_and_an_unscored_description_is_not_counted(questions, answers):
    row = {"task": "features", "answer": "cities", "answers": ["cities"], "changed": None}
    table = questions(*[row] * 3)
    rows = [("c0", "cities", 0.5), ("c1", "hills", None), ("c2", "cities", 0.7)]
    told = [{"case_id": c, "description": d, "score": s, "gold": True, "origin": "x"} for c, d, s in rows]
    graded = grade(
        table,
        answers(table, ["cities", "hills", "?"]),
        records.rows_table(told, records.DESCRIPTIONS),
        target="t",
        seed=0,
    )
    found = {row["metric"]: row for row in scores(graded, by=["all"], seed=0, resamples=100).to_pylist()}
    assert set(found) == {"exact_match", "similarity", "correlation"}
    assert found["correlation"]["value"] == pytest.approx(0.25) and found["correlation"]["n"] == 2
    assert found["exact_match"]["value"] == pytest.approx(1 / 3) and found["exact_match"]["n"] == 3
    assert found["correlation"]["unparsed"] == 1


def test_what_was_not_measured_is_left_out(questions, answers):
    table = questions({"task": "features", "answer": "a", "answers": ["a"], "changed": None})
    graded = grade(table, answers(table, ["a"]), target="t", seed=0)  # no descriptions: no correlation
    assert set(scores(graded, seed=0)["metric"].to_pylist()) == {"exact_match", "similarity"}


def test_layers_stand_in_their_order(questions, answers):
    table = questions(*[{"layers": [layer]} for layer in (10, 2, 0)])
    graded = grade(table, answers(table, ["?"] * 3), target="t", seed=0)
    parts = [part.by for part in tally(graded, ["layer"], METRICS).parts if part.metric.name == "exact_match"]
    assert parts == ["layer=0", "layer=2", "layer=10"]


def test_a_stratum_may_be_called_by_a_digit_that_is_no_number(questions, answers):
    table = questions({"stratum": "²"}, {"stratum": "2"})
    graded = grade(table, answers(table, ["x"] * 2), target="t", seed=0)
    parts = [part.by for part in tally(graded, ["stratum"], METRICS).parts if part.metric.name == "exact_match"]
    assert parts == ["stratum=2", "stratum=²"]


def test_an_unknown_part_or_an_empty_table_is_refused(questions, answers):
    table = questions({})
    graded = grade(table, answers(table, ["?"]), target="t", seed=0)
    with pytest.raises(ValueError, match="by 'moon': scores can be split by all, changed, layer, role, stratum"):
        scores(graded, by=["moon"], seed=0)
    with pytest.raises(ValueError, match="no answers to score"):
        scores(graded.slice(0, 0), seed=0)


def test_five_thousand_answers_are_scored_with_two_thousand_resamples_in_five_seconds(questions, answers, say):
    rng = np.random.default_rng(0)
    rows = [
        {
            "group": f"g{i // 4}",
            "layers": [i % 4],
            "role": "abc"[i % 3],
            "stratum": "xyz"[i % 3],
            "changed": bool(rng.integers(2)),
        }
        for i in range(5000)
    ]
    table = questions(*rows)
    told = answers(table, [say(bool(rng.integers(2)), f"x{i}") for i in range(5000)])
    start = time.process_time()
    scores(grade(table, told, target="t", seed=0), seed=0)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("task", "known", "judged_on"),
    [
        ("patching", {"exact_match", "content_match"}, "exact_match"),
        ("features", {"exact_match", "similarity", "correlation", "judged", "embedding"}, "exact_match"),
        ("features", {"exact_match", "similarity", "judged", "embedding", "simulated"}, "simulated"),
        ("features", {"exact_match", "similarity", "judged", "embedding"}, "judged"),
        ("features", {"exact_match", "similarity", "detection"}, "detection"),
        ("features", {"detection"}, "detection"),  # vectors that nobody described
        ("features", {"exact_match", "similarity"}, "exact_match"),
    ],
)
def test_free_descriptions_are_judged_on_what_marked_them_and_all_else_on_exact_match(task, known, judged_on):
    assert headline(task, known) == judged_on
