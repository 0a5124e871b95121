"""A sweep on tiny models: one setting that learns, one that is stopped, and one that cannot work."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import sweep
from ray_explain import storage
from ray_explain.artifacts import MANIFEST
from ray_explain.launch import STOPPED
from tests.interrupting import interrupt
from tests.tiny import EXPERIMENT, plan_of

pytestmark = pytest.mark.ray

# One to learn with, one at which weights overflow and one at which they vanish. The last starts when the second has
# failed, so that it comes to be judged well after the first.
DECAYS = {0.01: "done", 1e38: "failed", 300.0: "stopped"}
SWEEP: dict[str, Any] = {
    **EXPERIMENT,
    "explainers": ["llama"],
    "ground_truth": {"wording": "brief", "ablation": {"cases": {"train": 120, "test": 30}}},
    "train": {"mixtures": [["ablation"]], "learning_rate": 3e-3, "batch_size": 4, "epochs": 4, "max_failures": 0},
    "evaluate": {**EXPERIMENT["evaluate"], "max_new_tokens": 24},  # a whole answer
    "sweep": {
        "parameters": {"weight_decay": list(DECAYS)},
        "asha": {"grace": 0.2, "reduction": 2},
    },
}
OF_THREE_RATES: dict[str, Any] = {
    **SWEEP,
    "train": {**SWEEP["train"], "checkpoint_every": 10},
    "sweep": {"parameters": {"learning_rate": [3e-3, 1e-3, 2e-3]}},
}
MADE_BY_TRIALS = ("explainers", "trial_scores", "*_answers", "ray_train", "tensorboard", "logs")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "storage": str(folder / "run")}))
    return str(path)


def rows(config: str, name: str) -> list[dict[str, Any]]:
    return storage.read_table(f"{plan_of(config).root}/sweep/{name}").to_pylist()


def free_cpus() -> float:
    import ray

    return ray.available_resources().get("CPU", 0.0)


def test_failed_and_stopped_trials_neither_end_the_sweep_nor_keep_their_cpus(
    running_ray: None, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = free_cpus()
    assert sweep.main(["--config", config]) == 1
    deadline = time.monotonic() + 10  # the CPUs of a trial that Tune killed would be free after 40 s
    while free_cpus() < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_cpus() == before == 4
    said = capsys.readouterr()
    assert "1 of 3 trials failed" in said.err and "lower the learning rate" in said.err
    found = {json.loads(row["parameters"])["weight_decay"]: row for row in rows(config, "trials")}
    assert {decay: row["status"] for decay, row in found.items()} == DECAYS
    assert [decay for decay, row in found.items() if row["chosen"]] == [0.01]
    assert 0 < found[300.0]["steps"] < found[0.01]["steps"]
    assert found[300.0]["loss"] > found[0.01]["loss"]
    assert "lower the learning rate" in found[1e38]["error"]


def test_the_report_is_of_the_best_setting_alone(config: str) -> None:
    report = json.loads(Path(plan_of(config).root, "report", "scores.json").read_text())
    trained = [made for made in report["provenance"] if made["kind"] == "explainers"]
    assert [made["config"]["weight_decay"] for made in trained] == [0.01]
    [trial] = {row["trial"] for row in rows(config, "scores")}
    [headline] = [
        row
        for row in rows(config, "scores")
        if (row["metric"], row["by"], row["control"]) == ("exact_match", "all", "none")
    ]
    wanted = {"explainer": "llama", "metric": "exact_match", "by": "all", "control": "none"}
    [in_report] = [row for row in report["scores"] if all(row[key] == value for key, value in wanted.items())]
    assert headline["value"] == in_report["value"] > 0
    assert trial.startswith("llama-of-llama-ablation-s0")


def test_tensorboard_shows_each_trial_with_its_parameters(config: str) -> None:
    files = list(Path(plan_of(config).root, "tensorboard").glob("sweep-*/*/events.out.tfevents.*"))
    assert len(files) == 3
    with_parameters = [file for file in files if b"_hparams_/session_start_info" in file.read_bytes()]
    tags = [EventAccumulator(str(file)).Reload().Tags()["scalars"] for file in with_parameters]
    assert any("ray/tune/loss" in names and "ray/tune/ablation_exact_match" in names for names in tags)
    assert any(b"weight_decay" in file.read_bytes() for file in with_parameters)


def test_started_again_it_runs_only_what_has_not_ended(
    running_ray: None, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object) -> None:
        raise AssertionError("a sweep that has ended started trials")

    monkeypatch.setattr("ray_explain.distributed.sweep._run", again)
    assert sweep.main(["--config", config, "sweep.parameters.weight_decay=[0.01,300.0]"]) == 0
    assert {row["status"] for row in rows(config, "trials")} == {"done", "stopped"}


@pytest.mark.long
def test_a_sweep_stopped_by_hand_and_then_killed_runs_only_what_is_missing_and_ends_with_the_same_scores(
    running_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First before any trial is done, then after. Each time a training has a checkpoint, from which it goes on."""
    root, whole, config = tmp_path / "run", tmp_path / "whole", str(tmp_path / "sweep.yaml")
    Path(config).write_text(yaml.safe_dump({**OF_THREE_RATES, "storage": str(root)}))

    def has_a_checkpoint() -> bool:
        return any(root.glob("ray_train/*/checkpoint_manager_*.json"))  # Ray Train's own

    stopped = interrupt("sweep", config, when=has_a_checkpoint, by=signal.SIGINT)
    assert stopped.code == 130 and STOPPED in stopped.said and "Sweep: 3 of 3 trials to do" in stopped.said
    assert not made_at(root, "trial_scores")
    shutil.copytree(root, whole, ignore=shutil.ignore_patterns(*MADE_BY_TRIALS))
    killed = interrupt("sweep", config, when=lambda: made_at(root, "trial_scores") and has_a_checkpoint())
    assert "Sweep: 3 of 3 trials to do" in killed.said
    before, left = made_at(root, "explainers", "trial_scores"), 3 - len(made_at(root, "trial_scores"))
    assert 1 <= left <= 2
    assert sweep.main(["--config", config]) == 0
    assert f"Sweep: {left} of 3 trials to do" in capsys.readouterr().out
    assert before.items() <= made_at(root, "explainers", "trial_scores").items()
    resumed = [json.loads(path.read_text())["measured"]["resumed_at"] for path in made_at(root, "explainers")]
    assert len(resumed) == 3 and any(resumed)
    assert sweep.main(["--config", config, f"storage={whole}"]) == 0
    found, undisturbed = (scores_below(each) for each in (root, whole))
    assert found == undisturbed
    assert any(row["value"] for row in found if row["metric"] == "exact_match")


def made_at(root: Path, *kinds: str) -> dict[Path, int]:
    """When each artifact of these kinds was finished."""
    return {path: path.stat().st_mtime_ns for kind in kinds for path in root.glob(f"{kind}/*/{MANIFEST}")}


def scores_below(root: Path) -> list[dict[str, Any]]:
    return storage.read_table(f"{root}/sweep/scores").to_pylist()
