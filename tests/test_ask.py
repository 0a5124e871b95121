"""`jobs/ask.py` finds what was trained, and ends badly with a sentence. Its answers: evaluation/test_receipts.py."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import ask
from ray_explain import records, storage
from ray_explain.artifacts import finish
from ray_explain.ask import Known, _about_vector, _feature, _kind_of_spans, _told, _Vector
from ray_explain.config import read_experiment
from ray_explain.distributed.plan import Plan
from ray_explain.errors import BadInput
from ray_explain.evaluation.receipts import Receipt
from ray_explain.storage import read_table
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


def test_one_feature_is_found_without_reading_the_vectors_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, "features", storage=str(tmp_path), ground_truth={"features": {}})
    plan = Plan(read_experiment(config))
    target, vectors = plan.experiment.targets[0], np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    ids, texts = ["a", "b", "c"], [["one"], ["two", "2"], ["three"]]
    questions = {
        "case_id": pa.array(ids),
        "answers": pa.array(texts),
        "split": pa.array(["train", "test", "train"]),
        "vectors": records.vectors_array(list(vectors), 4),
    }
    effects = {"case_id": ids[::-1], "layer": [2, 2, 1], "feature_id": [17, 5, 17]}
    for artifact, table in ((plan.questions, questions), (plan.effects, effects)):
        storage.write_table(pa.table(table), f"{plan.path(artifact('features', target))}/part.parquet")
        finish(artifact("features", target), plan.root)
    monkeypatch.setattr(storage, "read_table", lambda uri, columns: read_table(uri, columns))  # whole tables: an error
    found = _feature("2/5", Known("", target, {}, plan.experiment))
    assert (found.layer, found.case_id, list(found.right)) == (2, "b", ["two", "2"])
    assert found.vector.tolist() == [4, 5, 6, 7] and not found.learned
    assert _feature("2/17", Known("", target, {}, plan.experiment)).learned
    with pytest.raises(BadInput, match=r"no such feature of .* layer 1 has 17"):
        _feature("1/5", Known("", target, {}, plan.experiment))


@pytest.mark.parametrize("learned", [True, False])
def test_a_feature_that_the_explainer_was_trained_on_is_told_to_be_one(
    monkeypatch: pytest.MonkeyPatch, learned: bool
) -> None:
    """What confirms its answer may be memory alone."""
    receipt = Receipt("asked", "a dog", 0.9, "a dog", readable=True, confirmed=True, details=("responds",))
    monkeypatch.setattr("ray_explain.ask._tried_on_the_world", lambda *_: receipt)
    monkeypatch.setattr("ray_explain.ask._feature", lambda *_: _Vector(2, np.ones(4), ["a dog"], "c", learned))
    known = Known("", "target", {"model": "here"}, None)
    told = _told(_about_vector(Namespace(feature="2/17"), known, None, None), known)
    assert "verdict      confirmed" in told and ("a training question" in told) is learned
