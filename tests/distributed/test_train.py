"""Training on Ray Train and DeepSpeed gives what plain PyTorch gives, also after a worker was killed."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from ray_explain import storage
from ray_explain.artifacts import Artifact, finished
from ray_explain.config import ClusterConfig, InjectionConfig, TrainConfig
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.world_cases import ablation_cases, patching_cases
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.patching import patching_questions
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

pytestmark = pytest.mark.ray
TRAIN = TrainConfig(
    epochs=3,
    batch_size=8,
    learning_rate=3e-3,
    schedule="wsd",
    warmup=0.1,
    injection=InjectionConfig(scale="mean_embedding"),
)


@pytest.fixture(scope="module")
def questions(world_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Directories of 64 questions about patching and 32 about ablation."""
    folder, world = tmp_path_factory.mktemp("questions"), World()
    tokenizer = world_tokenizer(world)
    config = {"model": str(world_target), "revision": None, "dtype": "float32"}
    effects = PatchingStage(config)(patching_cases(world, tokenizer, n={"train": 64}, layers=[(0, 0), (1, 1)], seed=0))
    asked = patching_questions(
        effects.table, lambda text: [tokenizer.decode([t]) for t in tokenizer.encode(text)], wording="brief", seed=0
    )
    storage.write_table(asked.table, f"{folder}/patching/table.parquet")
    ablated = AblationStage(config)(ablation_cases(world, n={"train": 32}, seed=0))
    asked = ablation_questions(ablated.table, d_model=32, wording="brief", seed=0)
    storage.write_table(asked.table, f"{folder}/ablation/table.parquet")
    return f"{folder}/patching", f"{folder}/ablation"


def run_of(train: TrainConfig, label: str, questions: tuple[str, str], target: Path) -> Any:
    from ray_explain.distributed.train import TrainRun

    return TrainRun(
        artifact=Artifact(kind="explainers", label=label, config=train.model_dump(mode="json")),
        model={"model": str(target), "revision": None, "dtype": "float32"},
        target={"name": "target", "revision": None},
        questions=questions,
        replay=(("fonan was born in", "sunmouth"),) * 8,
        train=train,
        seed=0,
        wording="brief",
    )


def plain_losses(run: Any) -> list[float]:
    """The same training in one process without Ray and DeepSpeed."""
    from ray_explain.distributed.training_loop import examples_of, new_explainer
    from ray_explain.explainer.markers import markers_of
    from ray_explain.explainer.training import PlainTraining, train_plain
    from ray_explain.models import load_model

    loaded = load_model(run.model["model"])
    markers = markers_of(loaded.tokenizer)
    examples, dropped = examples_of(run, loaded.tokenizer, markers)
    assert not dropped
    torch.manual_seed(run.seed)
    explainer = new_explainer(run, loaded.model, loaded.tokenizer, markers, examples)
    names = ("epochs", "batch_size", "learning_rate", "schedule", "warmup", "weight_decay", "clip")
    plain = PlainTraining(**{name: getattr(run.train, name) for name in names}, seed=run.seed)
    return train_plain(explainer, examples, plain, pad_id=loaded.pad_id)


def curve(run: Any, root: str) -> dict[int, float]:
    lines = Path(run.artifact.path(root), "training.jsonl").read_text().splitlines()
    return {row["steps"]: row["loss"] for row in map(json.loads, lines)}


def test_two_workers_with_zero_2_and_a_killed_one_learn_as_plain_pytorch(
    running_ray: None, questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.train import train_all

    steady = TRAIN.model_copy(update={"workers": 2, "zero_stage": 2, "micro_batch_size": 2})
    disturbed = steady.model_copy(update={"checkpoint_every": 5, "zero_stage": 1})
    runs = [run_of(steady, "steady", questions, world_target), run_of(disturbed, "disturbed", questions, world_target)]
    killed = _kill_a_worker_after_a_checkpoint(tmp_path / "ray_train" / runs[1].name)
    train_all(runs, str(tmp_path), ClusterConfig(concurrent_trainings=1))
    assert killed(), "the run ended before a worker could be killed"
    expected = plain_losses(runs[0])
    assert len(expected) == 39
    for run in runs:
        found = curve(run, str(tmp_path))
        assert found[39] == pytest.approx(expected[38], abs=1e-4)
        assert all(loss == pytest.approx(expected[step - 1], abs=1e-4) for step, loss in found.items())
        manifest = finished(run.artifact, str(tmp_path))
        assert manifest is not None and manifest.measured["workers"] == 2
    assert not (tmp_path / "ray_train" / runs[1].name).exists()


def _kill_a_worker_after_a_checkpoint(folder: Path) -> Any:
    killed: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            if list(folder.glob("checkpoint_*/engine/*")):
                workers = [
                    process.pid
                    for process in psutil.process_iter(["cmdline"])
                    if "ray::RayTrainWorker" in " ".join(process.info["cmdline"] or [])
                ]
                if workers:
                    os.kill(workers[-1], signal.SIGKILL)
                    killed.append(workers[-1])
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()

    def was_killed() -> bool:
        thread.join(timeout=1)
        return bool(killed)

    return was_killed


def test_a_failed_run_does_not_stop_the_others_and_says_why(
    running_ray: None, questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.train import train_all
    from ray_explain.errors import JobFailed

    fine = run_of(TRAIN.model_copy(update={"epochs": 1}), "fine", questions, world_target)
    tight = TRAIN.model_copy(update={"max_tokens": 2, "max_failures": 0})
    with pytest.raises(JobFailed, match=r"tight: .*no question of the training split"):
        train_all(
            [run_of(tight, "tight", questions, world_target), fine],
            str(tmp_path),
            ClusterConfig(concurrent_trainings=2),
        )
    assert finished(fine.artifact, str(tmp_path)) is not None


def test_an_explainer_without_vectors_is_trained_on_the_same_words_and_zeros(
    questions: tuple[str, str], world_target: Path
) -> None:
    from ray_explain.distributed.training_loop import examples_of
    from ray_explain.explainer.markers import markers_of
    from ray_explain.models import load_model

    tokenizer = load_model(str(world_target)).tokenizer
    run = run_of(TRAIN, "text", questions, world_target)
    (own, _), (blind, _) = (
        examples_of(each, tokenizer, markers_of(tokenizer)) for each in (run, replace(run, text_only=True))
    )
    assert [example.input_ids for example in own] == [example.input_ids for example in blind]
    assert all(example.vectors.any() for example in own if len(example.vectors))
    assert not any(example.vectors.any() for example in blind) and any(len(example.vectors) for example in blind)
