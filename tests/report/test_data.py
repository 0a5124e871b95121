import pytest

from ray_explain.records import SCORES, rows_table
from ray_explain.report.data import ReportData, WorkedExample


def test_a_report_without_a_score_is_refused(report) -> None:
    with pytest.raises(ValueError, match="no scores"):
        report(scores=[])


def test_a_table_without_its_columns_is_refused(report) -> None:
    data = report()
    with pytest.raises(ValueError, match="missing \\['p_holm'\\]"):
        ReportData(title="t", scores=data.scores, comparisons=data.comparisons.drop(["p_holm"]), explainers={})


def test_an_example_of_an_explainer_that_is_not_named_is_refused(report) -> None:
    example = WorkedExample(
        task="patching", target="llama", explainer="gpt", question="", truth="", answer="", right=True
    )
    with pytest.raises(ValueError, match="'gpt'"):
        report(examples=[example])


def test_an_unknown_part_of_the_run_is_refused(report) -> None:
    with pytest.raises(ValueError, match="'times'"):
        report(run={"times": {}})


def test_nan_is_read_as_undefined(report, score_row) -> None:
    data = report(scores=[score_row("patching", "llama", "llama", value=float("nan"), low=float("inf"), high=None)])
    assert data.scores["value"].null_count == 0
    assert [data.score_rows[0][key] for key in ("value", "low", "high")] == [None, None, None]


def test_a_target_explains_itself_where_its_name_is_that_of_the_explainers_model(report) -> None:
    data = report(explainers={"run-7": "llama"}, examples=[])
    assert data.is_self("run-7", "llama") and not data.is_self("run-7", "qwen3")
    assert not data.is_self("llama", "llama")  # no trained explainer has this name


def test_the_known_tasks_come_first(report, score_row) -> None:
    rows = [score_row(task, "llama", "llama") for task in ("zeal", "features", "patching")]
    assert report(scores=rows).tasks == ["patching", "features", "zeal"]
    assert rows_table(rows, SCORES).num_rows == 3


def at_shares(score_row, target="llama", **known):
    """Scores on patching: of each name, the shares of the training data; a value tells its share."""
    return [
        score_row("patching", target, name.replace("_", " "), value=share / 2, fraction=share)
        for name, shares in known.items()
        for share in shares
    ]


def told(data):
    return [(row["target"], row["explainer"], row["fraction"]) for row in data.score_rows]


def test_the_largest_share_that_all_explainers_know_is_shown_and_what_was_not_trained(report, score_row) -> None:
    rows = at_shares(score_row, llama=[0.25, 0.5], qwen3=[0.25, 0.5], untrained=[0.0])
    data = report(scores=rows, comparisons=[])
    assert data.fractions == [0.25, 0.5]
    assert told(data) == [("llama", "llama", 0.5), ("llama", "qwen3", 0.5), ("llama", "untrained", 0.0)]


def test_an_explainer_that_did_not_come_to_the_largest_share_is_shown_with_the_others(
    report, score_row, comparison_row
) -> None:
    rows = at_shares(score_row, llama=[0.3, 1.0], qwen3=[0.3], nearest_neighbour=[0.3, 1.0])
    differences = [
        comparison_row("self_minus_cross", "patching", "llama", "llama", "qwen3", fraction=0.3),
        comparison_row("uplift", "patching", "llama", "llama", "shuffled", fraction=0.3),
        comparison_row("uplift", "patching", "llama", "llama", "shuffled", fraction=1.0),
    ]
    data = report(scores=rows, comparisons=differences)
    assert told(data) == [("llama", name, 0.3) for name in ("llama", "qwen3", "nearest neighbour")]
    assert [(row["contrast"], row["fraction"]) for row in data.comparison_rows] == [
        ("self_minus_cross", 0.3),
        ("uplift", 0.3),
    ]


def test_a_baseline_at_a_larger_share_hides_no_explainer(report, score_row) -> None:
    data = report(scores=at_shares(score_row, llama=[0.3], nearest_neighbour=[0.3, 1.0]), comparisons=[])
    assert told(data) == [("llama", "llama", 0.3), ("llama", "nearest neighbour", 0.3)]


def test_a_target_whose_explainers_stopped_early_stays_in_the_report(report, score_row) -> None:
    rows = at_shares(score_row, llama=[0.3, 1.0]) + at_shares(score_row, "qwen3", qwen3=[0.3])
    data = report(scores=rows, comparisons=[])
    assert data.targets_of("patching") == ["llama", "qwen3"]
    assert told(data) == [("llama", "llama", 1.0), ("qwen3", "qwen3", 0.3)]
    assert data.share_text("patching", "llama") == ""
    assert data.share_text("patching", "qwen3").replace("\u202f", " ") == "at 30 % of the training data"


def test_an_explainer_without_the_share_of_the_others_is_shown_and_compared_at_its_own(
    report, score_row, comparison_row
) -> None:
    models = {name: name for name in ("llama", "qwen3", "gemma")}
    rows = at_shares(score_row, llama=[0.1, 0.3, 1.0], qwen3=[0.3, 1.0], gemma=[0.03, 0.1])
    differences = [
        comparison_row("self_minus_cross", "patching", "llama", "llama", other, fraction=share)
        for other, share in [("qwen3", 0.3), ("qwen3", 1.0), ("gemma", 0.1)]
    ]
    data = report(scores=rows, comparisons=differences, explainers=models)
    assert told(data) == [("llama", "llama", 1.0), ("llama", "qwen3", 1.0), ("llama", "gemma", 0.1)]
    assert [(row["against"], row["fraction"]) for row in data.comparison_rows] == [("qwen3", 1.0), ("gemma", 0.1)]
