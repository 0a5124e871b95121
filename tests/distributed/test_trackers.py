"""Trackers that nobody asks for are not imported; those that are missing are told with the command that helps."""

import importlib.util
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ray_explain.distributed.trackers import check_trackers, open_trackers
from ray_explain.errors import BadInput


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_tracker_is_told_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_trackers([], "runs/demo")
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None)
    with pytest.raises(BadInput, match=rf"pip install 'ray_explain\[{name}\]'"):
        check_trackers([name], "runs/demo")


def test_trackers_are_imported_only_when_asked_for() -> None:
    code = "import sys, ray_explain.distributed.watching; print({'mlflow', 'wandb'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("name", "variable", "value", "way_out"),
    [
        ("mlflow", "MLFLOW_TRACKING_URI", None, "set MLFLOW_TRACKING_URI to a server"),
        ("wandb", "WANDB_MODE", "offline", "leave WANDB_MODE=offline out"),
    ],
)
def test_runs_that_would_be_lost_with_a_worker_are_refused(
    name: str, variable: str, value: str | None, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: asked)
    monkeypatch.delenv(variable, raising=False)
    if value:
        monkeypatch.setenv(variable, value)
    check_trackers([name], "runs/demo")
    with pytest.raises(BadInput, match=way_out):
        check_trackers([name], "s3://bucket/demo")
    monkeypatch.setenv(variable, "http://127.0.0.1:5000" if name == "mlflow" else "online")
    check_trackers([name], "s3://bucket/demo")


def test_mlflow_goes_on_with_the_run_of_a_training_that_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name, steps, workers in [("a run", [10, 20], 1), ("another", [10], 1), ("a run", [20, 30], 2)]:
        [tracker] = open_trackers(["mlflow"], "ray_explain", name, {"workers": workers}, str(tmp_path / "storage"))
        for step in steps:
            tracker.log({"loss": 1 / step}, step)
        tracker.close()
    assert (tmp_path / "storage" / "mlflow.db").exists()
    runs = {
        run.info.run_name: run for run in mlflow.search_runs(experiment_names=["ray_explain"], output_format="list")
    }
    assert runs.keys() == {"a run", "another"} and runs["a run"].data.params == {"workers": "1"}
    history = mlflow.MlflowClient().get_metric_history(runs["a run"].info.run_id, "loss")
    assert {(metric.step, metric.value) for metric in history} == {(step, 1 / step) for step in (10, 20, 30)}
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
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    for name, workers in [("a run", 1), ("another", 1), ("a run", 2)]:
        open_trackers(["mlflow"], "ray_explain", name, {"workers": workers}, "runs/demo")
    assert fake.begun == ["run 0", "run 1", "run 0"]
    assert fake.runs["run 0"].params == [{"workers": "1"}]


def test_wandb_gets_every_number_and_the_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    [tracker] = open_trackers(["wandb"], "ray_explain", "a-run", {"epochs": 3}, str(tmp_path / "storage"))
    for step in (10, 20):
        tracker.log({"loss": 2.5 / step}, step)
    tracker.close()
    [file] = tmp_path.glob("storage/wandb/offline-run-*/run-a-run.wandb")
    told = records_of(file)
    assert [(row["_step"], row["loss"]) for row in told["history"]] == [(10, 0.25), (20, 0.125)]
    assert told["config"]["epochs"] == 3 and told["run"] == ("ray_explain", "a-run")


def records_of(file: Path) -> dict[str, Any]:
    """What an offline run keeps for the day it is sent: one block of LevelDB log, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at = file.read_bytes(), 7  # the file's head
    told: dict[str, Any] = {"history": [], "config": {}}
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        assert kind == 1, "the record goes on in another block"
        record = Record.FromString(content[at + 7 : at + 7 + length])
        at += 7 + length
        if record.HasField("history"):
            items = record.history.item
            told["history"].append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif record.HasField("run"):
            told["run"] = (record.run.project, record.run.display_name)
            told["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return told
