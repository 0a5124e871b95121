"""Jobs submitted to a running cluster, which `make cluster-up` starts: on loopback, behind a token."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

import psutil
import pytest
import yaml

from ray_explain.artifacts import MANIFEST
from ray_explain.distributed.upload import pack
from tests.end_to_end.test_sweep import SWEEP
from tests.test_ask import QUESTION

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
TINY: dict[str, Any] = {key: value for key, value in SWEEP.items() if key != "sweep"}

JOINS = """
import ray, sys
from ray_explain.config import ClusterConfig
from ray_explain.distributed.cluster import cluster
with cluster(sys.argv[1], ClusterConfig()):
    print(ray.nodes()[0]["NodeManagerAddress"], ray.get(ray.remote(lambda: "joined").remote()))
"""


class Head(NamedTuple):
    """A running head node, and a user's shell: the environment's programs are not on its PATH."""

    home: Path
    files: str  # the folder of its Ray
    address: str
    url: str
    environment: dict[str, str]

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray words...`, as a user of this cluster would type it."""
        return subprocess.run(
            [str(BIN / "ray"), *words],
            env=self.environment | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    def submit(
        self, *entrypoint: str, options: tuple[str, ...] = (), code: str = "."
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- entrypoint...`"""
        return self.ray("job", "submit", "--address", self.url, "--working-dir", code, *options, "--", *entrypoint)

    def get(self, path: str, *, token: bool = True) -> Any:
        """JSON that the dashboard answers."""
        headers = {"Authorization": f"Bearer {self.token}"} if token else {}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            return json.loads(answer.read())

    @property
    def token(self) -> str:
        """What the dashboard asks for."""
        return (self.home / ".ray" / "auth_token").read_text().strip()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    port, dashboard = _free_ports(2)
    # What the tests' own Ray was told, a user's shell does not know.
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
    shell |= {"HOME": str(home)}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:  # sockets have short names
        made = Head(home, short, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", shell)
        given = [f"PORT={port}", f"DASHBOARD_PORT={dashboard}", "CPUS=4", "OBJECT_STORE=200000000"]
        try:
            subprocess.run(
                ["make", "--old-file=setup", "cluster-up", f"VENV={BIN.parent}", *given],
                env=made.environment | {"RAY_TMPDIR": short},
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            _wait_for_jobs(made)
            yield made
        finally:
            for process in _of_cluster(short):  # `make cluster-down` would end every Ray of this user
                process.kill()


def _of_cluster(folder: str) -> list[psutil.Process]:
    """Processes of the Ray that keeps its files in `folder`: they name it, or have its logs open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            held = [*process.cmdline(), *(file.path for file in process.open_files())]
            if any(folder in each for each in held) and process.pid != os.getpid():
                found.append(process)
    return found


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_for_jobs(head: Head) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        try:
            head.get("/api/jobs/")
            return
        except OSError:
            time.sleep(1)
    raise AssertionError("the head node did not come up")


def config_in(folder: Path, **changes: Any) -> str:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | {"storage": "runs/tiny"} | changes))
    return str(path)


def test_the_pipeline_runs_as_a_submitted_job_and_others_go_on_from_what_it_left(head: Head, tmp_path: Path) -> None:
    ended = head.submit("python", "jobs/pipeline.py", "--config", config_in(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    root = head.home / "ray_explain" / "runs" / "tiny"  # a relative path would be thrown away with the upload
    assert f"storage: {root}" in ended.stdout
    assert (root / "report" / "index.html").exists()
    assert [made for made in root.glob("explainers/*") if (made / MANIFEST).exists()]
    [run] = head.get("/api/train/v2/runs/v1")["train_runs"]  # the Train page of the dashboard
    assert run["name"].startswith("llama-of-llama-ablation-s0") and run["status"] == "FINISHED"
    pack(ROOT, tmp_path / "code.zip")  # as `make submit` sends it
    question = ("python", "jobs/ask.py", "--config", config_in(tmp_path), *QUESTION)
    asked = head.submit(*question, code=str(tmp_path / "code.zip"))
    assert asked.returncode == 0 and "verdict" in asked.stdout, asked.stdout + asked.stderr
    (root / "report" / "index.html").unlink()
    given = ("--config", config_in(tmp_path))
    others = {"report": given, "export": given, "evaluate": (*given, "evaluate.resamples=200")}
    with ThreadPoolExecutor() as threads:
        ends = list(threads.map(lambda job: head.submit("python", f"jobs/{job}.py", *others[job]), others))
    assert [end.returncode for end in ends] == [0, 0, 0], "".join(end.stdout + end.stderr for end in ends)
    assert (root / "report" / "index.html").exists()
    assert "ablation of llama: not written: the released ablation schema holds MMLU questions" in ends[1].stdout
    assert len(list(root.glob(f"scores/*/{MANIFEST}"))) == 2


def test_every_port_of_the_cluster_is_on_loopback(head: Head) -> None:
    listening = [
        (process.name(), one.laddr.ip.removeprefix("::ffff:"))
        for process in _of_cluster(head.files)
        for one in process.net_connections()
        if one.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5 and {ip for _, ip in listening} == {"127.0.0.1"}, listening


def test_what_is_started_here_joins_the_cluster_of_its_address(head: Head, tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-c", JOINS, str(tmp_path)],
        env=head.environment | {"RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "token"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.split() == ["127.0.0.1", "joined"]


def test_the_dashboard_asks_for_the_token(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.get("/api/jobs/", token=False)


def test_exit_code_and_last_error_reach_the_submitter(head: Head, tmp_path: Path) -> None:
    ended = head.submit("python", "jobs/sweep.py", "--config", config_in(tmp_path), "train.learning_rat=1")
    assert ended.returncode == 1
    told = ended.stdout + ended.stderr
    assert "no such key; the nearest is `learning_rate`" in told and "exit code 2" in told


def test_a_stopped_job_leaves_whole_artifacts(head: Head, tmp_path: Path) -> None:
    root = tmp_path / "stopped"
    entrypoint = ("python", "jobs/pipeline.py", "--config", config_in(tmp_path, storage=str(root)))
    assert head.submit(*entrypoint, options=("--no-wait", "--submission-id", "stopped")).returncode == 0
    deadline = time.monotonic() + 240
    while not list(root.glob("ablation_cases/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert head.ray("job", "stop", "--address", head.url, "stopped").returncode == 0
    assert head.get("/api/jobs/stopped")["status"] == "STOPPED"
    assert "go on" in head.ray("job", "logs", "--address", head.url, "stopped").stdout.replace("goes on", "go on")
    manifests = [json.loads(path.read_text()) for path in root.glob("*/*/manifest.json")]
    assert {"models", "ablation_cases"} <= {made["kind"] for made in manifests}
    assert not [made for made in manifests if made["kind"] == "scores"]
    assert not list(root.rglob("*.draft"))


def test_the_upload_stays_below_a_megabyte(tmp_path: Path) -> None:
    from ray._private.runtime_env import packaging

    plain, packed = tmp_path / "plain.zip", tmp_path / "packed.zip"
    packaging.create_package(str(ROOT), plain, include_gitignore=True, include_parent_dir=False, excludes=[])
    pack(ROOT, packed)
    assert packed.stat().st_size < 1_000_000
    with ZipFile(plain) as one, ZipFile(packed) as other:
        sent = {Path(name) for name in one.namelist() if not name.endswith("/")} - {
            Path(".gitignore"),
            Path(".rayignore"),
        }
        assert {path.parts[0] for path in sent} == {"ray_explain", "jobs"}
        assert {path.suffix for path in sent} == {".py", ".yaml", ".j2", ".css", ".js"}
        assert {name: one.read(name) for name in one.namelist()} == {
            name: other.read(name) for name in other.namelist()
        }
