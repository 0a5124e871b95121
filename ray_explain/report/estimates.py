"""Scores looked up by what they are of, with several seeds of an explainer made into one estimate."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from ray_explain.evaluation.metrics import headline
from ray_explain.records import TEXT_ONLY
from ray_explain.report import numbers
from ray_explain.report.data import ReportData


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval, or why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0  # questions, the same ones for each seed
    unparsed: int = 0  # answers, over all seeds, that could not be read; they count as wrong
    seeds: tuple[int, ...] = ()  # of training, over which it is the mean; the one of what has none is 0
    span: tuple[float, float] | None = None  # smallest and largest value of the seeds

    @property
    def why(self) -> str:
        """Why the value, or else its interval, is undefined; empty where nothing is."""
        if not self.seeds:
            return "not measured"
        if self.value is None:
            return "no such question" if not self.n else f"undefined on these {numbers.plural(self.n, 'question')}"
        if self.low is None or self.high is None:
            return f"too few groups to resample for an interval ({numbers.plural(self.n, 'question')})"
        return ""

    @property
    def text(self) -> str:
        """`.62 [.58, .66]`."""
        return f"{numbers.decimal(self.value)} {numbers.interval(self.low, self.high)}".strip()


class Row(NamedTuple):
    """Whose score it is: an explainer (its seeds together) under a control, or a baseline."""

    name: str  # the model, or the baseline
    control: str
    trained: bool
    is_self: bool
    share: float | None = None  # of the training data at which it is shown, where others of the target are not

    @property
    def kind(self) -> str:
        """`baseline`, `control`, `self` or `cross`: what it is drawn as."""
        if not self.trained:
            return "baseline"
        if self.control != "none":
            return "control"
        return "self" if self.is_self else "cross"

    @property
    def has_seeds(self) -> bool:
        """Whether it was trained, with vectors or without, and is asked as it is."""
        return self.kind in ("self", "cross") or self.name == TEXT_ONLY

    @property
    def label(self) -> str:
        """How a person calls it."""
        share = "" if self.share is None else f", at {numbers.share_label(self.share)}"
        if not self.trained:
            extra = "" if self.control == "none" else f", {numbers.control_label(self.control)}"
            return numbers.baseline_label(self.name) + extra + share
        return self.name + share if self.control == "none" else numbers.control_label(self.control)


class Key(NamedTuple):
    """What a score is of."""

    task: str
    target: str
    row: Row
    metric: str
    by: str


class Scores:
    """The scores of a report, each found by its `Key`."""

    def __init__(self, data: ReportData) -> None:
        grouped: dict[Key, list[dict[str, Any]]] = defaultdict(list)
        for score in data.score_rows:
            row = row_of(data, score["task"], score["target"], score["explainer"], score["control"])
            grouped[Key(score["task"], score["target"], row, score["metric"], score["by"])].append(score)
        self.estimates = {key: pooled(rows) for key, rows in grouped.items()}

    def get(self, task: str, target: str, row: Row, metric: str, by: str = "all") -> Estimate:
        """The estimate, or one that says it was not measured."""
        return self.estimates.get(Key(task, target, row, metric, by), Estimate())

    @cached_property
    def _rows(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], set[Row]] = defaultdict(set)
        for key in self.estimates:
            found[key.task, key.target].add(key.row)
        return {place: sorted(rows, key=row_order) for place, rows in found.items()}

    def rows(self, task: str, target: str) -> list[Row]:
        """The target itself, then other explainers, each followed by its controls, then the baselines."""
        return self._rows.get((task, target), [])

    def explainers(self, task: str, target: str) -> list[Row]:
        """The trained explainers as they are asked, the target itself first."""
        return [row for row in self.rows(task, target) if row.kind in ("self", "cross")]

    def seeds(self, task: str, target: str, row: Row) -> tuple[int, ...]:
        """Seeds of training that its headline score is the mean over."""
        return self.get(task, target, row, *self.headline(task)[0]).seeds

    def seeds_differ(self, task: str, target: str) -> bool:
        """Whether scores of what was trained are means over different seeds, so that they do not simply subtract."""
        return len({self.seeds(task, target, row) for row in self.rows(task, target) if row.has_seeds}) > 1

    @cached_property
    def _columns(self) -> dict[str, set[tuple[str, str]]]:
        found: dict[str, set[tuple[str, str]]] = defaultdict(set)
        for key, estimate in self.estimates.items():
            if estimate.value is not None:
                found[key.task].add((key.metric, key.by))
        return found

    def has(self, task: str, metric: str, by: str = "all") -> bool:
        """Whether anything was scored so and came out defined."""
        return (metric, by) in self._columns[task]

    def metrics(self, task: str) -> list[str]:
        """Metrics of a task: first what it is judged on, then exact match, content match, has-changed F1 and others by
        name. Where it is not judged on exact match, that comes last.
        """
        found = {metric for metric, _ in self._columns[task]}
        first, order = headline(task, found), ["exact_match", "content_match", "changed_f1", "detection", "judged"]

        def place(metric: str) -> tuple[Any, ...]:
            at = order.index(metric) if metric in order else len(order)
            return (metric != first, metric == "exact_match", at, metric)

        return sorted(found, key=place)

    def headline(self, task: str) -> list[tuple[str, str]]:
        """The one or two (metric, by) that a task is judged on: all questions, and content on changed cases.

        Where it is not judged on exact match, nothing that counts the same words is beside it.
        """
        first, *others = self.metrics(task) or ["exact_match"]
        for second in (("content_match", "changed=true"), ("exact_match", "changed=true")):
            if self.has(task, *second):
                return [(first, "all"), second]
        wrong = ("content_match",) if first == "exact_match" else ("exact_match", "similarity")
        seconds = [(metric, "all") for metric in others if metric not in wrong and self.has(task, metric)]
        return [(first, "all"), *seconds[:1]]

    def columns(self, task: str) -> list[tuple[str, str]]:
        """The headline, then the other metrics over all questions; at most four."""
        rest = [(metric, "all") for metric in self.metrics(task) if self.has(task, metric)]
        chosen = self.headline(task)
        taken = {metric for metric, _ in chosen}
        return (chosen + [column for column in rest if column[0] not in taken])[:4]

    def parts(self, task: str, key: str) -> list[str]:
        """The `by` values of one kind, such as `layer=0`, `layer=1`; numbers in their order."""
        return sorted((by for _, by in self._by(task) if by.startswith(f"{key}=")), key=numbers.natural)

    def part_kinds(self, task: str) -> list[str]:
        """Kinds of parts that were scored beside changed: layer, role, stratum, then others by name."""
        order = ["layer", "role", "stratum"]
        found = {by.split("=")[0] for _, by in self._by(task) if "=" in by} - {"changed"}
        return [kind for kind in order if kind in found] + sorted(found - set(order))

    def _by(self, task: str) -> set[tuple[str, str]]:
        metric = self.headline(task)[0][0]
        return {column for column in self._columns[task] if column[0] == metric}

    def strata(self, task: str) -> list[str]:
        """The strata that anything of a task was scored on, as `stratum=...`."""
        return sorted({by for _, by in self._columns[task] if by.startswith("stratum=")}, key=numbers.natural)

    def unlabelled(self, task: str, target: str) -> dict[str, int]:
        """Of each stratum, such as `stratum=activation`, how many questions no right answer is known to, where that is
        so of some."""
        asked, known = defaultdict[str, int](int), defaultdict[str, int](int)
        for key, estimate in self.estimates.items():
            if (key.task, key.target) == (task, target) and key.by.startswith("stratum="):
                asked[key.by] = max(asked[key.by], estimate.n)
                if key.metric == "exact_match":
                    known[key.by] = max(known[key.by], estimate.n)
        return {by: asked[by] - known[by] for by in sorted(asked, key=numbers.natural) if asked[by] > known[by]}

    def changed_rate(self, task: str, target: str) -> float | None:
        """Share of the scored questions in which the target's answer changed; None where that is not told."""
        for row in self.explainers(task, target) or self.rows(task, target):
            for metric in self.metrics(task):
                every = self.get(task, target, row, metric).n
                changed, unchanged = (self.get(task, target, row, metric, f"changed={it}") for it in ("true", "false"))
                if every and (changed.seeds or unchanged.seeds):  # a class that does not occur has no score
                    return changed.n / every
        return None


def pooled(rows: Iterable[dict[str, Any]]) -> Estimate:
    """One estimate from the scores of several seeds on the same questions.

    The value is their mean. The bounds are the means of the bounds: the spread of a mean is at most the mean of the
    spreads, so the interval is wide enough for the draw of the questions; it does not hold the draw of the seeds.
    """
    rows = list(rows)
    values = [row["value"] for row in rows if row["value"] is not None]
    whole = len(values) == len(rows)
    return Estimate(
        value=_mean(values) if whole else None,
        low=_mean([row["low"] for row in rows]) if whole else None,
        high=_mean([row["high"] for row in rows]) if whole else None,
        n=max(row["n"] for row in rows),
        unparsed=sum(row["unparsed"] for row in rows),
        seeds=tuple(sorted(row["seed"] for row in rows)),
        span=(min(values), max(values)) if whole and len(values) > 1 else None,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def row_of(data: ReportData, task: str, target: str, explainer: str, control: str = "none") -> Row:
    """Whose scores those of `explainer`, a name in the tables, on a task and target are, as they are shown."""
    share = data.shares.of(task, target, explainer)
    apart = share if share and share != data.shares.common(task, target) else None
    trained, is_self = explainer in data.explainers, data.is_self(explainer, target)
    return Row(data.model_of(explainer), control, trained, is_self, apart)


def row_order(row: Row) -> tuple[Any, ...]:
    """Sort key: the target itself, then other explainers, each followed by its controls, then the baselines."""
    controls = ["none", "shuffled", "no_vector", "other_layer", "random"]
    control = controls.index(row.control) if row.control in controls else len(controls)
    return (not row.trained, not row.is_self, numbers.natural(row.name), control, row.control)
