import pyarrow as pa

from ray_explain.report.examples import examples_of


def graded(**columns):
    n = len(next(iter(columns.values())))
    return pa.table({"question_id": [f"q{i}" for i in range(n)], **columns})


def test_on_exact_match_half_of_the_examples_are_right_as_far_as_there_are_such():
    chosen = examples_of(graded(exact=[True] * 5 + [False] * 5), "exact_match")
    assert [(it.question_id, it.right) for it in chosen] == [("q0", True), ("q1", True), ("q5", False), ("q6", False)]
    chosen = examples_of(graded(exact=[True, *[False] * 6]), "exact_match")
    assert [it.right for it in chosen] == [True, False, False, False]


def test_where_answers_are_scored_examples_are_spread_over_the_scores_and_are_not_called_wrong():
    scores = [None, *[i / 10 for i in range(8)]]
    chosen = examples_of(graded(exact=[False] * 9, simulated=scores), "simulated")
    assert [it.score for it in chosen] == [0.6, 0.4, 0.2, 0.0]
    assert {it.right for it in chosen} == {None}


def test_few_scored_answers_are_all_shown_and_unscored_ones_never():
    chosen = examples_of(graded(exact=[False] * 4, judged=[0.5, None, 0.25, None]), "judged")
    assert [(it.question_id, it.score) for it in chosen] == [("q0", 0.5), ("q2", 0.25)]
    assert examples_of(graded(exact=[False], judged=pa.array([None], pa.float64())), "judged") == []
