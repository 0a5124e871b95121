import pyarrow as pa
import pytest

from ray_explain.evaluation.metrics import grade
from ray_explain.evaluation.shares import Shares, common_share, shown


def rows(**shares):
    """Of target "a" on patching, the shares at which each explainer or baseline has rows."""
    return [
        {"task": "patching", "target": "a", "explainer": name, "fraction": share}
        for name, known in shares.items()
        for share in known
    ]


@pytest.mark.parametrize(
    ("known", "share"),
    [
        ([{0.1, 0.3, 1.0}, {0.1, 0.3}, {0.3}], 0.3),
        ([{0.1, 0.3}, {0.1, 0.3}], 0.3),
        ([{1.0}, {0.3}, {0.3, 0.1}], 0.3),  # none that all know: the one that most do
        ([{1.0}, {0.3}], 1.0),
        ([], 0.0),
    ],
)
def test_the_common_share_is_the_largest_that_all_or_else_most_know(known, share):
    assert common_share(known) == share


def test_explainers_are_shown_at_the_largest_share_that_all_of_them_know_whatever_baselines_know():
    shares = Shares(rows(a=[0.3, 1.0], b=[0.1, 0.3], nearest=[0.3, 1.0], untrained=[0.0]), ["a", "b"])
    assert shares.common("patching", "a") == 0.3
    assert {name: shares.of("patching", "a", name) for name in ("a", "b", "nearest", "untrained")} == {
        "a": 0.3,
        "b": 0.3,
        "nearest": 0.3,
        "untrained": 0.0,
    }
    assert shares.known("patching", "a") == {"a": {0.3, 1.0}, "b": {0.1, 0.3}}


def test_what_does_not_know_the_common_share_is_shown_at_its_own_largest():
    shares = Shares(rows(a=[0.1, 0.3, 1.0], b=[0.3, 1.0], c=[0.03, 0.1], text=[0.1]), ["a", "b", "c"])
    assert shares.common("patching", "a") == 1.0
    assert [shares.of("patching", "a", name) for name in ("a", "b", "c", "text")] == [1.0, 1.0, 0.1, 0.1]


def test_two_explainers_are_compared_at_the_largest_share_that_both_know():
    shares = Shares(rows(a=[0.1, 0.3, 1.0], b=[0.3, 1.0], c=[0.03, 0.1]), ["a", "b", "c"])
    assert shares.of_pair("patching", "a", "a", "b") == 1.0
    assert shares.of_pair("patching", "a", "a", "c") == 0.1
    assert shares.of_pair("patching", "a", "b", "c") is None


def test_a_target_without_a_trained_explainer_is_shown_at_the_largest_share_of_its_baselines():
    shares = Shares(rows(nearest=[0.3, 1.0]), ["a"])
    assert (shares.common("patching", "a"), shares.of("patching", "a", "nearest")) == (1.0, 1.0)


def test_of_graded_answers_those_remain_that_are_shown(questions, answers):
    table = questions({}, {})
    graded = pa.concat_tables(
        grade(table, answers(table, ["x", "y"], name), target="t", seed=seed, fraction=fraction)
        for name, seed, fraction in [("a", 0, 0.3), ("a", 1, 0.3), ("a", 0, 1.0), ("b", 0, 0.3)]
    )
    kept = shown(graded, Shares(graded.to_pylist(), ["a", "b"]))
    told = {(row["explainer"], row["seed"], row["fraction"]) for row in kept.to_pylist()}
    assert told == {("a", 0, 0.3), ("a", 1, 0.3), ("b", 0, 0.3)} and kept.num_rows == 6
    assert shown(graded.slice(0, 0), Shares([], ["a"])).num_rows == 0
