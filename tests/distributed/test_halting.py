"""Trainings that a sweep may stop."""

from typing import Any

import pytest
import ray.train

from ray_explain.distributed.halting import REPORTS, Hearing


def test_ten_reports_are_made_none_of_which_waits_for_a_checkpoint_that_is_uploaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step goes on while they wait for their turn."""
    told: list[tuple[int, Any]] = []

    def report(metrics: dict[str, Any], *, checkpoint_upload_mode: Any = None) -> None:
        told.append((metrics["steps"], checkpoint_upload_mode))

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(Hearing, "_is_stopped", lambda _: False)
    hearing = Hearing(object(), "one", n_steps=35)
    for step in range(1, 36):
        hearing.after(step, {"loss": 1.0})
    assert len(told) == REPORTS - 1  # the last one is the explainer itself
    assert {mode for _, mode in told} == {ray.train.CheckpointUploadMode.ASYNC}
    assert told[0][0] == 4
