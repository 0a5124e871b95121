"""Every job ends badly with one clear sentence, the right exit code, and what was made before still whole."""

import errno
import importlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from transformers import AutoTokenizer

from jobs import ground_truth, pretrain, train
from ray_explain import storage
from ray_explain.config import read_experiment
from ray_explain.launch import log_folder, placed

ROOT = Path(__file__).resolve().parent.parent


def write_config(folder: Path, target: Path | str, **changes: Any) -> str:
    path = folder / "bad.yaml"
    experiment: dict[str, Any] = {
        "name": "bad",
        "storage": str(folder / "run"),
        "models": {"target": {"path": str(target)}},
        "targets": ["target"],
        "explainers": ["target"],
        "ground_truth": {"patching": {"cases": {"train": 8, "test": 4}, "blocks": 2}},
    }
    path.write_text(yaml.safe_dump(experiment | changes))
    return str(path)


def test_a_mistake_in_the_config_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    config = write_config(tmp_path, "anywhere")
    code = (
        "import sys; from jobs import pipeline; "
        f"code = pipeline.main(['--config', {config!r}, 'train.learning_rat=1']); "
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no such key; the nearest is `learning_rate`" in ended.stderr
    assert ended.stdout.strip() == "[]"
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read the config" in capsys.readouterr().err


def test_an_explainer_whose_tokenizer_has_no_end_token_is_told_before_anything_is_measured(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world_target, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    config = write_config(tmp_path, tmp_path / "model")
    assert train.main(["--config", config]) == 2
    assert "`models.target`: the tokenizer of " in (said := capsys.readouterr().err) and "has no end token" in said
    assert not list((tmp_path / "run").glob("*/*/manifest.json"))


def test_a_target_without_weights_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    assert ground_truth.main(["--config", write_config(tmp_path, tmp_path / "model")]) == 2
    assert "no *.safetensors weights" in capsys.readouterr().err


def test_a_target_that_is_nowhere_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ground_truth.main(["--config", write_config(tmp_path, tmp_path / "nowhere")]) == 2
    assert "`models.target.path`" in capsys.readouterr().err


def test_of_a_relative_path_that_is_nowhere_is_said_where_it_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ground_truth.main(["--config", write_config(tmp_path, "models/llama/nowhere")]) == 2
    assert f"there is no folder {tmp_path}/models/llama/nowhere, and as a hub id: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"source": "released", "path": "data/{target}"}, "`ground_truth.patching.path`: there is no folder /"),
        ({"source": "released", "path": "s3://bucket/x"}, "there is no folder s3://bucket/x; released data are read"),
        ({"source": "counterfact", "path": "s3://bucket/x.json"}, "x.json: it is not on this machine's disk"),
    ],
)
def test_cases_that_are_nowhere_are_bad_input(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str], section: dict[str, Any], said: str
) -> None:
    patching = {**section, "cases": {"train": 8, "test": 4}}
    config = write_config(tmp_path, world_target, ground_truth={"patching": patching})
    assert ground_truth.main(["--config", config]) == 2
    assert said in capsys.readouterr().err


def test_a_target_without_a_tokenizer_is_bad_input(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in shutil.copytree(world_target, tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    assert ground_truth.main(["--config", write_config(tmp_path, tmp_path / "model")]) == 2
    told = capsys.readouterr().err
    assert "`models.target.path`" in told and "has no tokenizer: save it there" in told


@pytest.mark.parametrize("key", ["describer", "simulator", "detector"])
def test_a_model_that_is_to_describe_features_is_looked_for_before_anything_is_made(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    kind = "simulator" if key == "simulator" else "local"
    local = {"kind": "local", "path": str(world_target)}
    features = {"describer": local, key: {"kind": kind, "path": str(tmp_path / "nowhere")}}
    config = write_config(tmp_path, world_target, ground_truth={"features": features})
    assert ground_truth.main(["--config", config]) == 2
    told = capsys.readouterr().err
    assert f"`ground_truth.features.{key}.path`" in told and "there is no folder" in told
    assert not list((tmp_path / "run").glob("*/*/manifest.json"))


def test_a_layer_that_the_model_does_not_have_is_bad_input(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, world_target)
    assert ground_truth.main(["--config", config, "ground_truth.patching.blocks=[[0, 1], [2, 3]]"]) == 2
    assert "[2, 3] is no block of 'target', which has 2 layers" in capsys.readouterr().err


def test_more_cases_than_the_world_has_are_bad_input(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, world_target)
    assert ground_truth.main(["--config", config, "ground_truth.patching.cases.test=1000000"]) == 2
    assert "ground_truth.patching" in capsys.readouterr().err


def test_an_empty_split_is_bad_input(tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And it says what was dropped on the way."""
    lines = [
        {"prompt": "question : hint : beer . answer :", "span": [11, 24], "split": "train"},
        {"prompt": "question : hint : beer . answer :", "span": [11, 99], "split": "test"},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    section = {"source": "jsonl", "path": str(tmp_path / "own.jsonl"), "cases": {"train": 8, "test": 4}}
    config = write_config(tmp_path, world_target, ground_truth={"ablation": section}, cluster={"max_dropped": 1.0})
    assert ground_truth.main(["--config", config]) == 2
    told = capsys.readouterr().err
    assert told.startswith("bad input: `ground_truth.ablation`: split 'test' is empty (1 dropped: ")


def test_a_full_disk_fails_the_job_and_leaves_earlier_artifacts_whole(
    tmp_path: Path, world_target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = f"{tmp_path}/run/patching_cases/earlier/table.parquet"
    storage.write_table(pa.table({"a": [1]}), earlier)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.pq.ParquetWriter, "write_table", full)
    assert ground_truth.main(["--config", write_config(tmp_path, world_target)]) == 1
    assert "no space left on the disk" in capsys.readouterr().err
    monkeypatch.undo()
    assert storage.read_table(str(Path(earlier).parent)).to_pylist() == [{"a": 1}]
    assert list(Path(tmp_path, "run").glob("*/*/manifest.json")) == []


def test_sigterm_ends_a_job_as_a_stop_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        raise AssertionError("it was not stopped")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("ray_explain.distributed.pipeline.make_models", stopped)
    assert pretrain.main(["--config", write_config(tmp_path, tmp_path)]) == 143
    assert "start it again and it goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("given", ["runs/x", "file://runs/x"])
def test_a_relative_storage_of_a_submitted_job_is_not_thrown_away_with_its_code(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = read_experiment(write_config(tmp_path, "anywhere", storage=given))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert placed(experiment).storage == given
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert placed(experiment).storage == str(tmp_path / "ray_explain" / "runs" / "x")
    elsewhere = experiment.model_copy(update={"storage": "/data/x"})
    assert placed(elsewhere) is elsewhere


def test_logs_beside_a_bucket_are_not_thrown_away_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read_experiment(write_config(tmp_path, "anywhere", storage="s3://bucket/x"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert log_folder(experiment) == tmp_path / "ray_explain" / "runs" / "bad" / "logs"


STEPS = [
    ("pretrain", "make_models", []),
    ("ground_truth", "make_ground_truth", []),
    ("train", "train_explainers", []),
    ("train", "plan_training", ["--plan"]),
    ("evaluate", "evaluate", []),
    ("evaluate", "say_power", ["--power"]),
    ("report", "make_report", []),
    ("export", "export_ground_truth", []),
    ("pipeline", "run_pipeline", []),
    ("sweep", "run_sweep", []),
]


@pytest.mark.parametrize(("job", "step", "given"), STEPS, ids=[" ".join([job, *given]) for job, _, given in STEPS])
def test_every_job_works_below_home_when_submitted_and_ends_an_error_with_a_sentence(
    job: str,
    step: str,
    given: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roots = []

    def failing(session: Any) -> None:
        roots.append(session.plan.root)
        raise KeyError("lost")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setattr(f"ray_explain.distributed.pipeline.{step}", failing)
    main = importlib.import_module(f"jobs.{job}").main
    assert main(["--config", write_config(tmp_path, "anywhere", storage="runs/x"), *given]) == 1
    assert roots == [str(tmp_path / "ray_explain" / "runs" / "x")]
    said, details = capsys.readouterr().err.splitlines()
    assert said == "failed: KeyError: 'lost'"
    assert "in failing" in Path(details.removeprefix("(details in ").removesuffix(")")).read_text()
    assert logging.getLogger().isEnabledFor(logging.WARNING)  # no job takes the voice of what else runs in its process


def test_no_job_is_left_out() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")}
    assert jobs == {job for job, _, _ in STEPS} | {"ask"}  # ask has tests of its own
