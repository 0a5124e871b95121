"""Two kinds of curves: score against the share of the training data, and right answers against confidence."""

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ray_explain.evaluation.calibration import Bounded
from ray_explain.report import numbers
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Estimate, Row, Scores, pooled, row_of, row_order
from ray_explain.report.figures import Axis, axis_for

HEIGHT = 190  # pixels of a plot's inside
MARGIN = 4.0  # percent of its width left and right of the outermost points
LOOKUPS = ("nearest neighbour per layer", "nearest neighbour", "majority layer x role")  # the first that was scored


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place on a plot: `x` in percent of the width, `y`, `low` and `high` in pixels from the top."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str  # for those who do not see it


@dataclass(frozen=True, kw_only=True)
class Series:
    """What one explainer, or a baseline, has at each place where it is defined."""

    row: Row
    points: Sequence[Point]
    estimates: Sequence[Estimate]  # one for each place of the plot


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines over the same places."""

    target: str
    title: str
    places: Sequence[tuple[float, str]]  # (percent, text)
    levels: Sequence[tuple[float, str]]  # (pixels, text)
    series: Sequence[Series]
    diagonal: bool = False


def learning_curves(task: str, data: ReportData, scores: Scores) -> list[Plot]:
    """For each target the headline metric at each share of the training data; none where there is one share only."""
    if len(data.fractions) < 2:
        return []
    metric, by = scores.headline(task)[0]
    grouped: dict[tuple[str, Row, float], list[dict[str, Any]]] = defaultdict(list)
    for score in data.every_score:
        if (score["task"], score["metric"], score["by"], score["control"]) == (task, metric, by, "none"):
            row = row_of(data, task, score["target"], score["explainer"])._replace(share=None)
            grouped[score["target"], row, score["fraction"]].append(score)
    found = {key: pooled(rows) for key, rows in grouped.items()}
    places = list(zip(_places(data.fractions), [f"{100 * f:.3g}{numbers.THIN}%" for f in data.fractions]))
    title = numbers.score_label(metric, by)
    plots = []
    for target in data.targets_of(task):
        rows = _drawn({row for of, row, _ in found if of == target})
        at = {row: [found.get((target, row, f), Estimate()) for f in data.fractions] for row in rows}
        axis = axis_for(it for estimates in at.values() for it in estimates)
        series = [_series(row, places, estimates, axis) for row, estimates in at.items()]
        plots.append(Plot(target=target, title=title, places=places, levels=_levels(axis), series=series))
    return plots


def _drawn(rows: Collection[Row]) -> list[Row]:
    """Every explainer, whatever share it came to, and one lookup."""
    lookups = {row.name: row for row in rows if not row.trained}
    return (
        sorted((row for row in rows if row.trained), key=row_order)
        + [lookups[name] for name in LOOKUPS if name in lookups][:1]
    )


def _places(fractions: Sequence[float]) -> list[float]:
    """Shares on a logarithmic axis."""
    low, high = math.log(fractions[0]), math.log(fractions[-1])
    return [round(MARGIN + (100 - 2 * MARGIN) * (math.log(f) - low) / (high - low), 2) for f in fractions]


def reliability(task: str, data: ReportData) -> list[Plot]:
    """For each target, of answers of about the same confidence how many were right."""
    axis = Axis(low=0.0, high=1.0, ticks=(0.0, 0.5, 1.0))
    plots = []
    for target in data.targets_of(task):
        series = []
        for it in data.calibrations:
            if (it.task, it.target) == (task, target):
                estimates = [Estimate(value=b.right, low=b.low, high=b.high, n=b.n, seeds=(0,)) for b in it.bins]
                places = [(100 * b.confidence, f"confidence {numbers.decimal(b.confidence)}") for b in it.bins]
                series.append(_series(row_of(data, task, target, it.explainer), places, estimates, axis))
        if series:
            series.sort(key=lambda one: (not one.row.is_self, numbers.natural(one.row.name)))
            title = "share of right answers against the probability that the explainer gives them"
            plots.append(
                Plot(target=target, title=title, places=axis.labels, levels=_levels(axis), series=series, diagonal=True)
            )
    return plots


def _levels(axis: Axis) -> list[tuple[float, str]]:
    return [(_y(place), text) for place, text in axis.labels]


def _y(percent: float) -> float:
    return round(HEIGHT * (1 - percent / 100), 1)


def _series(row: Row, places: Sequence[tuple[float, str]], estimates: Sequence[Estimate], axis: Axis) -> Series:
    points = [
        Point(
            x=round(x, 2),
            y=_y(axis.at(it.value)),
            low=None if it.low is None else _y(axis.at(it.low)),
            high=None if it.high is None else _y(axis.at(it.high)),
            text=f"{row.label} at {place}: {it.text}, n {numbers.count(it.n)}",
        )
        for (x, place), it in zip(places, estimates)
        if it.value is not None
    ]
    return Series(row=row, points=points, estimates=estimates)


def calibration_text(task: str, target: str, data: ReportData) -> list[str]:
    """A sentence for each explainer: how far its confidence is from its accuracy."""
    told = []
    for it in data.calibrations:
        if (it.task, it.target) != (task, target):
            continue
        who, (value, low, high) = row_of(data, task, target, it.explainer).label, it.overconfidence
        if low is None or high is None:
            how = "too few groups to say whether it is over- or underconfident"
        elif low <= 0 <= high:
            how = "not shown to be over- or underconfident"
        else:
            how = "overconfident" if value > 0 else "underconfident"
        told.append(
            f"{who}: {how}; mean confidence minus accuracy {_bounded(it.overconfidence, numbers.signed)}, "
            f"expected calibration error {_bounded(it.error, numbers.decimal)}, {numbers.plural(it.n, 'answer')}."
        )
    return told


def _bounded(it: Bounded, text: Callable[[float, int], str]) -> str:
    digits = numbers.digits_for(*it)
    value, *ends = (text(one, digits) for one in it if one is not None)
    return value + (f" (95{numbers.THIN}% interval {' to '.join(ends)})" if len(ends) == 2 else "")
