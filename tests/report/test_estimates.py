import pytest

from ray_explain.report import numbers
from ray_explain.report.estimates import Row, Scores, pooled
from ray_explain.report.markdown import tables

SELF, CROSS = Row("llama", "none", True, True), Row("qwen3", "none", True, False)


def test_seeds_are_told_by_their_mean_and_questions_are_not_counted_twice(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", "llama", value=v, low=v - 0.1, high=v + 0.1, seed=i, unparsed=2)
        for i, v in enumerate((0.4, 0.6))
    ]
    it = Scores(report(scores=rows)).get("patching", "llama", SELF, "exact_match")
    assert (it.value, it.low, it.high) == pytest.approx((0.5, 0.4, 0.6))
    assert (it.n, it.unparsed, it.seeds, it.span) == (500, 4, (0, 1), (0.4, 0.6))


def test_a_seed_without_a_value_leaves_the_mean_undefined(score_row) -> None:
    rows = [score_row("patching", "llama", "llama", value=0.4), score_row("patching", "llama", "llama", value=None)]
    it = pooled(rows)
    assert (it.value, it.low, it.high, it.span) == (None, None, None, None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"value": None, "n": 0}, "no such question"),
        ({"value": None, "n": 7}, "undefined on these 7 questions"),
        ({"low": None}, "too few groups to resample for an interval (500 questions)"),
        ({}, ""),
    ],
)
def test_what_is_undefined_says_why(score_row, change, why) -> None:
    assert pooled([score_row("patching", "llama", "llama", **change)]).why == why


def test_what_was_not_scored_says_so(report) -> None:
    it = Scores(report()).get("patching", "llama", SELF, "no such metric")
    assert (it.value, it.why) == (None, "not measured")


def test_self_comes_first_with_its_controls_then_others_then_baselines(report) -> None:
    scores = Scores(report())
    rows = scores.rows("patching", "llama")
    assert [row.kind for row in rows] == ["self", *["control"] * 4, "cross", *["control"] * 4, *["baseline"] * 3]
    assert rows[0] == SELF and rows[5] == CROSS
    assert [row.name for row in scores.rows("patching", "qwen3")[::5][:2]] == ["qwen3", "llama"]
    assert [row.control for row in rows[1:5]] == ["shuffled", "no_vector", "other_layer", "random"]


def test_the_headline_is_exact_match_and_content_of_changed_cases(report) -> None:
    scores = Scores(report())
    assert scores.headline("patching") == [("exact_match", "all"), ("content_match", "changed=true")]
    assert scores.headline("features") == [("exact_match", "all"), ("correlation", "all")]


def test_a_metric_that_is_undefined_everywhere_is_no_column(report, score_row) -> None:
    rows = [score_row("features", "llama", "llama"), score_row("features", "llama", "llama", "correlation", None)]
    scores = Scores(report(scores=rows))
    assert scores.columns("features") == [("exact_match", "all")]
    assert scores.headline("features") == [("exact_match", "all")]


def test_the_changed_rate_is_that_of_the_questions(report) -> None:
    scores = Scores(report())
    assert scores.changed_rate("patching", "llama") == pytest.approx(171 / 500)
    assert scores.changed_rate("features", "llama") is None


@pytest.mark.parametrize(("by", "rate"), [("changed=false", 0.0), ("changed=true", 1.0)])
def test_a_target_whose_answers_never_or_always_change_has_a_changed_rate(report, score_row, by, rate) -> None:
    rows = [score_row("patching", "llama", "llama", n=40), score_row("patching", "llama", "llama", n=40, by=by)]
    assert Scores(report(scores=rows, comparisons=[], examples=[])).changed_rate("patching", "llama") == rate


def test_parts_are_found_by_kind_in_their_order(report) -> None:
    scores = Scores(report())
    assert scores.part_kinds("patching") == ["layer", "role"]
    assert scores.parts("patching", "layer") == ["layer=0", "layer=1", "layer=2", "layer=3"]


def test_a_stratum_may_hold_any_character(report, score_row) -> None:
    strata = ("a, b", "x=1, y=2", "plain")
    rows = [score_row("patching", "llama", "llama", by=f"stratum={name}") for name in strata]
    data = report(scores=[score_row("patching", "llama", "llama"), *rows], comparisons=[])
    scores = Scores(data)
    assert scores.part_kinds("patching") == ["stratum"]
    assert scores.parts("patching", "stratum") == [f"stratum={name}" for name in ("a, b", "plain", "x=1, y=2")]
    assert "| a, b | llama |" in tables(data, scores) and "| x=1, y=2 | llama |" in tables(data, scores)
    assert numbers.by_label("stratum=x=1, y=2") == "stratum x=1, y=2"


FREE = ("exact_match", "detection", "embedding", "judged", "similarity", "simulated")


@pytest.mark.parametrize(
    ("left_out", "headline", "columns"),
    [
        ((), ["simulated", "detection"], ["simulated", "detection", "judged", "embedding"]),
        (("simulated", "detection"), ["judged", "embedding"], ["judged", "embedding", "similarity", "exact_match"]),
        (("simulated", "detection", "embedding"), ["judged"], ["judged", "similarity", "exact_match"]),
        (("simulated", "detection", "judged"), ["embedding"], ["embedding", "similarity", "exact_match"]),
    ],
)
def test_free_descriptions_are_headed_by_what_marked_them_and_not_by_the_same_words(
    report, score_row, left_out, headline, columns
) -> None:
    metrics = [metric for metric in FREE if metric not in left_out]
    scores = Scores(report(scores=[score_row("features", "llama", "llama", metric) for metric in metrics]))
    assert scores.headline("features") == [(metric, "all") for metric in headline]
    assert [metric for metric, _ in scores.columns("features")] == columns


def test_a_row_that_is_not_at_the_share_of_the_others_says_so(report, score_row) -> None:
    shares = [("llama", 0.3), ("llama", 1.0), ("qwen3", 0.1), ("nearest neighbour", 1.0), ("untrained", 0.0)]
    rows = [score_row("patching", "llama", name, fraction=share) for name, share in shares]
    data = report(
        scores=[*rows, score_row("patching", "llama", "gemma", fraction=1.0)],
        comparisons=[],
        explainers={name: name for name in ("llama", "qwen3", "gemma")},
        examples=[],
    )
    labels = [row.label.replace("\u202f", " ") for row in Scores(data).rows("patching", "llama")]
    assert labels == [
        "llama",
        "gemma",
        "qwen3, at 10 % of the training data",
        "nearest neighbour",
        "untrained, the bare question",
    ]


def test_explainers_of_other_seeds_are_told_apart(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", name, seed=seed) for name, seed in [("llama", 0), ("llama", 1), ("qwen3", 1)]
    ]
    scores = Scores(
        report(scores=[*rows, score_row("features", "llama", "llama"), score_row("features", "llama", "qwen3")])
    )
    assert [scores.seeds("patching", "llama", row) for row in (SELF, CROSS)] == [(0, 1), (1,)]
    assert scores.seeds_differ("patching", "llama") and not scores.seeds_differ("features", "llama")
