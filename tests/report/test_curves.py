import pytest

from ray_explain.evaluation.calibration import Bin, Calibration
from ray_explain.report.curves import HEIGHT, calibration_text, learning_curves, reliability
from ray_explain.report.estimates import Scores
from ray_explain.report.page import as_json, page


def calibration(target="llama", explainer="llama", over=(0.1, 0.05, 0.15), error=(0.1, 0.04, 0.17)):
    bins = [
        Bin(confidence=c, right=r, low=r - 0.1, high=r + 0.1, n=50) for c, r in ((0.2, 0.2), (0.6, 0.5), (0.9, 0.7))
    ]
    return Calibration(
        task="patching", target=target, explainer=explainer, n=150, overconfidence=over, error=error, bins=bins
    )


def at_fractions(score_row, *values):
    names = ("llama", "qwen3", "nearest neighbour")
    return [
        score_row("patching", "llama", name, value=value / (1 + i), fraction=fraction)
        for fraction, value in values
        for i, name in enumerate(names)
    ]


def test_one_amount_of_data_makes_no_curve(report):
    data = report()
    assert learning_curves("patching", data, Scores(data)) == []


def test_a_curve_has_a_point_for_each_share_on_a_logarithmic_axis(report, score_row):
    data = report(scores=at_fractions(score_row, (0.01, 0.2), (0.1, 0.4), (1.0, 0.8)), comparisons=[])
    (plot,) = learning_curves("patching", data, Scores(data))
    assert [series.row.label for series in plot.series] == ["llama", "qwen3", "nearest neighbour"]
    assert [series.row.kind for series in plot.series] == ["self", "cross", "baseline"]
    (left, middle, right), _ = [[point.x for point in series.points] for series in plot.series][:2]
    assert middle - left == pytest.approx(right - middle, abs=0.02)
    assert [point.y for point in plot.series[0].points] == pytest.approx([HEIGHT * (1 - v) for v in (0.2, 0.4, 0.8)])
    assert [point.text.replace("\u202f", " ").split(" [")[0] for point in plot.series[0].points] == [
        "llama at 1 %: .20",
        "llama at 10 %: .40",
        "llama at 100 %: .80",
    ]


def test_a_share_that_nobody_was_trained_on_is_left_out_of_a_line(report, score_row):
    rows = at_fractions(score_row, (0.1, 0.4), (1.0, 0.8))
    rows = [row for row in rows if (row["explainer"], row["fraction"]) != ("qwen3", 0.1)]
    data = report(scores=rows, comparisons=[])
    (plot,) = learning_curves("patching", data, Scores(data))
    assert [len(series.points) for series in plot.series] == [2, 1, 2]


def test_an_explainer_that_did_not_come_to_the_largest_share_has_a_curve(report, score_row):
    rows = at_fractions(score_row, (0.1, 0.2), (0.3, 0.4), (1.0, 0.8))
    rows = [row for row in rows if (row["explainer"], row["fraction"]) != ("qwen3", 1.0)]
    data = report(scores=rows, comparisons=[])
    (plot,) = learning_curves("patching", data, Scores(data))
    assert [(one.row.label, len(one.points)) for one in plot.series] == [
        ("llama", 3),
        ("qwen3", 2),
        ("nearest neighbour", 3),
    ]


def test_calibration_is_drawn_at_the_mean_confidence_self_first(report):
    data = report(calibrations=[calibration(explainer="qwen3"), calibration()])
    (plot,) = reliability("patching", data)
    assert plot.diagonal and [series.row.kind for series in plot.series] == ["self", "cross"]
    assert [point.x for point in plot.series[0].points] == [20, 60, 90]
    assert [point.y for point in plot.series[0].points] == pytest.approx([HEIGHT * (1 - v) for v in (0.2, 0.5, 0.7)])
    assert plot.series[0].points[1].text == "llama at confidence .60: .50 [.40, .60], n 50"


@pytest.mark.parametrize(
    "over, said",
    [
        ((0.1, 0.05, 0.15), "llama: overconfident; mean confidence minus accuracy +.10"),
        ((-0.1, -0.15, -0.05), "llama: underconfident"),
        ((0.1, -0.05, 0.25), "llama: not shown to be over- or underconfident"),
        ((0.1, None, None), "llama: too few groups to say whether it is over- or underconfident; mean"),
    ],
)
def test_confidence_is_judged_by_its_interval(report, over, said):
    (text,) = calibration_text("patching", "llama", report(calibrations=[calibration(over=over)]))
    assert text.startswith(said)


def test_the_calibration_error_is_told_with_its_interval(report):
    (text,) = calibration_text("patching", "llama", report(calibrations=[calibration()]))
    assert "expected calibration error .10 (95 % interval .04 to .17), 150 answers." in text.replace("\u202f", " ")
    (text,) = calibration_text("patching", "llama", report(calibrations=[calibration(error=(0.1, None, None))]))
    assert text.endswith("expected calibration error .10, 150 answers.")


def test_a_bound_that_decides_is_not_rounded_to_nothing(report):
    (text,) = calibration_text("patching", "llama", report(calibrations=[calibration(over=(0.03, 0.0013, 0.05))]))
    assert "overconfident; mean confidence minus accuracy +.030 (95 % interval +.001 to +.050)" in text.replace(
        "\u202f", " "
    )


def test_the_page_and_the_json_hold_curves_and_calibration(report, score_row):
    rows = at_fractions(score_row, (0.1, 0.4), (1.0, 0.8))
    data = report(scores=rows, comparisons=[], examples=[], calibrations=[calibration()])
    html = page(data, Scores(data))
    assert "More data" in html and "share of the training data" in html
    assert "Does the explainer know when it is right?" in html
    assert "nan" not in html.lower().split()
    told = as_json(data, Scores(data))
    assert told["calibrations"][0]["bins"][0]["confidence"] == 0.2
    assert len(told["scores"]) == 6
