"""The whole method, and a sweep, with all storage on S3, on a server that fails now and then."""

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from jobs import pipeline, sweep
from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.distributed.pipeline import all_artifacts
from tests.conftest import ObjectStore
from tests.object_store import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.tiny import EXPERIMENT, config_in, plan_of, tables_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
SWEEP: dict[str, Any] = {
    **EXPERIMENT,
    "explainers": ["llama"],
    "seeds": [0, 1],
    "ground_truth": {"wording": "brief", "ablation": {"cases": {"train": 120, "validation": 40, "test": 30}}},
    "train": {
        "mixtures": [["ablation"]],
        "batch_size": 4,
        "epochs": 4,
        "workers": 2,
        "validate_every": 10,
        "checkpoint_every": 30,
    },
    "evaluate": {**EXPERIMENT["evaluate"], "max_new_tokens": 24},  # a whole answer
    "sweep": {"parameters": {"learning_rate": [3e-3, 1e-8]}, "metric": "validation_exact", "asha": {"grace": 0.3}},
}
FAULTS = {"503": 0.04, "dropped before": 0.03, "dropped after": 0.03, "cut": 0.02}


@pytest.fixture(scope="module")
def remote(object_store: ObjectStore, config: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Config and working directory of the same experiment, run on S3 while one request in eight failed."""
    folder = tmp_path_factory.mktemp("remote")
    train = EXPERIMENT["train"] | {"checkpoint_every": 2}
    path = config_in(folder, storage=f"s3://{BUCKET}/tiny", train=train)
    object_store.proxy.met.clear()
    object_store.proxy.faults.update(FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # logs of an experiment on S3 go there
        try:
            assert pipeline.main(["--config", path]) == 0
        finally:
            object_store.proxy.faults.clear()
    return path, folder


def test_failing_requests_cost_retries_and_change_no_table(
    remote: tuple[str, Path], config: str, object_store: ObjectStore
) -> None:
    met = object_store.proxy.met
    assert all(met[fault] >= 5 for fault in FAULTS), met
    assert tables_of(plan_of(remote[0])) == tables_of(plan_of(config))


def test_every_artifact_is_whole_and_nothing_else_is_left(remote: tuple[str, Path], object_store: ObjectStore) -> None:
    plan = plan_of(remote[0])
    assert all(finished(artifact, plan.root) for artifact in all_artifacts(plan))
    objects = {path.removeprefix(f"{BUCKET}/tiny/").split("/")[0] for path in object_store.server.everything()}
    assert objects == {artifact.kind for artifact in all_artifacts(plan)} | {"report", "tensorboard"}


def test_a_sweep_of_trials_with_more_workers_than_places_ends_and_is_all_on_s3(
    running_ray: None,
    object_store: ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four trials of two workers on four CPUs; the validation metric says which are stopped."""
    path, root = tmp_path / "sweep.yaml", f"s3://{BUCKET}/sweep"
    path.write_text(yaml.safe_dump(SWEEP | {"storage": root}))
    monkeypatch.chdir(tmp_path)  # logs of an experiment on S3 go there
    monkeypatch.setattr("os.cpu_count", lambda: 4)  # so that two run at a time, and take every place
    object_store.proxy.faults.update(FAULTS)
    object_store.proxy.met.clear()
    try:
        assert sweep.main(["--config", str(path)]) == 0
    finally:
        object_store.proxy.faults.clear()
    assert "Sweep: 4 of 4 trials to do, 2 at a time" in capsys.readouterr().out
    assert all(object_store.proxy.met[fault] >= 5 for fault in FAULTS), object_store.proxy.met
    trials = storage.read_table(f"{root}/sweep/trials").to_pylist()
    told = {(json.loads(row["parameters"])["learning_rate"], row["seed"]): row for row in trials}
    assert {key: row["status"] for key, row in told.items()} == {
        (3e-3, 0): "done",
        (3e-3, 1): "done",
        (1e-8, 0): "stopped",
        (1e-8, 1): "stopped",
    }
    assert all(told[1e-8, seed]["steps"] < told[3e-3, seed]["steps"] for seed in (0, 1))
    everything = object_store.server.everything()
    ends = [json.loads(content)["measured"] for name, content in everything.items() if "/stopped_trials/" in name]
    assert [end["validation_exact"] for end in ends] == [0, 0] and all(end["progress"] < 100 for end in ends)
    scored = {row["trial"] for row in storage.read_table(f"{root}/sweep/scores").to_pylist()}
    assert scored == {row["trial"] for row in trials if row["in_report"]}
    objects = [path.removeprefix(f"{BUCKET}/sweep/") for path in everything if path.startswith(f"{BUCKET}/sweep/")]
    assert {"report/index.html", "report/scores.json"} <= set(objects)
    assert not [name for name in objects if name.startswith("ray_train/")]  # of trials that were stopped, too
    of_trials = {name.split("/")[2] for name in objects if name.startswith("tensorboard/sweep-") and "tfevents" in name}
    assert of_trials == {row["trial"] for row in trials}
    assert not list(tmp_path.glob("*/sweep"))


def test_no_credential_is_written_anywhere(remote: tuple[str, Path], object_store: ObjectStore) -> None:
    """Not into objects, logs and configs, nor into Ray's own logs or a command line."""
    written = object_store.server.everything()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    folders = [remote[1], session]
    written |= {str(file): file.read_bytes() for folder in folders for file in folder.rglob("*") if file.is_file()}
    assert len([name for name in written if name.endswith("manifest.json")]) > 10
    assert len([name for name in written if "/logs/" in name]) > 10
    for key in (ACCESS_KEY, SECRET_KEY):
        assert [name for name, content in written.items() if key.encode() in content] == []
        assert not [p for p in psutil.process_iter(["cmdline"]) if key in " ".join(p.info["cmdline"] or [])]


def test_what_is_finished_on_s3_is_not_done_again(remote: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def not_again(*_: object) -> None:
        raise AssertionError("a finished experiment started Ray")

    monkeypatch.setattr("ray_explain.distributed.session.Session.start_ray", not_again)
    monkeypatch.chdir(remote[1])
    assert pipeline.main(["--config", remote[0]]) == 0
