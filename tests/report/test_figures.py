import pytest

from ray_explain.report import figures
from ray_explain.report.estimates import Estimate, Scores


def test_an_axis_goes_from_nought_to_one_and_further_where_a_value_does() -> None:
    assert (figures.axis_for([Estimate(value=0.3)]).low, figures.axis_for([Estimate(value=0.3)]).high) == (0, 1)
    assert figures.axis_for([Estimate(value=0.1, low=-0.1, high=0.3)]).low == -0.25
    assert figures.axis_for([Estimate(value=-0.7)]).low == -1
    assert figures.axis_for([Estimate(value=2.4)]).high == 3


def test_places_are_in_percent_and_stay_on_the_axis() -> None:
    axis = figures.axis_for([Estimate(value=0.5)])
    assert (axis.at(0.62), axis.at(0.0), axis.at(1.2), axis.at(-3)) == (62, 0, 100, 0)


@pytest.mark.parametrize("difference", [0.003, -0.4, 0.9])
def test_an_axis_of_differences_holds_zero_and_every_interval(comparison_row, difference) -> None:
    row = comparison_row("uplift", "patching", "llama", "llama", "shuffled", difference)
    axis = figures.axis_of_differences([row])
    assert axis.low < min(0, row["low"]) and max(0, row["high"]) < axis.high
    assert 0 in axis.ticks and 0 < axis.zero < 100


def test_ticks_are_short() -> None:
    assert [figures.tick_text(value) for value in (0.0, 0.5, 1.0, -0.25, 0.1)] == ["0", ".5", "1", "−.25", ".1"]


def test_the_diagonal_of_a_matrix_is_self_and_the_gap_is_the_paired_one(report) -> None:
    data = report()
    exact, content = figures.matrices("patching", data, Scores(data))
    assert exact.title == "exact match, all questions" and content.title == "content match, changed cases"
    assert [[cell.is_self for cell in cells] for _, cells in exact.rows] == [[True, False], [False, True]]
    assert exact.rows[0][1][0].estimate.value == pytest.approx(0.69)
    assert exact.rows[1][1][0].strength == pytest.approx(46)
    assert exact.gaps[0] == [("qwen3", "+.23 [+.19, +.27]")]


def test_an_explainer_that_was_not_trained_on_a_target_leaves_an_empty_cell(report, score_row) -> None:
    rows = [score_row("patching", "llama", "llama"), score_row("patching", "qwen3", "llama")]
    data = report(scores=[*rows, score_row("patching", "qwen3", "qwen3")], comparisons=[])
    (matrix,) = figures.matrices("patching", data, Scores(data))
    empty = dict(matrix.rows)["qwen3"][0]
    assert (empty.strength, empty.estimate.why) == (None, "not measured")


def test_cells_at_another_share_or_of_other_seeds_say_so(report, score_row, comparison_row) -> None:
    models = {name: name for name in ("llama", "qwen3", "gemma")}
    known = [("llama", 0.1, 0), ("llama", 1.0, 0), ("llama", 1.0, 1), ("qwen3", 1.0, 1), ("gemma", 0.1, 0)]
    rows = [score_row("patching", "llama", name, fraction=share, seed=seed) for name, share, seed in known]
    gaps = [
        comparison_row("self_minus_cross", "patching", "llama", "llama", other, fraction=share)
        for other, share in [("qwen3", 1.0), ("gemma", 0.1)]
    ]
    data = report(scores=rows, comparisons=gaps, explainers=models)
    (matrix,) = figures.matrices("patching", data, Scores(data))
    assert [(name, cell.share, cell.estimate.seeds) for name, (cell,) in matrix.rows] == [
        ("llama", None, (0, 1)),
        ("gemma", 0.1, (0,)),
        ("qwen3", None, (1,)),
    ]
    assert matrix.seeds_differ == [True]
    assert [gap.replace("\u202f", " ") for _, gap in matrix.gaps[0]] == [
        "+.20 [+.16, +.24]",
        "+.20 [+.16, +.24], at 10 % of the training data",
    ]
    panel = figures.panels("patching", data, Scores(data))[0]
    assert panel.seeds_differ and panel.seeds == [(0, 1), (0,), (1,)]


def test_a_panel_has_every_explainer_control_and_baseline(report) -> None:
    data = report()
    panel = figures.panels("patching", data, Scores(data))[0]
    assert panel.target == "llama" and len(panel.rows) == 13
    assert [row.label for row, _ in panel.rows[:2]] == ["llama", "vectors shuffled"]
    assert panel.unparsed[0] == 3 and panel.unparsed[-1] == 500
    assert all(len(estimates) == len(panel.columns) == len(panel.axes) == 3 for _, estimates in panel.rows)


def test_a_baseline_under_a_control_is_no_row_of_a_panel(report, score_row) -> None:
    rows = [score_row("patching", "llama", "untrained", control=control) for control in ("none", "shuffled")]
    data = report(scores=[score_row("patching", "llama", "llama"), *rows])
    assert [row.label for row, _ in figures.panels("patching", data, Scores(data))[0].rows] == [
        "llama",
        "untrained, the bare question",
    ]


def test_many_strata_are_cut_to_the_largest_and_the_rest_is_counted(report, score_row) -> None:
    rows = [score_row("patching", "llama", "llama")]
    rows += [score_row("patching", "llama", "llama", by=f"stratum=s{i}", n=10 + i) for i in range(20)]
    data = report(scores=rows)
    (chart,) = figures.breakdowns("patching", "stratum", data, Scores(data))
    assert [label for label, _ in chart.parts] == [f"s{i}" for i in range(8, 20)]
    assert chart.left_out == 8


def test_marks_stand_where_their_numbers_are(comparison_row) -> None:
    row = comparison_row("uplift", "patching", "llama", "llama", "shuffled", 0.2)
    axis = figures.axis_of_differences([row])
    (mark,) = figures.marks([row], axis)
    assert mark.low is not None and mark.low < axis.at(0.2) == mark.place
    (undefined,) = figures.marks([row | {"difference": None, "low": None, "high": None}], axis)
    assert (undefined.place, undefined.verdict) == (None, "unknown")


def test_a_mark_says_which_control_or_baseline_it_is_over(comparison_row) -> None:
    """A sentence has up to a dozen, and no other sign beside them."""
    kinds = [("uplift", "shuffled"), ("over_baseline", "majority"), ("self_minus_cross", "qwen3")]
    rows = [comparison_row(contrast, "patching", "llama", "llama", against) for contrast, against in kinds]
    labels = [mark.label for mark in figures.marks(rows, figures.axis_of_differences(rows))]
    assert [label.rpartition(")")[2] for label in labels] == [" over “vectors shuffled”", " over “majority class”", ""]
