"""What a training would take is said without starting it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from jobs.train import main
from ray_explain.config import read_experiment
from ray_explain.distributed import training_plan
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.training_plan import Machine, fits, work_of
from ray_explain.distributed.training_setup import start_of
from ray_explain.explainer.markers import markers_of
from ray_explain.explainer.memory import _FIXED, Footprint, Peak, peak
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from tests.distributed.training_runs import run_of


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
    markers = 3 * 32
    assert adapted.made.n_trained == linear + markers
    assert adapted.made.n_parameters == n + linear + markers
    assert adapted.rows == 2


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
@pytest.mark.parametrize(
    ("projection", "blocks", "layers"),
    [("identity", 2, []), ("linear", 2, [0, 1]), ("ridge", "[[1, 1]]", [1]), ("linear", "[[0, 1]]", [0, 1])],
)
def test_a_projection_counts(
    config: str, world_target: Path, lora: str, projection: str, blocks: Any, layers: list[int]
) -> None:
    overrides = ["evaluate.controls=[]", f"ground_truth.patching.blocks={blocks}"]
    overrides += [f"train.injection={{projection: {projection}}}"]
    made = work(config, *overrides, f"train.lora={lora}").made
    model = AutoModelForCausalLM.from_pretrained(world_target)
    if lora != "null":
        model = with_lora(model.requires_grad_(False), rank=4, alpha=4, dropout=0.0)
    kind = "identity" if projection == "identity" else "linear"
    markers = markers_of(AutoTokenizer.from_pretrained(world_target))
    explainer = Explainer(model, markers, Projection(kind, 32, 32, layers), train_markers=lora != "null")
    counts = [(one.numel(), one.requires_grad) for one in explainer.parameters()]
    assert made.n_parameters == sum(n for n, _ in counts)
    assert made.n_trained == sum(n for n, is_trained in counts if is_trained)


def test_fractions_and_weights_count_as_in_the_training(
    config: str, questions: tuple[str, str], world_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of questions that are there, and of those that will be."""
    expected = {0.3: 30, 1.0: 100}
    plan = Plan(read_experiment(config, ["fractions=[0.3, 1.0]"]))
    assert {run.fraction: work_of(plan, run).questions for run in plan.runs()} == expected
    assert [work_of(plan, run).known for run in plan.runs()] == [False, False]
    overrides = ["fractions=[0.3, 1.0]", "train.weights={patching: 1.3}", "train.batch_size=4"]
    experiment = read_experiment(config, overrides)  # which allows only models of the world to replay its texts
    plan = Plan(experiment.trained_with({("tiny", "tiny"): {"replay": 0.4}}))
    monkeypatch.setattr(training_plan, "finished", lambda *_: True)
    monkeypatch.setattr(plan, "path", lambda _: questions[0])
    for run in plan.runs():
        train, found = plan.train_config(run), work_of(plan, run)
        training = replace(run_of(train, "planned", questions[:1], world_target), fraction=run.fraction)
        n = round(found.questions * train.replay)
        start = start_of(replace(training, replay=(("fonan was born in", "sunmouth"),) * n), workers=2)
        assert found.known and found.questions == len(start.examples) - n
        assert found.steps == len(start.steps)


PUBLISHED = "sae: {path: /some/sae}, d_sae: 7, describer: {kind: neuronpedia, path: /some/export}"


@pytest.mark.parametrize(
    ("features", "questions", "told"),
    [
        ("d_sae: 50", 100, "100 questions, at most x 3 epochs = 39 steps of 8, 4 at once"),
        ("per_layer: 20, source: released, path: /some/data", 40, "40 questions, at most x 3 epochs = 15 steps of 8"),
        (
            "source: released, path: /some/data, d_sae: 7",
            None,
            "an unknown number of questions (all features there are",
        ),
        (PUBLISHED, None, "`per_layer` is not given) x 3 epochs, steps of 8, 4 at once"),
        (f"per_layer: 20, {PUBLISHED}", 40, "40 questions, at most"),
        ("source: neurons, describer: {kind: local, path: /some/model}", None, "an unknown number of questions"),
    ],
)
def test_features_are_as_many_as_are_asked_for(
    features: str, questions: int | None, told: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An SAE that others made is as wide as it is: `d_sae` says nothing about it."""
    overrides = [f"ground_truth={{features: {{{features}}}}}", "train.mixtures=[[features]]"]
    found = work(config, *overrides)
    assert found.questions == questions and (found.steps is None) is (questions is None)
    assert main(["--config", config, "--plan", *overrides]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("workers", "gpus_per_worker", "gpus", "memory", "expected"),
    [
        (1, 1, [80], 100, "yes"),
        (4, 1, [80], 10_000, "no: 4 x GPU"),
        (4, 1, [80] * 4, 400, "yes"),
        (4, 1, [80, 80, 80, 20], 400, "no: GPU memory"),
        (1, 0.5, [80], 400, "yes"),
        (1, 0.5, [], 400, "no: 1 x GPU"),
        (4, 1, [80] * 4, 40, "no: host memory"),
        (1, 1, [], 10_000, "no: 1 x GPU"),
        (2, 0, [], 100, "yes"),
        (3, 0, [], 100, "no: memory"),
        (2, 0, [80], 60, "no: memory"),
    ],
)
def test_all_workers_have_to_fit_this_machine(
    workers: int, gpus_per_worker: float, gpus: list[int], memory: int, expected: str
) -> None:
    """Each holds 30 on its device and 10 on the host, of which nine tenths are there to be had."""
    found = Peak(weights=30 - _FIXED, optimizer=0, activations=0, gradients=0, buffers=0, offloaded=10)
    assert fits(found, workers, gpus_per_worker, Machine(gpus, "card", memory)) == expected


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
    assert not (tmp_path / "runs").exists()


def test_a_plan_for_models_that_are_not_pretrained_yet_says_what_makes_them(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config, "--plan", "models.tiny={pretrain: {architecture: llama}}"]) == 2
    assert "`models.tiny` is to be pretrained, and is not there yet: run jobs/pretrain.py" in capsys.readouterr().err
