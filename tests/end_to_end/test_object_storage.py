"""The whole method with all storage on S3, on a server that fails now and then."""

from pathlib import Path

import psutil
import pytest
import ray

from jobs import pipeline
from ray_explain.artifacts import finished
from ray_explain.distributed.pipeline import all_artifacts
from tests.conftest import ObjectStore
from tests.object_store import ACCESS_KEY, BUCKET, SECRET_KEY
from tests.tiny import EXPERIMENT, config_in, plan_of, tables_of

pytestmark = [pytest.mark.ray, pytest.mark.long]
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

    monkeypatch.setattr("ray_explain.distributed.experiment.Session.start_ray", not_again)
    monkeypatch.chdir(remote[1])
    assert pipeline.main(["--config", remote[0]]) == 0
