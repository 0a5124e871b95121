"""A training job that is killed with all that it started."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import train
from ray_explain.artifacts import finished
from ray_explain.distributed.watching import CURVE
from tests.interrupting import interrupt
from tests.tiny import config_in, plan_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
DROPPING_OUT = {
    "mixtures": [["patching"]],
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": 0.002,
    "replay": 0.5,
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "workers": 2,
    "checkpoint_every": 4,
}
N_STEPS = 60  # two epochs of 80 questions and 40 texts


def test_a_training_that_was_killed_goes_on_and_ends_with_the_losses_of_one_that_was_not(
    running_ray: None, tmp_path: Path
) -> None:
    """With `kill -9` after a first checkpoint. Dropout draws the same masks."""
    ground_truth = {"wording": "brief", "patching": {"cases": {"train": 80, "test": 20}, "blocks": 2}}
    config = config_in(tmp_path, explainers=["llama"], ground_truth=ground_truth, train=DROPPING_OUT)
    plan, whole = plan_of(config), tmp_path / "whole"
    explainer = plan.explainer(plan.runs()[0])
    known = Path(plan.root, "ray_train")  # to Ray Train
    interrupt("train", config, when=lambda: list(known.glob("*/checkpoint_manager_*.json")))
    assert finished(explainer, plan.root) is None
    made_after = shutil.ignore_patterns("ray_train", "explainers", "tensorboard", "logs")
    shutil.copytree(plan.root, whole, ignore=made_after)
    for root, overrides in [(plan.root, []), (str(whole), [f"storage={whole}"])]:
        assert train.main(["--config", config, *overrides]) == 0
        manifest = finished(explainer, root)
        assert manifest is not None and manifest.measured["steps"] == N_STEPS
        assert (manifest.measured["resumed_at"] > 0) == (root == plan.root)
    expected, found = (losses(explainer.path(root)) for root in (str(whole), plan.root))
    assert list(expected) == [10, 20, 30, 40, 50, 60]
    assert found == pytest.approx(expected, abs=1e-5)


def losses(folder: str) -> dict[int, float]:
    lines = [json.loads(line) for line in Path(folder, CURVE).read_text().splitlines()]
    return {line["steps"]: line["loss"] for line in lines}
