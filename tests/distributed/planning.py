"""An experiment on one target, planned without a file."""

from pathlib import Path
from typing import Any

from ray_explain.config import Experiment
from ray_explain.distributed.plan import Plan


def planned(target: Path, folder: Path, **sections: Any) -> Plan:
    """The plan of an experiment that stores in `folder`, in which the target explains itself."""
    config = {
        "name": "read",
        "storage": str(folder / "run"),
        "models": {"m": {"path": str(target)}},
        "targets": ["m"],
        "explainers": ["m"],
    }
    return Plan(Experiment.model_validate(config | sections))
