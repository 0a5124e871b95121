"""The smallest experiment that runs from end to end, and what of it must be the same however it was run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_explain import storage
from ray_explain.artifacts import Artifact
from ray_explain.config import read_experiment
from ray_explain.distributed.pipeline import all_artifacts
from ray_explain.distributed.plan import Plan

EXPERIMENT: dict[str, Any] = {
    "name": "tiny",
    "models": {
        "llama": {"pretrain": {"architecture": "llama", "seed": 1, "tokens": 5120, "d_model": 32, "n_layers": 2}},
        "qwen3": {"pretrain": {"architecture": "qwen3", "seed": 2, "tokens": 5120, "d_model": 32, "n_layers": 2}},
    },
    "targets": ["llama"],
    "explainers": ["llama", "qwen3"],
    "ground_truth": {
        "wording": "brief",
        "patching": {"cases": {"train": 80, "test": 40}, "blocks": 2},
        "ablation": {"cases": {"train": 60, "test": 30}},
        "features": {"d_sae": 64, "k": 4, "steps": 20, "documents": 300, "min_correlation": 0.05},
    },
    "train": {
        "mixtures": [["patching", "ablation", "features"]],
        "learning_rate": 0.002,
        "replay": 0.5,
        "text_only": True,
    },
    "evaluate": {"max_new_tokens": 8, "resamples": 100, "shots": [2], "selfie": [1, 10]},
    "cluster": {"concurrent_trainings": 2, "rows_per_slice": 10},
}


def config_in(folder: Path, **changes: Any) -> str:
    """Path of a config; storage lies below `folder` unless changed."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**EXPERIMENT, "storage": str(folder / "run"), **changes}))
    return str(path)


def plan_of(config: str) -> Plan:
    return Plan(read_experiment(config))


def tables_of(
    plan: Plan, kinds: Sequence[str] = ("effects", "questions", "answers")
) -> dict[str, list[dict[str, Any]]]:
    """Name of each table of these kinds -> its rows, without the floats."""
    artifacts = [artifact for artifact in all_artifacts(plan) if artifact.kind.endswith(tuple(kinds))]
    return {f"{artifact.kind} {artifact.label}": _rows(plan, artifact) for artifact in artifacts}


def _rows(plan: Plan, artifact: Artifact) -> list[dict[str, Any]]:
    table = storage.read_table(plan.path(artifact))
    kept = [field.name for field in table.schema if _is_exact(str(field.type))]
    return table.select(kept).to_pylist()


def _is_exact(arrow_type: str) -> bool:
    return not any(inexact in arrow_type for inexact in ("float", "double"))
