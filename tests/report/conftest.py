"""A report as a small experiment would give it: two models that explain themselves and each other on three tasks."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from ray_explain.artifacts import Manifest
from ray_explain.records import COMPARISONS, SCORES, content_id, rows_table
from ray_explain.report.data import ReportData, WorkedExample

MODELS = ("llama", "qwen3")
SELF = {"patching": 0.69, "ablation": 0.63, "features": 0.37}
CROSS = {"patching": 0.46, "ablation": 0.47, "features": 0.35}
ROLES = ("subject_last", "relation", "final")


def score(task: str, target: str, explainer: str, metric: str = "exact_match", value: float | None = 0.5, **other: Any):
    """A row of scores; the interval is the binomial one unless given."""
    n = other.get("n", 500)
    half = None if value is None or not n else 1.96 * math.sqrt(max(value * (1 - value), 0.01) / n)
    row = {"control": "none", "seed": 0, "fraction": 1.0, "by": "all", "n": n, "unparsed": 0}
    bounds = {
        "low": None if half is None else max(0, value - half),
        "high": None if half is None else min(1, value + half),
    }
    return (
        {"task": task, "target": target, "explainer": explainer, "metric": metric, "value": value}
        | row
        | bounds
        | other
    )


def comparison(
    contrast: str, task: str, target: str, explainer: str, against: str, difference: float | None = 0.2, **other
):
    """A row of comparisons; the interval is ± .04 unless given."""
    p_value = None if difference is None else (0.0005 if abs(difference) > 0.04 else 0.6)
    row = {
        "fraction": 1.0,
        "metric": "exact_match",
        "by": "all",
        "p_value": p_value,
        "p_holm": p_value,
        "n": 500,
        "n_groups": 43,
        "seeds": 1,
    }
    bounds = {key: None if difference is None else difference + s for key, s in (("low", -0.04), ("high", 0.04))}
    named = {"contrast": contrast, "task": task, "target": target, "explainer": explainer, "against": against}
    return named | {"difference": difference} | row | bounds | other


def _scores_of(task: str, target: str, model: str) -> list[dict[str, Any]]:
    name, base = model, (SELF if model == target else CROSS)[task]
    base += 0.06 * (target == "qwen3")
    rows = [score(task, target, name, value=base, unparsed=3)]
    if task == "features":
        rows.append(score(task, target, name, "correlation", base - 0.04, n=163))
        rows[0] = score(task, target, name, value=base, n=163)
        rows += [
            score(task, target, name, value=base - 0.05 + 0.03 * layer, by=f"layer={layer}", n=41) for layer in range(4)
        ]
    else:
        changed = {"patching": base - 0.1 if model == target else 0.06, "ablation": base - 0.2}[task]
        for metric in ("exact_match", "content_match"):
            rows.append(score(task, target, name, metric, changed, by="changed=true", n=171))
            rows.append(score(task, target, name, metric, base + 0.08, by="changed=false", n=329))
        rows.append(score(task, target, name, "content_match", base + 0.02))
        rows.append(score(task, target, name, "changed_f1", 0.86 if task == "patching" else 0.755))
    if task == "patching":
        rows += [
            score(task, target, name, value=base + 0.05 - 0.04 * layer, by=f"layer={layer}", n=125)
            for layer in range(4)
        ]
        rows += [
            score(task, target, name, value=base + 0.1 - 0.09 * i, by=f"role={role}", n=166)
            for i, role in enumerate(ROLES)
        ]
    if task == "ablation":
        for i, stratum in enumerate(("known", "withheld", "stranger")):
            rows.append(
                score(
                    task,
                    target,
                    name,
                    value=(0.97, 0.57, 0.45)[i] - 0.3 * (i == 1 and model != target),
                    by=f"stratum={stratum}",
                    n=166,
                )
            )
    if task != "ablation":
        n = rows[0]["n"]
        controls = {"shuffled": 0.32, "no_vector": 0.3, "other_layer": 0.4, "random": 0.28}
        rows += [
            score(task, target, name, value=base * share, control=control, n=n) for control, share in controls.items()
        ]
        if task == "patching":
            rows += [
                score(task, target, name, "content_match", 0.08 * share, control=control, by="changed=true", n=171)
                for control, share in controls.items()
            ]
            rows += [
                score(task, target, name, "changed_f1", 0.6 * share + 0.3, control=control)
                for control, share in controls.items()
            ]
    return rows


def _baselines_of(task: str, target: str) -> list[dict[str, Any]]:
    values = {
        "patching": {"majority": 0.11, "nearest neighbour": 0.15, "untrained": 0.0},
        "ablation": {"majority": 0.13, "untrained": 0.0},
        "features": {"majority": 0.02, "nearest neighbour": 0.19, "untrained": 0.0},
    }[task]
    n = 163 if task == "features" else 500
    rows = [
        score(task, target, name, value=value, n=n, unparsed=n if name == "untrained" else 0)
        for name, value in values.items()
    ]
    if task == "features":
        return rows + [score(task, target, name, "correlation", value * 0.8, n=n) for name, value in values.items()]
    f1 = {"majority": 0.81, "nearest neighbour": 0.74, "untrained": None}
    rows += [score(task, target, name, "changed_f1", f1[name]) for name in values]
    return rows + [
        score(task, target, name, "content_match", value / 2, by="changed=true", n=171)
        for name, value in values.items()
    ]


def _comparisons() -> list[dict[str, Any]]:
    rows = []
    for task in SELF:
        for target, other in (MODELS, MODELS[::-1]):
            own, cross = target, other
            gap = SELF[task] - CROSS[task]
            n = 163 if task == "features" else 500
            rows.append(comparison("self_minus_cross", task, target, own, cross, gap, n=n))
            if task != "features":
                rows.append(
                    comparison(
                        "self_minus_cross",
                        task,
                        target,
                        own,
                        cross,
                        {"patching": 0.53, "ablation": 0.06}[task],
                        metric="content_match",
                        by="changed=true",
                        n=171,
                    )
                )
            for name, base in ((own, SELF[task]), (cross, CROSS[task])):
                if task != "ablation":
                    rows += [
                        comparison("uplift", task, target, name, control, base * share, n=n)
                        for control, share in (("shuffled", 0.68), ("no_vector", 0.7))
                    ]
                for baseline, value in (("majority", 0.1), ("nearest neighbour", 0.17)):
                    if task != "ablation" or baseline == "majority":
                        rows.append(comparison("over_baseline", task, target, name, baseline, base - value, n=n))
    return rows


_QUESTIONS = {
    "patching": "at layers 1 replace token 3 <<<adela>>> by <vector> in : the home of adela is . output ?",
    "ablation": "the home of tomas ? hint : oslo . answer if the hint were removed how would the answer change ?",
    "features": "what does <vector> at layer 2 encode ?",
}
_CHANGED, _UNCHANGED = (
    "The most likely output would change to <<<{}>>>.",
    "The output would remain unchanged from <<<{}>>>.",
)
_ANSWERS = {
    "patching": (_CHANGED.format("lima"), _UNCHANGED.format("riga")),
    "ablation": (_UNCHANGED.format("oslo"), _CHANGED.format("riga")),
    "features": ("the name of a city in the north", "the name of a person"),
}


def _examples() -> list[WorkedExample]:
    made = []
    for number in range(4):
        for task, question in _QUESTIONS.items():
            for target in MODELS:
                model, right = MODELS[(number + (target == "qwen3")) % 2], (number // 2 + (task == "ablation")) % 2 == 0
                truth, wrong = _ANSWERS[task]
                under = {} if task == "ablation" else {"shuffled": wrong, "no_vector": wrong if number % 2 else truth}
                made.append(
                    WorkedExample(
                        task=task,
                        target=target,
                        explainer=model,
                        question=question,
                        truth=truth,
                        answer=truth if right else wrong,
                        right=right,
                        controls=under,
                    )
                )
    return made


_KINDS: list[tuple[str, int, dict[str, int], float]] = [
    ("model", 1, {}, 92.0),
    ("patching_effects", 4950, {"answer is a special token": 38, "no source of this relation": 12}, 9.4),
    ("ablation_effects", 3500, {}, 7.1),
    ("features", 1023, {"no description above .35": 377}, 24.0),
    ("explainer", 9473, {"longer than 160 tokens": 4}, 61.0),
    ("answers", 1163, {}, 12.5),
]


def _provenance() -> list[Manifest]:
    return [
        Manifest(
            kind=kind,
            label=target,
            fingerprint=content_id(kind, target),
            config={"target": target, "seed": 0, "layers": [0, 1, 2, 3]},
            parents=(),
            rows=rows,
            dropped=dropped,
            seconds=seconds,
            commit="3f9c2d1",
            versions={"torch": "2.13.0", "ray": "2.60.0"},
        )
        for target in MODELS
        for kind, rows, dropped, seconds in _KINDS
    ]


def _report(**changes: Any) -> ReportData:
    tasks = list(SELF)
    pairs = [(task, target, model) for task in tasks for target in MODELS for model in MODELS]
    rows = [row for pair in pairs for row in _scores_of(*pair)]
    rows += [row for task in tasks for target in MODELS for row in _baselines_of(task, target)]
    given: dict[str, Any] = {
        "title": "Two small models explain themselves and each other",
        "scores": rows,
        "comparisons": _comparisons(),
        "explainers": {model: model for model in MODELS},
        "examples": _examples(),
        "targets": {
            "llama": {"parameters": 518_016, "fact recall": 0.998, "quiz accuracy": 0.992, "patches that change": 0.40},
            "qwen3": {"parameters": 519_168, "fact recall": 0.998, "quiz accuracy": 0.996, "patches that change": 0.33},
        },
        "provenance": _provenance(),
        "run": {
            "versions": {"ray_explain": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
            "machine": {"processor": "x86-64, 2 cores", "memory": "15 GB", "accelerator": "none"},
            "sizes": {"d_model": 96, "layers": 4, "vocabulary": 393, "facts": 568, "questions per explainer": 4000},
            "seconds": {"pretrain": 95.0, "ground truth": 41.2, "train": 214.0, "evaluate": 48.3, "report": 0.6},
        },
        "notes": ["Targets of half a million parameters, trained on a synthetic world."],
    } | changes
    tables = {
        "scores": rows_table(given["scores"], SCORES),
        "comparisons": rows_table(given["comparisons"], COMPARISONS),
    }
    return ReportData(**given | tables)


@pytest.fixture
def report() -> Callable[..., ReportData]:
    """Makes the report's data; `scores` and `comparisons` are given as rows."""
    return _report


@pytest.fixture
def score_row() -> Callable[..., dict[str, Any]]:
    """Makes a row of scores."""
    return score


@pytest.fixture
def comparison_row() -> Callable[..., dict[str, Any]]:
    """Makes a row of comparisons."""
    return comparison
