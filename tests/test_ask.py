"""`jobs/ask.py` finds what was trained, and ends badly with a sentence. Its answers: evaluation/test_receipts.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import ask
from ray_explain.ask import _kind_of_spans
from ray_explain.config import read_experiment
from tests.test_launch import ROOT, write_config

QUESTION = ("--prompt", "the instrument is . hint : guitar . answer :", "--hint", "hint : guitar .")


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a relative path of a submitted job is below."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    return tmp_path / "ray_explain"


def test_a_submitted_job_looks_where_the_pipeline_wrote(
    submitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(
        tmp_path, "anywhere", storage="runs/x", ground_truth={"ablation": {"cases": {"train": 8, "test": 4}}}
    )
    assert ask.main(["--config", config, *QUESTION, "train.mixtures=[[ablation]]"]) == 2
    assert f"is not trained yet below {submitted}/runs/x" in capsys.readouterr().err


def test_so_does_one_that_names_the_folder(submitted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask.main(["--explainer", "runs/x/explainers/one", *QUESTION]) == 2
    assert f"{submitted}/runs/x/explainers/one" in capsys.readouterr().err


def test_an_error_of_the_program_is_a_sentence_and_its_details_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("the GPU fell off")

    monkeypatch.setattr("ray_explain.ask._known", failing)
    assert ask.main(["--explainer", str(tmp_path), *QUESTION]) == 1
    said, details = capsys.readouterr().err.splitlines()
    assert said == "failed: RuntimeError: the GPU fell off"
    log = Path(details.removeprefix("(details in ").removesuffix(")"))
    assert "in failing" in log.read_text()
    log.unlink()


def test_a_stop_by_hand_is_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ray_explain.ask._known", stopped)
    assert ask.main(["--explainer", str(tmp_path), *QUESTION]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


def test_a_mistake_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs import ask; "
        f"code = ask.main(['--config', {str(tmp_path / 'none.yaml')!r}, '--hint', 'x', '--prompt', 'x']); "
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules]); sys.exit(code)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ
    )
    assert ended.returncode == 2 and "cannot read the config" in ended.stderr
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize("source, kind", [("world", "hint"), ("mmlu", "hint"), ("jsonl", "span")])
def test_a_span_is_asked_about_as_the_experiments_questions_are(tmp_path: Path, source: str, kind: str) -> None:
    (tmp_path / "own.jsonl").write_text("")
    place = {} if source == "world" else {"path": f"{tmp_path}/own.jsonl"}
    ablation = {"cases": {"train": 8, "test": 4}, "source": source, **place}
    config = write_config(tmp_path, "anywhere", storage="runs/x", ground_truth={"ablation": ablation})
    assert _kind_of_spans(read_experiment(config, ["train.mixtures=[[ablation]]"])) == kind
    assert _kind_of_spans(None) == "hint"
