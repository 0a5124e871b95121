"""Experiment trackers beside TensorBoard, imported only when the config asks for them."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ray_explain.errors import BadInput

_TAG = "ray_explain.run"


class Tracker(Protocol):
    """Where numbers of a run are sent to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Send what is still in memory."""


class _MLflow:
    """MLflow, at MLFLOW_TRACKING_URI (else below the working directory); a run of this name goes on."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(project)
        found = mlflow.search_runs(
            experiment_names=[project],
            filter_string=f"tags.`{_TAG}` = '{name}'",
            order_by=["attributes.start_time DESC"],
            max_results=1,
            output_format="list",
        )
        if found:
            mlflow.start_run(run_id=found[0].info.run_id)
        else:
            mlflow.start_run(run_name=name, tags={_TAG: name})
            # Only once: MLflow refuses other values, and how the work is done may differ when it goes on.
            mlflow.log_params({key: str(value)[:500] for key, value in config.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """Weights & Biases, as its own environment variables say (WANDB_API_KEY, WANDB_MODE=offline)."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[str, str, Mapping[str, Any]], Tracker]] = {"mlflow": _MLflow, "wandb": _Wandb}


def check_installed(names: Sequence[str]) -> None:
    """Raises: BadInput: one of these trackers is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(
                f"`train.trackers` asks for {name}, which is not installed: pip install 'ray_explain[{name}]'"
            )


def open_trackers(names: Sequence[str], project: str, name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """One run in each tracker, with the training section as its parameters."""
    return [_TRACKERS[tracker](project, name, config) for tracker in names]
