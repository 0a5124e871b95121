"""What a report is made of: the tables of scores and comparisons, and what is needed to read them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from ray_explain.artifacts import Manifest
from ray_explain.evaluation.calibration import Calibration
from ray_explain.records import COMPARISONS, SCORES, TASKS, conform

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
    right: bool
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
    advantages: Sequence[Mapping[str, Any]] = ()  # evaluation.comparisons.self_advantage, on exact match
    calibrations: Sequence[Calibration] = ()  # of the trained explainers
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
    def score_rows(self) -> list[dict[str, Any]]:
        """The scores as mappings, undefined numbers as None, in the order of the table: those of explainers that
        know the largest fraction of the training data, and of what knows none.
        """
        return [row for row in self.every_score if row["fraction"] in (0, self.fractions[-1])]

    @cached_property
    def comparison_rows(self) -> list[dict[str, Any]]:
        """The comparisons at that fraction as mappings, undefined numbers as None, in the order of the table."""
        return [_finite(row) for row in self.comparisons.to_pylist() if row["fraction"] == self.fractions[-1]]

    @cached_property
    def fractions(self) -> list[float]:
        """Of the training data that explainers were trained on, from small to large; 0 if none was trained."""
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

    @property
    def seeds(self) -> list[int]:
        """Seeds of training of the trained explainers."""
        return sorted({row["seed"] for row in self.score_rows if row["explainer"] in self.explainers})

    def model_of(self, explainer: str) -> str:
        """The model a trained explainer started from; the name of a baseline as it is."""
        return self.explainers.get(explainer, explainer)

    def is_self(self, explainer: str, target: str) -> bool:
        """Whether the target explains itself: the explainer started from the target's own weights."""
        return self.explainers.get(explainer) == target


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
