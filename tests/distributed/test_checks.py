"""What cannot work is said before any work, with the way out."""

import os
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ray_explain.config import ClusterConfig, read_experiment
from ray_explain.distributed import checks
from ray_explain.distributed.cluster import cluster
from ray_explain.distributed.experiment import Session
from ray_explain.distributed.plan import Plan
from ray_explain.errors import BadInput
from tests.serving import serving
from tests.test_launch import write_config

DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "127.0.0.1", "127.0.0.1:99999"])
def test_no_cluster_at_the_address_is_said_within_seconds(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(BadInput, match=r"(?s)RAY_ADDRESS = .*make cluster-up"), cluster(str(tmp_path)):
        pass
    assert time.monotonic() - started < 30


def test_an_address_where_something_else_answers_is_said_too(forbidden: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(BadInput, match="is no Ray cluster"):
        checks.check_address(os.environ["AWS_ENDPOINT_URL"].removeprefix("http://"))
    assert time.monotonic() - started < 30


def test_a_node_with_another_version_of_the_package_is_named() -> None:
    own = checks.code_here()
    checks.check_codes(own, {"head 1": own, "worker 2": own})
    with pytest.raises(BadInput, match=r"node worker 2 .*working-dir"):
        checks.check_codes(own, {"head 1": own, "worker 2": "Python 3.11.7, code 0123456789ab"})


def test_the_version_is_told_by_what_the_files_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        (tmp_path / "__init__.py").write_text(text)
        monkeypatch.setattr("ray_explain.__file__", str(tmp_path / "__init__.py"))
        checks.code_here.cache_clear()
        told.append(checks.code_here())
    checks.code_here.cache_clear()
    assert told[0] == told[2] != told[1]


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that speaks S3 and allows nothing."""

    class Refuses(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(DENIED)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(DENIED)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "known-to-nobody")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with serving(server):
        yield


def test_a_bucket_without_permission_is_said_before_any_work(
    forbidden: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_explain.distributed.pipeline  # noqa: F401 - its libraries take their time on a busy machine
    from jobs import ground_truth

    monkeypatch.chdir(tmp_path)
    config, started = write_config(tmp_path, tmp_path, storage="s3://closed/run"), time.monotonic()
    assert ground_truth.main(["--config", config]) == 2
    said = capsys.readouterr().err
    assert "s3://closed/run" in said and "credentials" in said and "known-to-nobody" not in said
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("error", "words"), [("ObjectStoreFullError", "--object-store-memory"), ("OutOfDiskError", "disk")]
)
def test_a_full_store_is_told_with_what_to_do(
    error: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.exceptions

    from jobs import pretrain

    def full(_: object) -> None:
        raise getattr(ray.exceptions, error)("no room")

    monkeypatch.setattr("ray_explain.distributed.pipeline.make_models", full)
    assert pretrain.main(["--config", write_config(tmp_path, tmp_path)]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize("key", ["gpus_per_actor", "gpus_per_worker"])
def test_gpus_are_refused_where_there_are_none(running_ray: None, key: str) -> None:
    with pytest.raises(BadInput, match=rf"`cluster.{key}` = 1, but the cluster has 0 GPUs.*set it to 0"):
        checks.check_gpus(ClusterConfig.model_validate({key: 1}))
    checks.check_gpus(ClusterConfig())


@pytest.mark.ray
def test_an_actor_sees_the_gpus_that_it_asked_for_and_no_others(running_ray: None) -> None:
    import ray

    look = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(look.options(num_gpus=0).remote()) == ""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("gpus", "asked", "told"), [(2.0, {}, True), (0.0, {}, False), (2.0, {"gpus_per_worker": 1}, False)]
)
def test_who_has_gpus_and_uses_none_is_told_so_once(
    running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, asked: dict[str, float], told: bool
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": gpus})
    plan = Plan(read_experiment(write_config(tmp_path, tmp_path, cluster=asked)))
    with Session(plan, console=Console(record=True, width=200)) as session:
        session.start_ray()
        session.start_ray()
    assert session.console.export_text().count("The cluster has 2 GPUs, and this experiment uses none") == told
