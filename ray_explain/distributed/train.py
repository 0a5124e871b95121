"""Explainer training with Ray Train: the driver's side. What workers do is in `training_loop`."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray.train
import ray.train.torch
from ray.exceptions import RayActorError

from ray_explain import storage
from ray_explain.artifacts import Artifact, finished
from ray_explain.config import ClusterConfig, TrainConfig
from ray_explain.distributed.capacity import check_capacity, fleet
from ray_explain.distributed.checks import check_worker, code_here, way_out
from ray_explain.distributed.progress import watching
from ray_explain.distributed.trackers import check_trackers
from ray_explain.errors import JobFailed

logger = logging.getLogger(__name__)
STOPPED = "stopped.json"  # in a run's folder: why its workers gave it up


@dataclass(frozen=True, kw_only=True)
class TrainRun:
    """One explainer to be trained. Everything in it is plain, so that it can travel to the workers."""

    artifact: Artifact
    model: dict[str, Any]  # config of `load_model` for the model it starts from
    target: dict[str, Any]  # for the sidecar: name and revision of the target, and its `weights` where they are known
    questions: tuple[str, ...]  # directories of question tables
    replay: tuple[tuple[str, str], ...]  # (prompt, answer) of texts read along, against forgetting
    train: TrainConfig
    seed: int
    wording: str
    fraction: float = 1.0  # of the training questions
    text_only: bool = False  # all numbers of the vectors are 0
    alignment: str | None = None  # folder of the maps that a ridge projection starts from

    @property
    def name(self) -> str:
        """Of the Ray Train run: the same name goes on from its last checkpoint."""
        return f"{self.artifact.label}-{self.artifact.fingerprint[:10]}"


def best_folder(run: TrainRun, root: str) -> str:
    """Where the best explainer so far is kept while a run goes on."""
    return f"{root}/ray_train/{run.name}-best"


def train_all(runs: Sequence[TrainRun], root: str, cluster: ClusterConfig) -> None:
    """Train the explainers, `concurrent_trainings` at a time. One that fails is told of at once and does not stop the
    others.

    Raises:
        BadInput: a tracker that is asked for is not installed, or has no place for its runs.
        JobFailed: the cluster can never have the workers, which is said before any work; or some explainers could not
            be trained: the message says which and why.
    """
    nodes = fleet(cluster)
    for run in runs:
        check_trackers(run.train.trackers, root)
        check_capacity(run.train.workers, nodes, gpus_per_worker=cluster.gpus_per_worker)
    threads = ThreadPoolExecutor(cluster.concurrent_trainings)
    try:
        with watching() as board:
            ended = list(threads.map(lambda run: _beside_others(run, root, cluster, board), runs))
    finally:  # stopped by hand, we do not wait for the others: Ray goes down, and they with it
        threads.shutdown(wait=False, cancel_futures=True)
    failures = [f"{run.artifact.label}: {failure}" for run, failure in zip(runs, ended) if failure]
    if failures:
        raise JobFailed("; ".join(failures))


def _beside_others(run: TrainRun, root: str, cluster: ClusterConfig, board: Any) -> str | None:
    """As `fit`, but whatever fails it is said while the others go on, which may take days. Another job may have made
    the explainer while it waited for its turn."""
    if finished(run.artifact, root) is not None:
        return None
    try:
        failure = fit(run, root, cluster, board)
    except RayActorError as error:
        logger.exception("training of %s failed", run.artifact.label)
        failure = f"its controller was lost ({type(error).__name__}), as where memory is short: start the job again"
    if failure is not None:
        board.say.remote(f"{run.artifact.label} failed: {failure}")
    return failure


def fit(
    run: TrainRun,
    root: str,
    cluster: ClusterConfig,
    board: Any,
    *,
    verdicts: Any = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> str | None:
    """Train one explainer; returns why it failed, or None.

    A sweep gives `verdicts`, by which it may stop the training (there is no explainer then), and `callbacks` that take
    up what the workers report.
    """
    given = {"run": run, "root": root, "board": board, "verdicts": verdicts, "max_dropped": cluster.max_dropped}
    trainer = _trainer(given, cluster.gpus_per_worker, callbacks)
    _why_stopped(run, root)  # in an earlier attempt
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        logger.exception("training of %s failed", run.artifact.label)
        return way_out(error) or str(error).strip().splitlines()[-1]
    reason = _why_stopped(run, root)
    if reason is None:
        # Checkpoints; the explainer is whole, or not wanted any more.
        storage.remove(f"{root}/ray_train/{run.name}")
        storage.remove(best_folder(run, root))
    return reason


def _trainer(given: dict[str, Any], gpus: float, callbacks: Sequence[ray.train.UserCallback]) -> Any:
    """`given` is what the workers get, each of which has as many `gpus`."""
    run = given["run"]
    system, checkpoints = storage.filesystem(f"{given['root']}/ray_train")
    return ray.train.torch.TorchTrainer(
        _on_worker,
        train_loop_config=given | {"code": code_here()},
        scaling_config=ray.train.ScalingConfig(
            num_workers=run.train.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": 1} | ({"GPU": gpus} if gpus else {}),
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name=run.name,
            callbacks=list(callbacks),  # type: ignore[arg-type]
            storage_path=checkpoints,
            storage_filesystem=system,
            failure_config=ray.train.FailureConfig(max_failures=run.train.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=run.train.keep_checkpoints),
        ),
    )


def _why_stopped(run: TrainRun, root: str) -> str | None:
    """Why the workers gave up, once: started again, the run goes on from its last checkpoint."""
    place = f"{root}/ray_train/{run.name}/{STOPPED}"
    if not storage.exists(place):
        return None
    reason = storage.read_json(place)["reason"]
    storage.remove_file(place)
    return reason


def _on_worker(config: dict[str, Any]) -> None:
    """Imports what is heavy only where it is needed: in the workers, not in Ray Train's controllers."""
    check_worker(config["root"], config["code"])
    from ray_explain.distributed.training_loop import train_on_worker

    train_on_worker(**{name: value for name, value in config.items() if name != "code"})
