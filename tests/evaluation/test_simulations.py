import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.evaluation.grading import grade
from ray_explain.evaluation.metrics import scores
from ray_explain.evaluation.simulations import GOLD, answered, gold_answers, labelled, simulated
from ray_explain.ground_truth.describers import DESCRIBED


def feature(i, right):
    facts = {"task": "features", "answer": right, "answers": [right], "changed": None}
    return {"question_id": f"q{i}", "case_id": f"c{i}", **facts}


def described(*case_ids):
    rows = [
        {
            **{"case_id": one, "group": one, "split": "test", "layer": 0, "source": "sae", "feature_id": i},
            **{name: None for name in DESCRIBED.names if DESCRIBED.field(name).nullable},
            **{"fired": 1, "seen": 2, "windows": [], "descriptions": [{"description": "old", "origin": "m"}]},
        }
        for i, one in enumerate(case_ids)
    ]
    return records.rows_table(rows, DESCRIBED)


def scored(**told):
    """case -> text -> (score, detection)."""
    rows = [
        {
            "case_id": case,
            "descriptions": [
                {"description": text, "score": score, "detection": detection, "score_n": (*n, 9)[0]}
                for text, (score, detection, *n) in own.items()
            ],
        }
        for case, own in told.items()
    ]
    return pa.Table.from_pylist(rows)


def test_each_different_answer_about_a_feature_is_to_be_scored_once(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"), feature(2, "rain"))
    tables = [answers(asked, [" cities ", "", "snow"]), answers(asked, ["cities", " ", "rain"]), gold_answers(asked)]
    made = answered(described("c0", "c1", "c2", "c3"), asked, tables)
    texts = [[one["description"] for one in own] for own in made["descriptions"].to_pylist()]
    assert dict(zip(made["case_id"].to_pylist(), texts)) == {"c0": ["cities"], "c1": ["goats"], "c2": ["snow", "rain"]}
    assert made.schema.equals(DESCRIBED)


def test_an_answer_has_the_scores_of_its_own_feature_and_gold_is_the_ceiling(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"), feature(2, "rain"))
    told = scored(
        c0={"cities": (0.9, 1.0), "goats": (0.1, 0.6)}, c1={"goats": (0.7, None)}, c2={"rain": (None, 0.8, None)}
    )
    said = pa.concat_tables([answers(asked, ["goats", "goats", ""]), gold_answers(asked)])
    graded = simulated(grade(asked, said, target="a", seed=0), asked, said, told)
    assert graded["simulated"].to_pylist() == pytest.approx([0.1, 0.7, None, 0.9, 0.7, None])
    assert graded["detection"].to_pylist() == pytest.approx([0.6, None, 0.5, 1, None, 0.8])
    rows = {r["explainer"]: r for r in scores(graded, by=("all",), seed=0).to_pylist() if r["metric"] == "simulated"}
    assert rows[GOLD]["value"] == pytest.approx(0.8) and rows[GOLD]["n"] == 2


def test_a_text_that_makes_the_simulator_say_the_same_everywhere_is_worth_nothing_and_counts(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"))
    said = answers(asked, ["snow", "goats"])
    told = scored(c0={"snow": (None, 0.5, 12)}, c1={"goats": (0.5, 1.0)})
    assert simulated(grade(asked, said, target="a", seed=0), asked, said, told)["simulated"].to_pylist() == [0, 0.5]


def test_an_empty_answer_has_no_score_where_nothing_was_scored(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"))
    said = answers(asked, ["", "goats"])
    graded = simulated(grade(asked, said, target="a", seed=0), asked, said, scored(c1={"goats": (0.5, None)}))
    assert graded["simulated"].to_pylist() == [0, 0.5] and graded["detection"].to_pylist() == [None, None]


def test_where_no_words_can_be_scored_an_empty_answer_has_no_score_either(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"))
    said = pa.concat_tables([answers(asked, ["", ""]), gold_answers(asked)])
    told = scored(c0={"cities": (None, None, None)}, c1={"goats": (0.5, 0.8)})
    graded = simulated(grade(asked, said, target="a", seed=0), asked, said, told)
    assert graded["simulated"].to_pylist() == [None, 0, None, 0.5]
    assert graded["detection"].to_pylist() == [None, 0.5, None, 0.8]


def test_answers_of_other_tasks_have_none_and_unscored_texts_are_refused(questions, answers):
    asked = questions({"question_id": "q0", "case_id": "c0"}, feature(1, "goats"))
    said = answers(asked, ["goats", "goats"])
    graded = grade(asked, said, target="a", seed=0)
    assert simulated(graded, asked, said, scored(c1={"goats": (0.5, 1.0)}))["simulated"].to_pylist() == [None, 0.5]
    with pytest.raises(ValueError, match="no simulated score of the answer by 'self' to q1"):
        simulated(graded, asked, said, scored(c1={"rain": (0.5, 1.0)}))


def test_an_answer_of_nothing_but_a_full_stop_is_empty(questions, answers):
    asked = questions(feature(0, "cities"), feature(1, "goats"))
    said = answers(asked, [" ...", "goats"])
    made = answered(described("c0", "c1"), asked, [said])
    assert made["case_id"].to_pylist() == ["c1"]
    graded = simulated(grade(asked, said, target="a", seed=0), asked, said, scored(c1={"goats": (0.5, 0.8)}))
    assert (graded["simulated"].to_pylist(), graded["detection"].to_pylist()) == ([0, 0.5], [0.5, 0.8])


def test_what_nobody_described_is_scored_by_the_simulator_and_is_neither_right_nor_wrong(questions, answers):
    bare = feature(1, "") | {"answers": [], "stratum": "activation"}
    asked = questions(feature(0, "cities") | {"stratum": "sae"}, bare)
    gold, said = gold_answers(labelled(asked)), answers(asked, ["cities", "goats"])
    assert gold["question_id"].to_pylist() == ["q0"]
    told = scored(c0={"cities": (0.9, 1.0)}, c1={"goats": (0.7, 0.8)})
    graded = simulated(grade(asked, said, target="a", seed=0), asked, said, told)
    assert (graded["exact"].to_pylist(), graded["similarity"].to_pylist()) == ([True, None], [1, None])
    found = {(row["metric"], row["by"]): row for row in scores(graded, by=("all", "stratum"), seed=0).to_pylist()}
    assert found["exact_match", "all"]["n"] == 1 and found["simulated", "all"]["value"] == pytest.approx(0.8)
    assert found["detection", "stratum=activation"]["value"] == pytest.approx(0.8)
    assert {metric for metric, by in found if by == "stratum=activation"} == {"simulated", "detection"}
