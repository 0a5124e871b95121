"""The paper's metrics, computed from sums over groups of graded answers, with intervals."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from ray_explain import records
from ray_explain.evaluation import intervals
from ray_explain.evaluation.grading import GRADED, OF_FREE_TEXT, grade, rows_of, series_of

__all__ = ["BY", "GRADED", "METRICS", "Metric", "Part", "Tally", "grade", "headline", "scores", "tally"]

BY = ("all", "changed", "layer", "role", "stratum")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that is a function of sums over answers, so that resampling it is adding up."""

    name: str
    tasks: tuple[str, ...]
    columns: Callable[[pa.Table], Float[np.ndarray, "answers k"]]
    value: Callable[[Float[np.ndarray, "*batch k"]], Float[np.ndarray, "*batch"]]  # NaN where undefined
    counted: Callable[[pa.Table], Bool[np.ndarray, " answers"]]  # the answers that have this metric
    counts: tuple[int, ...]  # columns, each of which has to differ from 0 in a group that tells about the metric
    reach: tuple[float, float] = (0.0, 1.0)  # least and largest value there is
    proportion: bool = False


def _mean_of(name: str, column: str, tasks: tuple[str, ...], least: float = 0.0) -> Metric:
    """The mean of a column, of numbers from `least` to 1, over the answers where it is not null."""

    def counted(graded: pa.Table) -> np.ndarray:
        return graded[column].is_valid().to_numpy()

    def columns(graded: pa.Table) -> np.ndarray:
        filled = graded[column].cast(pa.float64()).fill_null(0.0).to_numpy()
        return np.stack([filled, counted(graded).astype(np.float64)], axis=1)

    return Metric(
        name=name,
        tasks=tasks,
        columns=columns,
        value=lambda sums: _divide(sums[..., 0], sums[..., 1]),
        counted=counted,
        counts=(1,),
        reach=(least, 1.0),
        proportion=pa.types.is_boolean(GRADED.field(column).type),
    )


def _changed_columns(graded: pa.Table) -> np.ndarray:
    """Of "changed", then of "unchanged": true ones found, true ones, and answers that say so falsely."""
    truth = graded["changed"].to_numpy(zero_copy_only=False)
    said = graded["predicted_changed"].to_numpy(zero_copy_only=False)  # None where it cannot be read: says neither
    columns = []
    for verdict in (True, False):
        is_true, is_said = truth == verdict, said == verdict
        columns += [is_true & is_said, is_true, ~is_true & is_said]
    return np.stack(columns, axis=1).astype(np.float64)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    halves = []
    for found, true, falsely in (np.moveaxis(sums[..., :3], -1, 0), np.moveaxis(sums[..., 3:], -1, 0)):
        f1 = _divide(2 * found, true + found + falsely)
        halves.append(np.where(true > 0, f1, np.nan))  # the F1 of a class that does not occur is undefined
    return (halves[0] + halves[1]) / 2


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


_EFFECTS = ("patching", "ablation")
METRICS = (
    _mean_of("exact_match", "exact", (*_EFFECTS, "features")),
    Metric(
        name="changed_f1",
        tasks=_EFFECTS,
        columns=_changed_columns,
        value=_macro_f1,
        counted=lambda graded: graded["changed"].is_valid().to_numpy(),
        counts=(1, 4),  # the true ones of both classes
    ),
    _mean_of("content_match", "content", _EFFECTS),
    _mean_of("similarity", "similarity", ("features",)),
    _mean_of("correlation", "correlation", ("features",), -1.0),
    _mean_of("embedding", "embedding", ("features",), -1.0),
    _mean_of("judged", "judged", ("features",)),
    _mean_of("simulated", "simulated", ("features",), -1.0),
    _mean_of("detection", "detection", ("features",)),
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A metric over a part of the questions, and where its columns are in a tally."""

    metric: Metric
    by: str  # "all", "layer=2", ...
    columns: slice
    n: int  # answers that have this metric
    n_groups: int  # that tell about it: of F1, those with its rarer class
    unparsed: int


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What the scores of one series of answers are computed from."""

    groups: list[str]  # sorted
    sums: Float[np.ndarray, "n_groups columns"]
    parts: list[Part]

    def values(self, sums: Float[np.ndarray, "*batch columns"]) -> Float[np.ndarray, "*batch parts"]:
        """Each part's metric from sums over any groups."""
        return np.stack([part.metric.value(sums[..., part.columns]) for part in self.parts], axis=-1)

    @property
    def n_groups(self) -> Int[np.ndarray, " parts"]:
        """Groups of each part."""
        return np.array([part.n_groups for part in self.parts])

    @property
    def reach(self) -> Float[np.ndarray, "2 parts"]:
        """Least and largest value of each part's metric."""
        return np.array([part.metric.reach for part in self.parts]).reshape(-1, 2).T


def measured(graded: pa.Table) -> list[Metric]:
    """The metrics that some answer of a table has."""
    return [metric for metric in METRICS if metric.counted(graded).any()]


# What holds an answer against a right one; other metrics of features hold it against what the vector does.
OF_LABELS = ("exact_match", "similarity", "correlation", "embedding", "judged")


def headline(task: str, known: Collection[str]) -> str:
    """The metric that a task is judged on, of those that are `known` of it: exact match.

    Free descriptions are next to never the same words, so exact match is about 0 whoever gives them: they are judged by
    what marked them, where something did. Those of a fixed vocabulary, which have a correlation, are judged by exact
    match.
    """
    if task != "features" or "correlation" in known:
        return "exact_match"
    return next((name for name in OF_FREE_TEXT if name in known), "exact_match")


def tally(graded: pa.Table, by: Sequence[str], metrics: Sequence[Metric]) -> Tally:
    """The sums of one series of answers (as `rows_of` gives them) over each of its groups, for those of `metrics` that
    its task has, and for every part.

    Raises:
        ValueError: there is no answer, or no such way to split them.
    """
    if not graded.num_rows:
        raise ValueError("no answers to score")
    names, starts = np.unique(graded["group"].to_numpy(zero_copy_only=False), return_index=True)
    unread = ~graded["parsed"].to_numpy(zero_copy_only=False)
    columns: list[np.ndarray] = []
    parts: list[Part] = []
    masks = _masks(graded, by)
    for metric in metrics:
        if graded["task"][0].as_py() not in metric.tasks:
            continue
        of_metric, counted = metric.columns(graded), metric.counted(graded)
        for label, mask in masks:
            at, inside = sum(each.shape[1] for each in columns), mask & counted
            columns.append(np.add.reduceat(of_metric * inside[:, None], starts, axis=0))
            part = Part(
                metric=metric,
                by=label,
                columns=slice(at, at + of_metric.shape[1]),
                n=int(inside.sum()),
                n_groups=int((columns[-1][:, metric.counts] != 0).sum(axis=0).min()),
                unparsed=int((unread & mask).sum()),
            )
            parts.append(part)
    return Tally(groups=names.tolist(), sums=np.concatenate(columns, axis=1), parts=parts)


def _masks(graded: pa.Table, by: Sequence[str]) -> list[tuple[str, Bool[np.ndarray, " answers"]]]:
    """The parts of the answers, such as ("layer=2", which of them); where a value is null or empty there is none."""
    masks = [("all", np.ones(graded.num_rows, dtype=bool))] if "all" in by else []
    for name in by:
        if name == "all":
            continue
        if name not in BY:
            raise ValueError(f"by {name!r}: scores can be split by {', '.join(BY)}")
        values = graded[name].to_numpy(zero_copy_only=False)
        for value in sorted({each for each in values if each is not None and each != ""}, key=_natural):
            text = str(value).lower() if isinstance(value, bool | np.bool_) else value
            masks.append((f"{name}={text}", values == value))
    return masks


def _natural(value: Any) -> tuple[float, str]:
    """Layers in their order: "10-11" after "2"."""
    head = str(value).split("-")[0]
    return (float(head) if head.isdecimal() else math.inf, str(value))


def scores(graded: pa.Table, *, by: Sequence[str] = BY, seed: int, resamples: int = 2000) -> pa.Table:
    """Every metric of every series of graded answers, with a 95 % interval: a table of records.SCORES.

    A metric that no answer of the table has is left out, and so is one that none of a part has. The intervals resample
    groups; `seed` draws the resamples (the column `seed` is that of the training). A value is null where it is
    undefined, as F1 among changed cases only, and so is an interval where one group is all there is, or all that a
    class of F1 occurs in.

    Raises:
        ValueError: there is no answer, or no such way to split them.
    """
    if not graded.num_rows:
        raise ValueError("no answers to score")
    metrics, rows = measured(graded), list[dict[str, Any]]()
    for series in series_of(graded):
        tallied = tally(rows_of(graded, series), by, metrics)
        values = tallied.values(tallied.sums.sum(axis=0))
        resampled = intervals.bootstrap(tallied.sums, tallied.values, resamples=resamples, seed=seed)
        lows, highs = _interval(tallied, values, resampled)
        for part, value, low, high in zip(tallied.parts, values, lows, highs, strict=True):
            if part.n:
                rows.append(series | _score(part, float(value), float(low), float(high)))
    return records.rows_table(rows, records.SCORES)


def _interval(tallied: Tally, values: np.ndarray, resampled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sizes = tallied.n_groups, np.array([part.n for part in tallied.parts])
    shares = np.array([part.metric.proportion for part in tallied.parts])
    by_percentile = intervals.percentile_interval(resampled, tallied.n_groups)
    by_wilson = intervals.wilson_interval(values, resampled, *sizes)
    low, high = (np.where(shares, *pair) for pair in zip(by_wilson, by_percentile))
    return intervals.alike_interval(values, low, high, resampled, tallied.n_groups, tallied.reach)


def _score(part: Part, value: float, low: float, high: float) -> dict[str, Any]:
    return {
        "metric": part.metric.name,
        "by": part.by,
        "value": defined(value),
        "low": defined(low),
        "high": defined(high),
        "n": part.n,
        "unparsed": part.unparsed,
    }


def defined(value: float) -> float | None:
    """`value`, or null for NaN, which no table may hold."""
    return None if math.isnan(value) else float(value)
