"""A sweep on tiny models: one setting that learns, one that is stopped, and two that cannot work."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jobs import sweep
from ray_explain import storage
from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from tests.tiny import EXPERIMENT

pytestmark = pytest.mark.ray

SWEEP: dict[str, Any] = {
    **EXPERIMENT,
    "explainers": ["llama"],
    "ground_truth": {"wording": "brief", "ablation": {"cases": {"train": 120, "test": 30}}},
    "train": {"mixtures": [["ablation"]], "batch_size": 4, "epochs": 4, "max_failures": 0},
    "sweep": {
        "parameters": {"learning_rate": [3e-3, 1e-8], "max_tokens": [100, 2]},
        "asha": {"grace": 0.2, "reduction": 2},
    },
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sweep")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "storage": str(folder / "run")}))
    return str(path)


def rows(config: str, name: str) -> list[dict[str, Any]]:
    return storage.read_table(f"{Plan(read_experiment(config)).root}/sweep/{name}").to_pylist()


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
    assert "2 of 4 trials failed" in said.err and "no question of the training split" in said.err
    found = {
        (json.loads(row["parameters"])["learning_rate"], json.loads(row["parameters"])["max_tokens"]): row
        for row in rows(config, "trials")
    }
    assert {key: row["status"] for key, row in found.items()} == {
        (3e-3, 100): "done",
        (3e-3, 2): "failed",
        (1e-8, 100): "stopped",
        (1e-8, 2): "failed",
    }
    assert [key for key, row in found.items() if row["chosen"]] == [(3e-3, 100)]
    assert 0 < found[1e-8, 100]["steps"] < found[3e-3, 100]["steps"]
    assert found[1e-8, 100]["loss"] > found[3e-3, 100]["loss"]
    assert "no question" in found[3e-3, 2]["error"]


def test_the_report_is_of_the_best_setting_alone(config: str) -> None:
    report = json.loads(Path(Plan(read_experiment(config)).root, "report", "scores.json").read_text())
    trained = [made for made in report["provenance"] if made["kind"] == "explainers"]
    assert [made["config"]["learning_rate"] for made in trained] == [3e-3]
    [trial] = {row["trial"] for row in rows(config, "scores")}
    [headline] = [
        row
        for row in rows(config, "scores")
        if (row["metric"], row["by"], row["control"]) == ("exact_match", "all", "none")
    ]
    wanted = {"explainer": "llama", "metric": "exact_match", "by": "all", "control": "none"}
    [in_report] = [row for row in report["scores"] if all(row[key] == value for key, value in wanted.items())]
    assert headline["value"] == in_report["value"]
    assert trial.startswith("llama-of-llama-ablation-s0")


def test_tensorboard_shows_each_trial_with_its_parameters(config: str) -> None:
    files = list(Path(Plan(read_experiment(config)).root, "tensorboard").glob("sweep-*/*/events.out.tfevents.*"))
    assert len(files) == 4
    with_parameters = [file for file in files if b"_hparams_/session_start_info" in file.read_bytes()]
    tags = [EventAccumulator(str(file)).Reload().Tags()["scalars"] for file in with_parameters]
    assert any("ray/tune/loss" in names and "ray/tune/ablation_exact_match" in names for names in tags)
    assert any(b"learning_rate" in file.read_bytes() for file in with_parameters)


def test_started_again_it_runs_only_what_has_not_ended(
    running_ray: None, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*_: object) -> None:
        raise AssertionError("a sweep that has ended started trials")

    monkeypatch.setattr("ray_explain.distributed.sweep._run", again)
    assert sweep.main(["--config", config, "sweep.parameters.max_tokens=[100]"]) == 0
    assert {row["status"] for row in rows(config, "trials")} == {"done", "stopped"}
