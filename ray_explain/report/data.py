"""What a report is made of: the tables of scores and comparisons, and what is needed to read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from ray_explain.artifacts import Manifest
from ray_explain.evaluation.calibration import Calibration
from ray_explain.evaluation.shares import Shares
from ray_explain.records import COMPARISONS, SCORES, TASKS, conform
from ray_explain.report import numbers

RUN_PARTS = ("versions", "machine", "sizes", "seconds")


@dataclass(frozen=True, kw_only=True)
class WorkedExample:
    """One held-out question and what was said to it, for a person to read."""

    task: str
    target: str
    explainer: str  # a name in `ReportData.explainers`
    question: str  # holds `<vector>` where a vector went in
    truth: str
    answer: str
    right: bool | None  # None where answers of this task are scored, not right or wrong
    score: float | None = None  # by the task's headline metric, where `right` is None
    controls: Mapping[str, str] = field(default_factory=dict)  # control -> the answer under it


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything a report says. NaN and infinity in the tables are read as undefined.

    Raises:
        ValueError: a table does not have its schema, there is no score, or an example or a part of `run` has a name
            that nothing else has.
    """

    title: str
    scores: pa.Table  # records.SCORES; an explainer that is not in `explainers` is a baseline
    comparisons: pa.Table  # records.COMPARISONS
    explainers: Mapping[str, str]  # trained ones: name in the tables -> model it started from, named as targets are
    examples: Sequence[WorkedExample] = ()
    advantages: Sequence[Mapping[str, Any]] = ()  # evaluation.comparisons.self_advantage
    calibrations: Sequence[Calibration] = ()  # of the trained explainers, as they are shown (`shares`)
    targets: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # target -> label -> value; fractions in 0..1
    provenance: Sequence[Manifest] = ()
    run: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # RUN_PARTS; `seconds` is the time of each stage
    notes: Sequence[str] = ()  # paragraphs that stand below the title

    def __post_init__(self) -> None:
        conform(self.comparisons, COMPARISONS)
        if not conform(self.scores, SCORES).num_rows:
            raise ValueError("no scores: a report needs at least one; evaluate an explainer first")
        for example in self.examples:
            if example.explainer not in self.explainers:
                raise ValueError(
                    f"example of explainer {example.explainer!r}: give it in `explainers` ({sorted(self.explainers)})"
                )
        if unknown := set(self.run) - set(RUN_PARTS):
            raise ValueError(f"run has {sorted(unknown)}: its parts are {', '.join(RUN_PARTS)}")

    @cached_property
    def every_score(self) -> list[dict[str, Any]]:
        """The scores at all fractions as mappings, undefined numbers as None."""
        return [_finite(row) for row in self.scores.to_pylist()]

    @cached_property
    def shares(self) -> Shares:
        """At which share of the training data each explainer is shown on each task and target."""
        return Shares(self.every_score, self.explainers)

    @cached_property
    def score_rows(self) -> list[dict[str, Any]]:
        """The scores as mappings, undefined numbers as None, in the order of the table: of each explainer and baseline
        those at the share at which it is shown.
        """
        of = self.shares.of
        return [row for row in self.every_score if row["fraction"] == of(row["task"], row["target"], row["explainer"])]

    @cached_property
    def comparison_rows(self) -> list[dict[str, Any]]:
        """The comparisons of what is shown as mappings, undefined numbers as None, in the order of the table.

        Of two explainers that are not shown at the same share it is the one at the largest that both know.
        """
        return [_finite(row) for row in self.comparisons.to_pylist() if row["fraction"] == self._compared_at(row)]

    def _compared_at(self, row: Mapping[str, Any]) -> float | None:
        place, one, other = (row["task"], row["target"]), row["explainer"], row["against"]
        if row["contrast"] == "self_minus_cross" and {one, other} <= set(self.shares.known(*place)):
            return self.shares.of_pair(*place, one, other)
        return self.shares.of(*place, one)

    @cached_property
    def fractions(self) -> list[float]:
        """Shares of the training data that something was scored at, from small to large; 0 if there is none."""
        return sorted(set(self.scores["fraction"].to_pylist()) - {0.0}) or [0.0]

    @property
    def target_labels(self) -> list[str]:
        """What is told of targets, in the order in which it is first told."""
        return list(dict.fromkeys(label for values in self.targets.values() for label in values))

    @property
    def tasks(self) -> list[str]:
        """Tasks that were scored: the three known ones in their order, then others by name."""
        found = {row["task"] for row in self.score_rows}
        return [task for task in TASKS if task in found] + sorted(found - set(TASKS))

    def targets_of(self, task: str) -> list[str]:
        """Targets on which `task` was scored, by name."""
        return sorted({row["target"] for row in self.score_rows if row["task"] == task})

    def share_text(self, task: str, target: str) -> str:
        """`at 30 % of the training data`, which is where explainers of the target are shown; empty for all of it."""
        share = self.shares.common(task, target)
        return "" if share in (0, 1) else f"at {numbers.share_label(share)}"

    def model_of(self, explainer: str) -> str:
        """The model a trained explainer started from; the name of a baseline as it is."""
        return self.explainers.get(explainer, explainer)

    def is_self(self, explainer: str, target: str) -> bool:
        """Whether the target explains itself: the explainer started from the target's own weights."""
        return self.explainers.get(explainer) == target


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
