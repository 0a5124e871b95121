"""What cannot work is said before any work, with the way out."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import numpy as np
import psutil
import pytest
from rich.console import Console

import ray_explain
from ray_explain.artifacts import Artifact, finish
from ray_explain.config import ClusterConfig, TrainConfig, read_experiment
from ray_explain.distributed import checks, sweep
from ray_explain.distributed.capacity import Fleet
from ray_explain.distributed.cluster import cluster
from ray_explain.distributed.explainers import train_explainers
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.errors import BadInput, JobFailed
from tests.distributed.training_runs import run_of
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
    with pytest.raises(BadInput, match=r"(?s)RAY_ADDRESS = .*make cluster-up"), cluster(str(tmp_path), ClusterConfig()):
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


@pytest.mark.ray
def test_a_real_node_with_another_version_of_the_package_is_named(add_node: Callable[..., Any], tmp_path: Path) -> None:
    package = Path(ray_explain.__file__).parent
    shutil.copytree(package, tmp_path / "ray_explain", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "ray_explain" / "errors.py").open("a") as file:
        file.write("# one line more\n")
    # Ray puts the driver's folder before all others in its workers, which on one machine is there for both nodes.
    (tmp_path / "sitecustomize.py").write_text("import ray_explain")
    node, started = add_node(num_cpus=1, env_vars={"PYTHONPATH": str(tmp_path)}), time.monotonic()
    with pytest.raises(BadInput, match=rf"node \S+ {node.node_id[:8]} runs another version .*{checks.code_here()}"):
        checks.check_same_code()
    assert time.monotonic() - started < 30


@pytest.mark.ray
def test_a_node_that_hangs_or_is_lost_is_named_and_nothing_else_suffers(
    add_node: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from ray_explain.distributed.halting import verdicts_here

    node = add_node(num_cpus=4)
    verdicts = [verdicts_here() for _ in range(6)]
    ray.get([one.stop.remote("a") for one in verdicts])
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    raylet.suspend()
    monkeypatch.setattr(checks, "_CODE_PATIENCE", 3)
    checks.check_same_code()
    assert f"{node.node_id[:8]} does not answer" in capsys.readouterr().err
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    checks.check_same_code()
    assert all(ray.get([one.is_stopped.remote("a") for one in verdicts], timeout=60))
    for one in verdicts:
        ray.kill(one)


def test_an_actor_that_starts_later_on_a_node_with_other_code_says_so(tmp_path: Path) -> None:
    from ray_explain.distributed.run_stages import _Worker

    batch = {"job": np.array([0]), "start": np.array([0]), "stop": np.array([1])}
    kind, sentence = _Worker([], str(tmp_path), "Python 3.11.7, code 0123456789ab")(batch)["wrong"][0]
    assert kind == "BadInput" and "code 0123456789ab" in sentence and checks.code_here() in sentence
    kind, sentence = _Worker([], str(tmp_path / "elsewhere"), checks.code_here())(batch)["wrong"][0]
    assert kind == "BadInput" and "does not see the storage" in sentence


def test_a_pretraining_on_a_node_with_other_code_says_so(tmp_path: Path) -> None:
    from ray_explain.distributed.pretrain import _pretrain

    with pytest.raises(BadInput, match=r"runs another version .* 0123456789ab"):
        _pretrain._function(Artifact(kind="models", label="m", config={}), str(tmp_path), None, "code 0123456789ab")


@pytest.mark.ray
def test_a_training_with_workers_on_a_node_with_other_code_says_so(
    running_ray: None,
    questions: tuple[str, str],
    world_target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray_explain.distributed import train
    from ray_explain.errors import JobFailed

    monkeypatch.setattr(train, "code_here", lambda: "Python 3.11.7, code 0123456789ab")
    run = run_of(TrainConfig(max_failures=0), "elsewhere", questions, world_target)
    with pytest.raises(JobFailed, match=rf"elsewhere: .*runs another version .*{checks.code_here()}.* 0123456789ab"):
        train.train_all([run], str(tmp_path), ClusterConfig())


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


@pytest.mark.parametrize("job", ["ground_truth", "ask"])
def test_an_s3_server_that_is_not_there_is_said_before_its_client_gets_patient(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray_explain.distributed.pipeline  # noqa: F401 - its libraries take their time on a busy machine
    from tests.test_ask import QUESTION

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    ablation = {"ablation": {"cases": {"train": 8, "test": 4}}}
    given = write_config(tmp_path, tmp_path, storage="s3://b/run", ground_truth=ablation)
    question = [*QUESTION, "train.mixtures=[[ablation]]"] if job == "ask" else []
    started = time.monotonic()
    assert importlib.import_module(f"jobs.{job}").main(["--config", given, *question]) == 2
    assert time.monotonic() - started < 30
    said = capsys.readouterr().err
    assert "no S3 server answers at 127.0.0.1:1" in said and "AWS_ENDPOINT_URL" in said


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "http://", "http://key:5ecret@host:port"])
def test_an_endpoint_that_is_no_address_is_told_and_not_repeated(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(BadInput, match=r"no address of a server: .*http://host:port") as refused:
        checks.check_storage("s3://b/run")
    assert "5ecret" not in str(refused.value)


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


@pytest.mark.parametrize(
    ("error", "words"), [("ObjectStoreFullError", "--object-store-memory"), ("OutOfDiskError", "disk")]
)
def test_a_worker_of_a_training_that_meets_a_full_store_says_what_to_do(
    error: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.exceptions
    from ray import cloudpickle
    from ray.train import TrainingFailedError
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from ray_explain.distributed.train import fit

    full = getattr(ray.exceptions, error)("no room")
    of_a_task = ray.exceptions.RayTaskError("read", "Traceback\nlast line", full)
    fates: list[TrainingFailedError] = [
        WorkerGroupError("[Rank 1 Error Snippet]:\nlast line", {0: KeyError("peer"), 1: full}),
        WorkerGroupError("[Rank 0 Error Snippet]:\nlast line", {0: of_a_task.as_instanceof_cause()}),
        ControllerError(of_a_task),
    ]
    run = run_of(TrainConfig(), "full", (), tmp_path)
    for fate in fates:
        monkeypatch.setattr(
            "ray.train.torch.TorchTrainer.fit", Mock(side_effect=cloudpickle.loads(cloudpickle.dumps(fate)))
        )
        failure = fit(run, str(tmp_path), ClusterConfig(), None)
        assert failure is not None and failure.startswith("Ray's object store is full") and words in failure
    other = WorkerGroupError("[Rank 0 Error Snippet]:\nlast line", {0: KeyError("lost")})
    monkeypatch.setattr("ray.train.torch.TorchTrainer.fit", Mock(side_effect=other))
    assert fit(run, str(tmp_path), ClusterConfig(), None) == "last line"


def test_a_full_store_is_said_when_a_worker_meets_it_and_not_only_when_restarts_are_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ObjectStoreFullError, RayTaskError

    from ray_explain.distributed import training_loop

    run, full = run_of(TrainConfig(), "llama", (), tmp_path), ObjectStoreFullError("no room")
    for error, is_full in ((full, True), (RayTaskError("read", "last line", full), True), (KeyError("lost"), False)):
        board = Mock()
        monkeypatch.setattr(training_loop, "_train", Mock(side_effect=error))
        with pytest.raises(type(error)):
            training_loop.train_on_worker(run, str(tmp_path), board, None, 0.0)
        said = [one.args[0] for one in board.say.remote.mock_calls]
        assert len(said) == is_full
        assert all(line.startswith("llama: Ray's object store is full: give it more") for line in said)


@pytest.mark.parametrize(("is_lost", "reason"), [(False, "its loss is not finite"), (True, "controller was lost")])
def test_a_training_that_fails_is_told_of_while_the_others_go_on(
    is_lost: bool, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ActorDiedError

    from ray_explain.distributed import train

    board, said_before_the_second = Mock(), list[Any]()

    def fit(run: Any, *_: Any) -> str | None:
        if run.artifact.label == "first":
            if is_lost:
                raise ActorDiedError()
            return "its loss is not finite"
        said_before_the_second.extend(board.say.remote.mock_calls)
        return None

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "watching", lambda: nullcontext(board))
    for name in ("fleet", "check_capacity"):
        monkeypatch.setattr(train, name, lambda *_, **__: None)
    runs = [run_of(TrainConfig(), label, (), tmp_path) for label in ("first", "second")]
    with pytest.raises(JobFailed, match=f"^first: .*{reason}") as failed:
        train.train_all(runs, str(tmp_path), ClusterConfig(concurrent_trainings=1))
    assert said_before_the_second == [call(str(failed.value).replace("first: ", "first failed: "))]


FILLS_THE_STORE = """
import sys

import numpy as np
import ray

from jobs import pretrain
from ray_explain.distributed import pipeline


def fill(_):
    given = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "log_to_driver": False}
    no_disk = {"local_fs_capacity_threshold": 1e-4}  # part of the disk, above which Ray takes it for full
    ray.init(address="local", num_cpus=1, **given, _system_config=no_disk)
    hundred_and_sixty_mb = [ray.put(np.zeros(20 * 2**20, np.uint8)) for _ in range(8)]


pipeline.make_models = fill
sys.exit(pretrain.main(sys.argv[1:]))
"""


@pytest.mark.ray
def test_a_store_that_is_really_full_ends_the_job_with_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLS_THE_STORE, "--config", write_config(tmp_path, tmp_path)]
    root = Path(ray_explain.__file__).parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "object store is full" in ended.stderr and "--object-store-memory" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.ray
@pytest.mark.parametrize("key", ["gpus_per_actor", "gpus_per_worker"])
def test_gpus_are_refused_where_there_are_none(running_ray: None, key: str) -> None:
    with pytest.raises(BadInput, match=rf"`cluster.{key}` = 1, but no node .* more than 0 GPUs: set it to 0"):
        checks.check_gpus(ClusterConfig.model_validate({key: 1}))
    checks.check_gpus(ClusterConfig())


@pytest.mark.ray
def test_gpus_that_are_missing_are_told_before_anything_is_read(running_ray: None, tmp_path: Path) -> None:
    (tmp_path / "cases.jsonl").write_text("no JSON, which reading would find\n")
    cases = {"source": "jsonl", "path": str(tmp_path / "cases.jsonl"), "cases": {"train": 8, "test": 4}, "blocks": 2}
    config = write_config(tmp_path, tmp_path, ground_truth={"patching": cases}, cluster={"gpus_per_actor": 1})
    with Session(Plan(read_experiment(config))) as session, pytest.raises(BadInput, match="more than 0 GPUs"):
        make_ground_truth(session)


@pytest.mark.ray
def test_workers_that_no_cluster_has_are_refused_when_the_cluster_starts_unless_all_is_trained(
    running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(read_experiment(write_config(tmp_path, tmp_path, train={"workers": 64, "batch_size": 64})))
    with Session(plan) as session:
        session.start_ray()  # it may measure, and train elsewhere
    monkeypatch.setattr(Plan, "explainer", lambda *_: Artifact(kind="explainers", label="one", config={}))
    with Session(plan) as session:
        session.start_early([], trains=True)
        with pytest.raises(JobFailed, match="64 workers of 1 CPU are asked for"):
            session.start_ray()
    finish(Artifact(kind="explainers", label="one", config={}), plan.root)
    with Session(plan) as session:
        session.start_early([], trains=True)
        session.start_ray()


@pytest.mark.parametrize("job", ["train", "sweep"])
def test_workers_that_one_pairing_alone_asks_for_are_refused_before_any_ground_truth(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"explainer": "target", "target": "target", "train": {"workers": 64}}
    config = write_config(tmp_path, tmp_path, train={"batch_size": 64}, pairings=[many])
    monkeypatch.setattr("ray_explain.distributed.capacity.fleet", lambda _: Fleet([{"CPU": 4.0}], [], 0))
    measured = list[None]()

    def ground_truth(session: Session) -> None:  # starts Ray first
        session._check_workers()
        measured.append(None)

    made = "explainers" if job == "train" else "sweep"
    monkeypatch.setattr(f"ray_explain.distributed.{made}.make_ground_truth", ground_truth)
    monkeypatch.setattr(Plan, "explainer", lambda *_: Artifact(kind="explainers", label="one", config={}))
    steps = {"train": train_explainers, "sweep": sweep.sweep}
    with Session(Plan(read_experiment(config))) as session, pytest.raises(JobFailed, match="64 workers of 1 CPU"):
        steps[job](session)
    assert not measured


def test_what_is_finished_needs_no_cluster_though_later_steps_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(read_experiment(write_config(tmp_path, tmp_path, cluster={"gpus_per_actor": 1})))
    made = Artifact(kind="patching_effects", label="target", config={})
    monkeypatch.setattr(Plan, "effects", lambda *_: made)
    monkeypatch.setattr("ray_explain.distributed.ground_truth.make_models", lambda _: None)
    started = list[None]()
    monkeypatch.setattr(Session, "start_ray", lambda _: started.append(None))
    for expected in (1, 0):
        started.clear()
        with Session(plan) as session, suppress(Exception):  # there is no model to go on with
            make_ground_truth(session)
        assert len(started) == expected
        finish(made, plan.root)


@pytest.mark.ray
def test_an_actor_sees_the_gpus_that_it_asked_for_and_no_others(running_ray: None) -> None:
    import ray

    look = ray.remote(lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert ray.get(look.options(num_gpus=0).remote()) == ""


@pytest.mark.ray
@pytest.mark.parametrize(("gpus", "told"), [(2.0, True), (0.0, False)])
def test_who_has_gpus_and_uses_none_is_told_so_once(
    running_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: float, told: bool
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": gpus})
    plan = Plan(read_experiment(write_config(tmp_path, tmp_path)))
    with Session(plan, console=Console(record=True, width=200)) as session:
        session.start_ray()
        session.start_ray()
    assert session.console.export_text().count("The cluster has 2 GPUs, and this experiment uses none") == told
    assert checks.unused_gpus(ClusterConfig(gpus_per_worker=1)) is None
