"""What a training would take is said without starting it."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM

from jobs.train import main
from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.training_plan import work_of
from ray_explain.explainer.memory import Footprint, peak


@pytest.fixture
def config(world_target: Path, tmp_path: Path) -> str:
    values: dict[str, Any] = {
        "name": "planned",
        "storage": str(tmp_path / "runs"),
        "models": {"tiny": {"path": str(world_target)}},
        "targets": ["tiny"],
        "explainers": ["tiny"],
        "ground_truth": {"patching": {"cases": {"train": 100, "test": 10}}},
        "train": {"mixtures": [["patching"]], "epochs": 3, "batch_size": 8, "workers": 2, "max_tokens": 60},
    }
    path = tmp_path / "planned.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def work(config: str, *overrides: str) -> Any:
    plan = Plan(read_experiment(config, overrides))
    return work_of(plan, plan.runs()[0])


def test_parameters_and_steps_are_those_of_the_training(config: str, world_target: Path) -> None:
    n = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(world_target).parameters())
    found = work(config)
    assert (found.made.n_parameters, found.made.n_trained) == (n, n)
    assert (found.questions, found.steps, found.rows) == (100, 3 * math.ceil(100 / 8), 4)
    adapted = work(config, "train.lora={rank: 4}", "train.micro_batch_size=2")
    linear = (
        2 * 4 * (4 * (32 + 32) + 3 * (32 + AutoModelForCausalLM.from_pretrained(world_target).config.intermediate_size))
    )
    assert adapted.made.n_trained == linear
    assert adapted.made.n_parameters == n + linear
    assert adapted.rows == 2


def test_what_is_computed_again_is_not_kept(config: str) -> None:
    kept, again = (work(config, f"train.gradient_checkpointing={value}").made for value in ("false", "true"))
    assert again.activations < kept.activations
    longer = work(config, "train.max_tokens=120").made
    assert longer.activations == pytest.approx(2 * kept.activations, rel=0.1)


def test_stages_share_out_what_they_say(config: str) -> None:
    n = 1_000_000_000
    made = Footprint(n_parameters=n, n_trained=n, bytes_each=2, activations=10**9, logits=0)
    found = [peak(made, zero_stage=stage, workers=4, offload=False) for stage in (0, 1, 2, 3)]
    assert [one.weights / n for one in found] == [2, 2, 2, 0.5]
    assert [one.optimizer / n for one in found] == [16, 3, 3, 3]
    assert [one.gradients / n for one in found] == [2, 2, 0.5, 0.5]
    assert [one.buffers / n for one in found] == [1, 1 + 1, 1 + 1, 1 + 1 + 2]
    moved = peak(made, zero_stage=3, workers=4, offload=True)
    assert moved.optimizer == 0 and moved.offloaded / n == 3 + 1 + 0.5
    assert moved.total < found[3].total


def test_the_job_says_it_and_starts_nothing(config: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--config", config, "--plan", "train.zero_stage=1"]) == 0
    told = capsys.readouterr().out
    assert "100 questions, at most x 3 epochs = 39 steps of 8, 4 at once on each of 2 workers" in told
    assert told.count("yes") == 4 and "1 <" in told
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"logs", "config.yaml"}
