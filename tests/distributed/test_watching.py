"""What TensorBoard is shown of a training, wherever its storage is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
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


def points(root: str) -> list[tuple[int, float]]:
    """(step, value) of the one curve."""
    read = EventAccumulator(f"{root}/tensorboard/{RUN.name}").Reload()
    return [(event.step, event.value) for event in read.Scalars("validation/exact")]
