"""Trackers that nobody asks for are not imported; those that are missing are told with the command that helps."""

import importlib.util
import subprocess
import sys
from pathlib import Path

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
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    [tracker] = open_trackers(["mlflow"], "ray_explain", "a run", {"epochs": 3})
    tracker.log({"loss": 2.5}, 10)
    tracker.close()
    [run] = mlflow.search_runs(experiment_names=["ray_explain"], output_format="list")
    assert run.data.metrics == {"loss": 2.5} and run.data.params == {"epochs": "3"}


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    [tracker] = open_trackers(["wandb"], "ray_explain", "a-run", {"epochs": 3})
    tracker.log({"loss": 2.5}, 10)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
