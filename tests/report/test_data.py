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


def test_the_report_shows_the_largest_fraction_and_what_was_not_trained(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", name, value=value, fraction=fraction)
        for name, value, fraction in [("llama", 0.4, 0.25), ("llama", 0.7, 0.5), ("untrained", 0.1, 0.0)]
    ]
    data = report(scores=rows, comparisons=[])
    assert data.fractions == [0.25, 0.5]
    assert [(row["explainer"], row["value"]) for row in data.score_rows] == [("llama", 0.7), ("untrained", 0.1)]
