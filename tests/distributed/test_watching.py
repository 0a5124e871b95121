"""What TensorBoard is shown of a training, wherever its storage is."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_explain.distributed.watching import Watch
from tests.conftest import ObjectStore
from tests.object_store import BUCKET

RUN = SimpleNamespace(
    name="watched",
    artifact=SimpleNamespace(label="watched"),
    train=SimpleNamespace(trackers=[], model_dump=dict),
)


@pytest.mark.parametrize("remote", [False, True])
def test_tensorboard_reads_the_curves_at_every_checkpoint_and_at_the_end(
    object_store: ObjectStore, tmp_path: Path, remote: bool
) -> None:
    root = f"s3://{BUCKET}/watched" if remote else str(tmp_path / "root")
    watch = Watch(None, RUN, root, 20, first=True)  # type: ignore[arg-type]
    watch.validation(10, {"validation_exact": 0.5})
    watch.share()
    assert points(root) == [(10, 0.5)]
    watch.validation(20, {"validation_exact": 0.75})
    watch.close()
    assert points(root) == [(10, 0.5), (20, 0.75)]


def test_tensorboard_is_shown_what_each_line_of_the_curve_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ten steps and at the last one: loss and accuracy of the step, tokens since the line before."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # another worker saw the same
    watch = Watch(None, RUN, str(tmp_path), 25, first=True)  # type: ignore[arg-type]
    for step in range(1, 26):
        watch.step(step, torch.tensor([30.0 / step, 3.0, 6.0]), norm=step / 10, rate=step / 1000)
    lines = [json.loads(line) for line in watch.lines.splitlines()]
    watch.close()
    read = EventAccumulator(f"{tmp_path}/tensorboard/{RUN.name}").Reload()
    shown = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert {tag: [value for _, value in values] for tag, values in shown.items()} == {
        f"train/{name}": pytest.approx([line[name] for line in lines], rel=1e-6) for name in lines[0]
    }
    assert shown["train/loss"] == [(10, 0.5), (20, 0.25), (25, pytest.approx(0.2))]
    assert shown["train/accuracy"] == [(step, 0.5) for step in (10, 20, 25)]
    assert shown["train/learning_rate"] == [(step, pytest.approx(step / 1000)) for step in (10, 20, 25)]
    assert shown["train/gradient_norm"] == [(step, pytest.approx(step / 10)) for step in (10, 20, 25)]
    assert all(value > 0 for _, value in shown["train/answer_tokens_per_second"] + shown["train/memory_gib"])


def points(root: str) -> list[tuple[int, float]]:
    """(step, value) of the one curve."""
    read = EventAccumulator(f"{root}/tensorboard/{RUN.name}").Reload()
    return [(event.step, event.value) for event in read.Scalars("validation/exact")]
