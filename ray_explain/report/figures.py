"""What the page draws: heat maps, bars with whiskers, forests. Places are fractions of a width, no pixels here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_explain.report import numbers
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Estimate, Row, Scores
from ray_explain.report.findings import difference_text, verdict_of

MOST_PARTS = 12  # strata of one chart; the others stand in tables.md


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A line from `low` to `high`, with ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the width; values outside are put on the edge."""
        return round(100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low))), 2)

    @property
    def zero(self) -> float:
        """Where 0 lies, in percent."""
        return self.at(0.0)

    @property
    def labels(self) -> list[tuple[float, str]]:
        """Ticks as (percent, text)."""
        return [(self.at(tick), tick_text(tick)) for tick in self.ticks]


def tick_text(value: float) -> str:
    """`0`, `.5`, `1`, `−.25`: as short as it can be."""
    text = numbers.decimal(round(value, 2)).rstrip("0").rstrip(".")
    return text if text.strip(numbers.MINUS) else "0"


def axis_for(estimates: Iterable[Estimate]) -> Axis:
    """From 0 to 1; from −.25, −1 or less where something is negative, to a whole number where something is above 1."""
    ends = [end for it in estimates for end in (it.value, it.low, it.high) if end is not None]
    low, high = min([0.0, *ends]), max([1.0, *ends])
    high = high if high == 1 else float(int(high) + 1)
    low = 0.0 if low >= 0 else (-0.25 if low >= -0.25 else min(-1.0, -float(int(-low) + 1)))
    middle = {0.5} if high == 1 and low > -1 else set()
    return Axis(low=low, high=high, ticks=tuple(sorted({low if low <= -1 else 0.0, 0.0, high} | middle)))


def axis_of_differences(rows: Iterable[dict[str, Any]]) -> Axis:
    """Wide enough for every interval, 0 always on it, ends at tenths."""
    ends = [row[key] for row in rows for key in ("difference", "low", "high") if row[key] is not None]
    low, high = min([-0.05, *ends]), max([0.05, *ends])
    ticks = [step / 10 for step in range(-20, 21) if low <= step / 10 <= high]
    every = 1 if len(ticks) <= 5 else (2 if len(ticks) <= 9 else 5)
    margin = 0.04 * (high - low)  # so that a mark at the end is whole
    return Axis(
        low=low - margin, high=high + margin, ticks=tuple(tick for tick in ticks if round(tick * 10) % every == 0)
    )


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One cell of a pairing matrix."""

    estimate: Estimate
    is_self: bool
    share: float | None  # of the training data at which it is shown, where others of its target are not

    @property
    def strength(self) -> float | None:
        """How deep its colour is, 0 to 100; None where there is no value."""
        value = self.estimate.value
        return None if value is None else round(100 * min(1.0, max(0.0, value)), 1)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Explainers by targets, on one metric."""

    title: str
    targets: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Heat]]]
    gaps: Sequence[Sequence[tuple[str, str]]]  # of each target: (other explainer, self minus it as text)
    seeds_differ: Sequence[bool]  # of each target, whether its cells are means over different seeds


def matrices(task: str, data: ReportData, scores: Scores) -> list[Matrix]:
    """The pairing matrix on each headline metric; none where no explainer was trained."""
    targets = data.targets_of(task)
    models = {row.name for target in targets for row in scores.explainers(task, target)}
    ordered = sorted(models, key=lambda name: (name not in targets, numbers.natural(name)))
    return [_matrix(task, metric, by, targets, ordered, data, scores) for metric, by in scores.headline(task) if models]


def _matrix(
    task: str, metric: str, by: str, targets: list[str], models: list[str], data: ReportData, scores: Scores
) -> Matrix:
    rows = {(row.name, target): row for target in targets for row in scores.explainers(task, target)}

    def heat(model: str, target: str) -> Heat:
        row = rows.get((model, target))
        it = Estimate() if row is None else scores.get(task, target, row, metric, by)
        return Heat(estimate=it, is_self=model == target, share=row and row.share)

    wanted = {"task": task, "metric": metric, "by": by, "contrast": "self_minus_cross"}
    found = [row for row in data.comparison_rows if all(row[key] == value for key, value in wanted.items())]
    gaps = [
        [(data.model_of(row["against"]), _gap(row, data)) for row in found if row["target"] == target]
        for target in targets
    ]
    cells = [(model, [heat(model, target) for target in targets]) for model in models]
    return Matrix(
        title=numbers.score_label(metric, by),
        targets=targets,
        rows=cells,
        gaps=gaps,
        seeds_differ=[scores.seeds_differ(task, target) for target in targets],
    )


def _gap(row: dict[str, Any], data: ReportData) -> str:
    difference, low, high = numbers.difference_parts(row)
    apart = row["fraction"] != data.shares.common(row["task"], row["target"])
    share = f", at {numbers.share_label(row['fraction'])}" if apart else ""
    return (f"{difference} [{low}, {high}]" if low else difference) + share


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What was scored on one target of one task: explainers, their controls, baselines; a column per metric."""

    target: str
    columns: Sequence[tuple[str, str]]  # (metric, what part of the questions)
    axes: Sequence[Axis]
    rows: Sequence[tuple[Row, Sequence[Estimate]]]
    unparsed: Sequence[int]  # of each row, over all questions and seeds
    answers: Sequence[int]  # of each row, the same
    seeds: Sequence[tuple[int, ...]]  # of each row, over which its values are means
    seeds_differ: bool  # whether those of what was trained do


def panels(task: str, data: ReportData, scores: Scores) -> list[Panel]:
    """One for each target; the axis of a metric is the same on all of them."""
    columns = scores.columns(task)
    by_target = {
        target: [
            (row, [scores.get(task, target, row, metric, by) for metric, by in columns])
            for row in scores.rows(task, target)
            if row.trained or row.control == "none"
        ]
        for target in data.targets_of(task)
    }
    axes = [
        axis_for(estimates[index] for rows in by_target.values() for _, estimates in rows)
        for index in range(len(columns))
    ]
    labels = [(numbers.metric_label(metric), numbers.by_label(by)) for metric, by in columns]
    return [
        Panel(
            target=target,
            columns=labels,
            axes=axes,
            rows=rows,
            unparsed=[max((it.unparsed for it in estimates), default=0) for _, estimates in rows],
            answers=[max((it.n * len(it.seeds) for it in estimates), default=0) for _, estimates in rows],
            seeds=[max((it.seeds for it in estimates), key=len) for _, estimates in rows],
            seeds_differ=scores.seeds_differ(task, target),
        )
        for target, rows in by_target.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The headline metric of a task by layer, role or another part, for the explainers of one target."""

    target: str
    metric: str
    series: Sequence[Row]
    axis: Axis
    parts: Sequence[tuple[str, Sequence[Estimate]]]
    left_out: int  # parts that are not drawn


def breakdowns(task: str, kind: str, data: ReportData, scores: Scores) -> list[Breakdown]:
    """By one kind of part, such as `layer`; one for each target that was scored by it."""
    metric = scores.headline(task)[0][0]
    made = [_breakdown(task, kind, metric, target, scores) for target in data.targets_of(task)]
    return [it for it in made if any(estimate.seeds for _, estimates in it.parts for estimate in estimates)]


def _breakdown(task: str, kind: str, metric: str, target: str, scores: Scores) -> Breakdown:
    series = scores.explainers(task, target)
    parts = [(by, [scores.get(task, target, row, metric, by) for row in series]) for by in scores.parts(task, kind)]
    parts = [part for part in parts if any(estimate.seeds for estimate in part[1])]
    largest = sorted(parts, key=lambda part: -max(it.n for it in part[1]))[:MOST_PARTS]
    drawn = [(numbers.plain(by.split("=", 1)[1]), estimates) for by, estimates in parts if (by, estimates) in largest]
    axis = axis_for(estimate for _, estimates in drawn for estimate in estimates)
    return Breakdown(
        target=target, metric=numbers.metric_label(metric), series=series, axis=axis, parts=drawn,
        left_out=len(parts) - len(drawn),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One difference on a forest."""

    label: str
    place: float | None  # percent; None where it is undefined
    low: float | None
    high: float | None
    verdict: str


def marks(rows: Sequence[dict[str, Any]], axis: Axis) -> list[Mark]:
    """Differences as marks on an axis, each with its text for those who do not see it."""
    return [
        Mark(
            label=difference_text(row) + _over_what(row),
            place=None if row["difference"] is None else axis.at(row["difference"]),
            low=None if row["low"] is None else axis.at(row["low"]),
            high=None if row["high"] is None else axis.at(row["high"]),
            verdict=verdict_of(row),
        )
        for row in rows
    ]


def _over_what(row: dict[str, Any]) -> str:
    """Which of the controls or baselines of a sentence a mark is over; the sentence names another model itself."""
    label = {"uplift": numbers.control_label, "over_baseline": numbers.baseline_label}.get(row["contrast"])
    return f" over “{label(row['against'])}”" if label else ""
