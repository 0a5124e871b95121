import pytest

from ray_explain.endpoints import Chat, Endpoint
from ray_explain.evaluation.judges import Judge, judged
from ray_explain.evaluation.metrics import grade, scores


@pytest.fixture
def judge(endpoint, tmp_path):
    place = Endpoint(
        model="m",
        cache=str(tmp_path),
        address=endpoint.address,
        key_variable="TEST_JUDGE_KEY",
        pause=0.01,
        tries=3,
    )
    return Judge(Chat(place))


def test_the_judge_is_asked_once_for_each_different_pair_and_never_again(endpoint, judge, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret")
    endpoint.script = lambda prompt, n: "5" if "Predicted: cats" in prompt else "2."
    pairs = [("cats", "pets"), ("rocks", "pets"), ("cats", "pets")]
    assert judge.marks(pairs) == [5, 2, 5]
    assert len(endpoint.asked) == 2
    assert judge.marks(pairs) == [5, 2, 5]
    assert len(endpoint.asked) == 2
    path, body, key = endpoint.asked[0]
    assert (path, body["model"], body["temperature"], key) == ("/v1/chat/completions", "m", 0, "Bearer secret")
    assert body["messages"][0]["content"].endswith("Expected: pets")


@pytest.mark.parametrize("busy", [429, 503, "I would say 4", "7", ""])
def test_a_busy_endpoint_or_an_unusable_reply_is_asked_again(endpoint, judge, busy):
    endpoint.script = lambda prompt, n: busy if n < 3 else "3"
    assert judge.marks([("a", "b")]) == [3]
    assert len(endpoint.asked) == 3


def test_what_gets_no_mark_is_unscored_and_asked_again_next_time(endpoint, judge):
    endpoint.script = lambda prompt, n: 500
    assert judge.marks([("a", "b")]) == [None]
    assert len(endpoint.asked) == 3
    endpoint.script = lambda prompt, n: "1"
    assert judge.marks([("a", "b")]) == [1]


def test_an_endpoint_out_of_reach_is_unscored(tmp_path):
    nobody = Endpoint(model="m", cache=str(tmp_path), address="http://127.0.0.1:9/v1", tries=2, pause=0.01)
    assert Judge(Chat(nobody)).marks([("a", "b")]) == [None]


def test_a_wrong_key_is_told_and_not_taken_for_a_score(endpoint, judge):
    endpoint.script = lambda prompt, n: 401
    with pytest.raises(ValueError, match=r"'m' at http://127.0.0.1:\d+/v1 refuses with 401 .* \$TEST_JUDGE_KEY"):
        judge.marks([("a", "b")])


def test_a_score_is_of_the_nearest_right_description_and_missing_marks_leave_it_null(
    endpoint, judge, questions, answers
):
    row = {"task": "features", "answer": "pets", "answers": ["pets", "cats"], "changed": None}
    table = questions(*[row] * 3)
    told = answers(table, ["kittens", "rocks", ""])
    marks = {("kittens", "pets"): "3", ("kittens", "cats"): "4", ("rocks", "pets"): "1", ("rocks", "cats"): "none"}
    endpoint.script = lambda prompt, n: next(
        mark for (said, right), mark in marks.items() if prompt.endswith(f"Predicted: {said}\nExpected: {right}")
    )
    graded = judged(grade(table, told, target="t", seed=0), table, told, judge)
    assert graded["judged"].to_pylist() == [0.75, None, 0.0]
    found = {r["metric"]: r for r in scores(graded, by=["all"], seed=0, resamples=100).to_pylist()}
    assert (found["judged"]["value"], found["judged"]["n"]) == (0.375, 2)


def test_answers_about_effects_are_not_judged(endpoint, judge, questions, answers):
    table = questions({})
    told = answers(table, ["x"])
    graded = judged(grade(table, told, target="t", seed=0), table, told, judge)
    assert graded["judged"].to_pylist() == [None] and endpoint.asked == []


def test_answers_that_were_not_graded_are_refused(judge, questions, answers):
    table = questions({})
    told = answers(table, ["x"])
    graded = grade(table, told, target="t", seed=0)
    with pytest.raises(ValueError, match="1 graded answers are not among these answers"):
        judged(graded, table, answers(table, ["x"], control="random"), judge)


def test_where_nothing_is_right_the_judge_is_not_asked(endpoint, judge, questions, answers):
    asked = questions({"task": "features", "answer": "", "answers": [], "changed": None})
    said = answers(asked, ["goats"])
    graded = judged(grade(asked, said, target="a", seed=0), asked, said, judge)
    assert graded["judged"].to_pylist() == [None] and not endpoint.asked
