"""Trackers that nobody asks for are not imported; those that are missing are told with the command that helps."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ray_explain.distributed.trackers import check_installed, open_trackers
from ray_explain.errors import BadInput


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_tracker_is_told_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed([])
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(BadInput, match=rf"pip install 'ray_explain\[{name}\]'"):
        check_installed([name])


def test_trackers_are_imported_only_when_asked_for() -> None:
    code = "import sys, ray_explain.distributed.watching; print({'mlflow', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "set()"


def test_mlflow_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    [tracker] = open_trackers(["mlflow"], "ray_explain", "a run", {"epochs": 3})
    tracker.log({"loss": 2.5}, 10)
    tracker.close()
    [run] = mlflow.search_runs(experiment_names=["ray_explain"], output_format="list")
    assert run.data.metrics == {"loss": 2.5} and run.data.params == {"epochs": "3"}


def test_mlflow_goes_on_with_the_run_of_a_training_that_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    for name, steps, workers in [("a run", [10, 20], 1), ("another", [10], 1), ("a run", [20, 30], 2)]:
        [tracker] = open_trackers(["mlflow"], "ray_explain", name, {"workers": workers})
        for step in steps:
            tracker.log({"loss": 1 / step}, step)
        tracker.close()
    runs = {
        run.info.run_name: run for run in mlflow.search_runs(experiment_names=["ray_explain"], output_format="list")
    }
    assert runs.keys() == {"a run", "another"} and runs["a run"].data.params == {"workers": "1"}
    history = mlflow.MlflowClient().get_metric_history(runs["a run"].info.run_id, "loss")
    assert {metric.step for metric in history} == {10, 20, 30}
    assert runs["a run"].info.status == "FINISHED"


class FakeMLflow(ModuleType):
    """As much of it as is used, where it is not installed: runs by id, each with name, tags, params."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, SimpleNamespace] = {}
        self.begun: list[str] = []

    def set_experiment(self, name: str) -> None:
        pass

    def search_runs(self, *, filter_string: str, **options: Any) -> list[SimpleNamespace]:
        assert options["experiment_names"] == ["ray_explain"] and options["output_format"] == "list"
        key, value = re.fullmatch(r"tags\.`(.*)` = '(.*)'", filter_string).groups()  # type: ignore[union-attr]
        return [run for run in self.runs.values() if run.tags.get(key) == value]

    def start_run(self, run_id: str | None = None, run_name: str = "", tags: dict[str, str] | None = None) -> None:
        if run_id is None:
            run_id = f"run {len(self.runs)}"
            self.runs[run_id] = SimpleNamespace(
                info=SimpleNamespace(run_id=run_id), name=run_name, tags=tags, params=[]
            )
        self.begun.append(run_id)

    def log_params(self, params: dict[str, str]) -> None:
        self.runs[self.begun[-1]].params.append(params)


def test_the_run_is_found_by_its_tag_and_its_parameters_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    for name, workers in [("a run", 1), ("another", 1), ("a run", 2)]:
        open_trackers(["mlflow"], "ray_explain", name, {"workers": workers})
    assert fake.begun == ["run 0", "run 1", "run 0"]
    assert fake.runs["run 0"].params == [{"workers": "1"}]


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    [tracker] = open_trackers(["wandb"], "ray_explain", "a-run", {"epochs": 3})
    tracker.log({"loss": 2.5}, 10)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
