"""Training on Ray Train and DeepSpeed gives what plain PyTorch gives, also after a worker was killed."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import ClusterConfig, InjectionConfig, TrainConfig
from tests.distributed.training_runs import plain_losses, run_of

pytestmark = pytest.mark.ray
TRAIN = TrainConfig(
    epochs=3,
    batch_size=8,
    learning_rate=3e-3,
    schedule="wsd",
    warmup=0.1,
    injection=InjectionConfig(scale="mean_embedding"),
)


def lines(run: Any, root: str) -> list[dict[str, Any]]:
    text = Path(run.artifact.path(root), "training.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def curve(run: Any, root: str) -> dict[int, float]:
    return {row["steps"]: row["loss"] for row in lines(run, root) if "loss" in row}


def test_two_workers_with_zero_2_and_a_killed_one_learn_as_plain_pytorch(
    running_ray: None, questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.train import train_all

    steady = TRAIN.model_copy(update={"workers": 2, "zero_stage": 2, "micro_batch_size": 2})
    watched = {"validate_every": 20, "validation_questions": 12, "keep": "best"}
    disturbed = steady.model_copy(update={"checkpoint_every": 5, "zero_stage": 1, **watched})
    runs = [run_of(steady, "steady", questions, world_target), run_of(disturbed, "disturbed", questions, world_target)]
    killed = _kill_a_worker_after_a_checkpoint(tmp_path / "ray_train" / runs[1].name)
    train_all(runs, str(tmp_path), ClusterConfig(concurrent_trainings=1))
    assert killed(), "the run ended before a worker could be killed"
    expected = plain_losses(runs[0])
    assert len(expected) == 39
    for run in runs:
        found = curve(run, str(tmp_path))
        assert list(found) == [10, 20, 30, 39], "a restart neither loses nor repeats lines"
        assert all(loss == pytest.approx(expected[step - 1], abs=1e-4) for step, loss in found.items())
        manifest = finished(run.artifact, str(tmp_path))
        assert manifest is not None and manifest.measured["workers"] == 2
    told = [row for row in lines(runs[1], str(tmp_path)) if "validation_exact" in row]
    assert [row["steps"] for row in told] == [20, 39]
    assert all(0 <= row["validation_exact"] <= 1 and -1 <= row["validation_uplift"] <= 1 for row in told)
    assert manifest.measured["kept_validation_exact"] == max(row["validation_exact"] for row in told)
    assert manifest.measured["gradient_norm"] > 0 and manifest.measured["memory_gib"] > 0
    assert list((tmp_path / "tensorboard" / runs[1].name).glob("events.*"))
    assert not list((tmp_path / "ray_train").glob(f"{runs[1].name}*")), "nothing is left of a finished training"


@pytest.mark.long
def test_a_stopped_training_goes_on_with_fewer_workers_at_another_stage_and_passes_over_a_checkpoint_that_was_cut(
    running_ray: None, questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.train import train_all
    from ray_explain.errors import JobFailed

    root, fragile = str(tmp_path), {"workers": 2, "checkpoint_every": 3, "keep_checkpoints": 3, "max_failures": 0}
    run = run_of(TRAIN.model_copy(update=fragile), "stopped", questions, world_target)
    killed = _kill_a_worker_after_a_checkpoint(tmp_path / "ray_train" / run.name, n=3)
    with pytest.raises(JobFailed, match="stopped: "):
        train_all([run], root, ClusterConfig())
    assert killed()
    known = json.loads((tmp_path / "ray_train" / run.name / "checkpoint_manager_snapshot.json").read_text())
    latest = tmp_path / "ray_train" / run.name / known["latest_checkpoint_result"]["checkpoint_dir_name"]
    share = next(latest.glob("share-*.safetensors"))
    share.write_bytes(share.read_bytes()[:1000])
    others = {"workers": 1, "zero_stage": 3, "micro_batch_size": 4}
    alone = run_of(run.train.model_copy(update=others), "stopped", questions, world_target)
    train_all([alone], root, ClusterConfig())
    expected = plain_losses(run)
    found = curve(run, root)
    assert list(found) == [10, 20, 30, 39]
    assert all(loss == pytest.approx(expected[step - 1], abs=1e-4) for step, loss in found.items())
    manifest = finished(run.artifact, root)
    assert manifest is not None and (manifest.measured["workers"], manifest.measured["zero_stage"]) == (1, 3)
    assert manifest.measured["resumed_at"] in (3, 6, 9, 12, 15), "it began anew, or never stopped"


def _kill_a_worker_after_a_checkpoint(folder: Path, n: int = 1) -> Any:
    """Kills one once `n` checkpoints are there."""
    killed: list[int] = []

    def watch() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            if len(list(folder.glob("checkpoint_*/state.json"))) >= n:
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


def test_failed_runs_do_not_stop_others_and_what_is_left_out_is_said(
    running_ray: None,
    questions: tuple[str, str],
    world_target: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from ray_explain.distributed.train import train_all
    from ray_explain.errors import JobFailed

    long, _ = _with_an_over_long_question(questions[0], tmp_path)
    fine = run_of(TRAIN.model_copy(update={"epochs": 1}), "fine", (long,), world_target)
    tight = run_of(TRAIN.model_copy(update={"max_tokens": 2}), "tight", questions, world_target)
    tighter = run_of(TRAIN.model_copy(update={"max_tokens": 44}), "tighter", questions, world_target)
    raw = TRAIN.model_copy(update={"injection": InjectionConfig(projection="linear"), "checkpoint_every": 1})
    [bad, name] = _with_a_vector_beyond_float32(questions[0], tmp_path)
    wild = run_of(raw, "wild", (bad,), world_target)
    with pytest.raises(JobFailed) as failure:
        train_all([tight, tighter, wild, fine], str(tmp_path), ClusterConfig(concurrent_trainings=2))
    assert re.search(r"tight: .*no question of the training split", str(failure.value))
    assert re.search(r"tighter: .* left out: \d+ over-long, more than `cluster.max_dropped` = 0.05", str(failure.value))
    assert re.search(rf"wild: the loss is nan on questions .*{name}.*: lower the learning rate", str(failure.value))
    manifest = finished(fine.artifact, str(tmp_path))
    assert manifest is not None and manifest.dropped == {"over-long": 1}
    told = "fine: 1 of 72 training questions and texts are left out: 1 over-long"
    assert capsys.readouterr().out.count(told) == 1 and told in caplog.text
    states = (tmp_path / "ray_train" / wild.name).glob("checkpoint_*/state.json")
    assert wild.train.keep_checkpoints == 2
    assert sorted(json.loads(state.read_text())["step"] for state in states) == [3, 4], "the last good checkpoints stay"


def _with_an_over_long_question(folder: str, tmp_path: Path) -> tuple[str, str]:
    """A copy of the questions in which one cannot be learned, and its id."""
    table = storage.read_table(folder)
    rows = table.filter(pc.equal(table["split"], "train")).to_pylist()
    rows[0]["prompt"] += " a" * TRAIN.max_tokens
    storage.write_table(pa.Table.from_pylist(rows, schema=table.schema), f"{tmp_path}/long/table.parquet")
    return f"{tmp_path}/long", rows[0]["question_id"]


def _with_a_vector_beyond_float32(folder: str, tmp_path: Path) -> tuple[str, str]:
    """A copy of the questions in which one vector is infinite once it is projected; it comes in the fifth step."""
    table = storage.read_table(folder)
    rows = table.filter(pc.equal(table["split"], "train")).to_pylist()
    rows[0]["vectors"] = [[3.4e38 for _ in vector] for vector in rows[0]["vectors"]]
    storage.write_table(pa.Table.from_pylist(rows, schema=table.schema), f"{tmp_path}/questions/table.parquet")
    return f"{tmp_path}/questions", rows[0]["question_id"]


def test_questions_that_cannot_be_learned_are_counted_and_too_many_of_them_are_refused(
    questions: tuple[str, str], world_target: Path, tmp_path: Path
) -> None:
    from ray_explain.distributed.training_setup import start_of, told_of_dropped
    from ray_explain.errors import BadInput

    whole = start_of(run_of(TRAIN, "all", questions, world_target), workers=1)
    assert told_of_dropped(whole, "all", 0.0) is None
    folder, name = _with_an_over_long_question(questions[0], tmp_path)
    start = start_of(run_of(TRAIN, "some", (folder,), world_target), workers=1)
    told = "some: 1 of 72 training questions and texts are left out: 1 over-long"
    assert told_of_dropped(start, "some", 1 / 72) == told
    with pytest.raises(
        BadInput, match=rf"{told}, more than `cluster.max_dropped` = 0.01; the first: {name}: over-long"
    ):
        told_of_dropped(start, "some", 0.01)


def test_an_explainer_without_vectors_is_trained_on_the_same_words_and_zeros(
    questions: tuple[str, str], world_target: Path
) -> None:
    from ray_explain.distributed.training_setup import examples_of
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
