import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation.grading import best_of, grade, layer_label, rows_of, series_of, word_f1
from ray_explain.evaluation.metrics import headline, measured


def feature(i, *right):
    return {
        "question_id": f"q{i}",
        "case_id": f"f{i}",
        "task": "features",
        "answer": right[0],
        "answers": list(right),
        "changed": None,
    }


def descriptions(*rows):
    names = ("case_id", "description", "score", "gold")
    return records.rows_table([dict(zip(names, row)) | {"origin": "x"} for row in rows], records.DESCRIPTIONS)


@pytest.mark.parametrize(
    "changed, content, verdict_right, content_right, exact",
    [
        (True, "rome", True, True, True),
        (True, "oslo", True, False, False),
        (False, "rome", False, True, False),
        (False, "oslo", False, False, False),
    ],
)
def test_verdict_and_content_are_right_on_their_own_and_exact_needs_both(
    questions, answers, say, changed, content, verdict_right, content_right, exact
):
    table = questions({"changed": True, "content": "rome"})
    (row,) = grade(table, answers(table, [say(changed, content)]), target="self", seed=3).to_pylist()
    assert (row["verdict_right"], row["content"], row["exact"]) == (verdict_right, content_right, exact)
    assert (row["predicted_changed"], row["parsed"], row["changed"]) == (changed, True, True)
    assert (row["target"], row["seed"], row["group"], row["similarity"]) == ("self", 3, "g0", None)


def test_exact_match_is_of_the_whole_sentence(questions, answers):
    table = questions({"changed": True, "content": "rome"})
    text = "The output would change to <<<rome>>>."  # right, but not in the words asked for
    (row,) = grade(table, answers(table, [text]), target="self", seed=0).to_pylist()
    assert (row["verdict_right"], row["content"], row["exact"]) == (True, True, False)


def test_an_answer_that_cannot_be_read_is_wrong_in_everything(questions, answers):
    table = questions({})
    (row,) = grade(table, answers(table, ["rome"]), target="self", seed=0).to_pylist()
    assert (row["parsed"], row["exact"], row["verdict_right"], row["content"]) == (False, False, False, False)
    assert row["predicted_changed"] is None


def test_any_gold_description_is_right_and_similarity_is_to_the_nearest(questions, answers):
    table = questions(feature(0, "names of cities", "capitals"), feature(1, "names of cities", "capitals"))
    one, other = grade(table, answers(table, ["Capitals.", "cities of men"]), target="t", seed=0).to_pylist()
    assert (one["exact"], one["similarity"], one["parsed"]) == (True, 1.0, True)
    assert (other["exact"], other["similarity"], other["parsed"]) == (False, pytest.approx(2 / 3), True)
    assert one["changed"] is one["content"] is one["verdict_right"] is one["correlation"] is None


def test_a_description_scores_its_own_correlation_on_this_feature(questions, answers):
    table = questions(*[feature(i, "cities") for i in range(5)])
    told = descriptions(
        *[(f"f{i}", "cities", 0.9, True) for i in range(5)],
        ("f1", "Rivers", -0.25, False),
        ("f3", "hills", None, False),
        ("f4", "rivers", 0.1, False),
        ("f4", "rivers .", 0.3, False),
    )
    texts = ["cities", "rivers", "rivers", "hills", "rivers"]
    graded = grade(table, answers(table, texts), told, target="t", seed=0)
    assert graded["correlation"].to_pylist() == pytest.approx([0.9, -0.25, 0.0, None, 0.3], abs=1e-6)
    assert graded["parsed"].to_pylist() == [True, True, False, True, True]


def test_words_in_common_are_counted_with_repeats():
    assert word_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert word_f1("a", "b") == word_f1("", "b") == 0


@pytest.mark.parametrize("layers, label", [([], ""), ([2], "2"), ([8, 9, 10], "8-10")])
def test_a_block_of_layers_has_its_ends_in_its_label(layers, label):
    assert layer_label(layers) == label


def test_answers_to_another_table_are_refused(questions, answers):
    table, other = questions({}, {}), questions({"question_id": "elsewhere"})
    with pytest.raises(BadInput, match="1 of 1 answers are to no question of this table"):
        grade(table, answers(other, ["x"]), target="t", seed=0)


def test_two_answers_to_one_question_are_refused_but_not_under_different_controls(questions, answers):
    table = questions({})
    once = answers(table, ["x"])
    assert (
        grade(table, pa.concat_tables([once, answers(table, ["x"], control="random")]), target="t", seed=0).num_rows
        == 2
    )
    with pytest.raises(BadInput, match="1 questions are answered twice by 'self' under control 'none'"):
        grade(table, pa.concat_tables([once, once]), target="t", seed=0)


def test_a_question_without_an_answer_is_told(questions, answers):
    table = questions({}, {}, {})
    with pytest.raises(BadInput, match="2 of 3 questions have no answer by 'self' under control 'none'"):
        grade(table, answers(table, ["x"] * 3).slice(0, 1), target="t", seed=0)


def test_a_question_without_a_group_is_refused(questions, answers):
    table = questions({}, {"group": ""})
    with pytest.raises(BadInput, match="1 questions have no group"):
        grade(table, answers(table, ["x", "x"]), target="t", seed=0)


def test_series_come_apart_in_one_order_whatever_the_order_of_rows(questions, answers, say):
    table = questions({}, {}, {})
    both = [answers(table, [say(True, f"x{i}") for i in range(3)], control=control) for control in ("none", "random")]
    graded = grade(table, pa.concat_tables(both), target="t", seed=0)
    mixed = graded.take([5, 0, 3, 1, 4, 2])
    assert series_of(mixed) == series_of(graded) and len(series_of(graded)) == 2
    for series in series_of(graded):
        assert rows_of(mixed, series).equals(rows_of(graded, series))
        assert rows_of(graded, series)["question_id"].to_pylist() == ["q0", "q1", "q2"]


def test_the_best_of_several_answers_is_chosen_question_by_question(questions, answers):
    asked = questions(feature(0, "the word rome"), feature(1, "the word oslo"))
    said = [answers(asked, texts, name) for name, texts in (("x1", ["a word", "b"]), ("x5", ["rome", "the word oslo"]))]
    graded = grade(asked, pa.concat_tables(said), target="a", seed=0)
    best = best_of(graded, ["x1", "x5"], "best")
    assert [row["exact"] for row in best.to_pylist()] == [False, True]
    assert best["similarity"].to_pylist() == pytest.approx([2 / 4, 1])  # of "rome" and "a word": 2/4 and 2/5
    assert set(best["explainer"].to_pylist()) == {"best"} and best_of(graded, ["x9"], "best").num_rows == 0


def test_the_best_free_description_is_so_by_the_headline_whatever_another_mark_says(questions, answers):
    """Else the oracle that a report calls the best would be beaten by answers that it could have taken."""
    asked = questions(feature(0, "rome"), feature(1, "oslo"))
    said = [answers(asked, [name, name], name) for name in ("x1", "x5")]
    graded = grade(asked, pa.concat_tables(said), target="a", seed=0)
    for name, values in [("simulated", [0.1, 0.6, 0.4, 0.2]), ("judged", [1.0, 0.25, 0.5, 0.75])]:
        at = graded.column_names.index(name)
        graded = graded.set_column(at, graded.schema.field(name), pa.array(values))
        best = best_of(graded, ["x1", "x5"], "best")
        assert headline("features", [metric.name for metric in measured(graded)]) == "simulated"
        assert best["simulated"].to_pylist() == [0.4, 0.6]


def test_the_best_of_a_fixed_vocabulary_is_an_exact_match_first(questions, answers):
    asked = questions(feature(0, "rome"))
    told = descriptions(("f0", "rome", 0.3, True), ("f0", "oslo", 0.5, False))
    said = [answers(asked, [text], name) for name, text in (("x1", "oslo"), ("x5", "rome"))]
    best = best_of(grade(asked, pa.concat_tables(said), told, target="a", seed=0), ["x1", "x5"], "best")
    assert best["exact"].to_pylist() == [True]
