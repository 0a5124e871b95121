"""Experiment trackers beside TensorBoard, imported only when the config asks for them."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray_explain import storage
from ray_explain.errors import BadInput

_TAG = "ray_explain.run"


class Tracker(Protocol):
    """Where numbers of a run are sent to."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one step."""

    def close(self) -> None:
        """Send what is still in memory."""


class _MLflow:
    """MLflow, at MLFLOW_TRACKING_URI, else in `folder`; a run of this name goes on."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: str | None) -> None:
        import mlflow

        self._mlflow = mlflow
        if folder and "MLFLOW_TRACKING_URI" not in os.environ:
            Path(folder).mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
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
    """Weights & Biases, as its own environment variables say (WANDB_API_KEY, WANDB_MODE=offline); its files in
    `folder`."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], folder: str | None) -> None:
        import wandb

        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        place = None if "WANDB_DIR" in os.environ else folder
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config), dir=place)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[str, str, Mapping[str, Any], str | None], Tracker]] = {
    "mlflow": _MLflow,
    "wandb": _Wandb,
}


def check_trackers(names: Sequence[str], root: str) -> None:
    """Raises: BadInput: one of these trackers is not installed; or its runs would be lost, since the storage `root` is
    remote and no server is named."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(
                f"`train.trackers` asks for {name}, which is not installed: pip install 'ray_explain[{name}]'"
            )
    if not storage.is_remote(root):
        return
    lost = "would be lost with the worker that writes them, since `storage` is remote"
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise BadInput(f"`train.trackers`: the runs of mlflow {lost}: set MLFLOW_TRACKING_URI to a server")
    if "wandb" in names and os.environ.get("WANDB_MODE") == "offline":
        raise BadInput(f"`train.trackers`: the runs of wandb {lost}: leave WANDB_MODE=offline out")


def open_trackers(names: Sequence[str], project: str, name: str, config: Mapping[str, Any], root: str) -> list[Tracker]:
    """One run in each tracker, with the training section as its parameters. What they keep in files lies below the
    storage `root`, unless it is remote: workers' own directories go with Ray's session."""
    folder = None if storage.is_remote(root) else storage.filesystem(root)[1]
    return [_TRACKERS[tracker](project, name, config, folder) for tracker in names]
