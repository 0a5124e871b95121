"""Trainings that a sweep may stop: they tell how far they are, hear whether they shall go on, and end by themselves.

Ray Tune would kill a trial that it stops, and Ray Train's placement group may outlive its maker (Ray 2.60): its CPUs
and GPUs stay taken. Workers that return from their loop give everything back.
"""

from collections.abc import Mapping
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_explain.distributed.progress import on_this_node

REPORTS = 10  # of a training, evenly over its steps


class Halted(Exception):
    """A training was told to stop. Raised on all of its workers at once."""


@ray.remote(num_cpus=0)
class Verdicts:
    """Which trainings shall stop, and what was known of them when they did."""

    def __init__(self) -> None:
        self._stopped: set[str] = set()
        self._ends: dict[str, dict[str, float]] = {}

    def stop(self, name: str) -> None:
        """The training shall stop at its next report."""
        self._stopped.add(name)

    def is_stopped(self, name: str) -> bool:
        """Whether it shall."""
        return name in self._stopped

    def halted(self, name: str, metrics: dict[str, float]) -> None:
        """It did, with this for its last metrics."""
        self._ends[name] = metrics

    def end_of(self, name: str) -> dict[str, float]:
        """The last metrics of a training that was stopped.

        Raises:
            KeyError: it was not.
        """
        return self._ends[name]


def verdicts_here() -> Any:
    """New ones, on the node of this process: no lost worker takes them along, and all trainings go on hearing."""
    return Verdicts.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]


class Hearing:
    """A worker's end: reports how the training goes, and hears the verdict.

    Args:
        verdicts: The `Verdicts` of the sweep; None where nobody can stop the training, which then reports nothing.
        name: Of the training in the verdicts.
    """

    def __init__(self, verdicts: Any, name: str, n_steps: int) -> None:
        self._verdicts, self._name, self._n_steps = verdicts, name, n_steps
        self._known: dict[str, float] = {}

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called by all workers after each step (from 1) with what the first one knows, nothing on the others.

        Raises:
            Halted: the training shall stop, on all workers at the same step.
        """
        if self._verdicts is None:
            return
        self._known |= metrics
        part, before = step * REPORTS // self._n_steps, (step - 1) * REPORTS // self._n_steps
        if part == before or step == self._n_steps:
            return
        now = {**self._known, "progress": part * 100 // REPORTS, "steps": step}
        # The mode that does not wait for checkpoints that are still being uploaded.
        ray.train.report(now, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
        if self._is_stopped():
            if ray.train.get_context().get_world_rank() == 0:
                ray.get(self._verdicts.halted.remote(self._name, now))
            raise Halted(f"{self._name} was stopped after {step} of {self._n_steps} steps")

    def _is_stopped(self) -> bool:
        """The first worker asks, the others do what it heard."""
        verdict = torch.zeros(1)
        if ray.train.get_context().get_world_rank() == 0:
            verdict += ray.get(self._verdicts.is_stopped.remote(self._name))
        if ray.train.get_context().get_world_size() > 1:
            device = ray.train.torch.get_device()
            verdict = verdict.to(device)
            torch.distributed.broadcast(verdict, src=0)
        return bool(verdict)
