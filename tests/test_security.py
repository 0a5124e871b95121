"""Nothing that lies in storage or comes from the hub can run code, and no value becomes part of a shell command."""

import ast
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("ray_explain/**/*.py"), *ROOT.glob("jobs/*.py")])
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# What each of these must be told, since its default opens pickles or runs code of the hub.
TOLD = {
    "torch.load": {"weights_only": True},
    "np.load": {"allow_pickle": False},
    "AutoModelForCausalLM.from_pretrained": {"use_safetensors": True, "trust_remote_code": False},
    "AutoTokenizer.from_pretrained": {"trust_remote_code": False},
    "AutoConfig.from_pretrained": {"trust_remote_code": False},
}
FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load"}


def faults(tree: ast.AST) -> Iterator[str]:
    """What a file does that it must not."""
    spread = {  # of names bound to a dictionary in this file: its constant values, as in `f(**same)`
        node.target.id if isinstance(node, ast.AnnAssign) else node.targets[0].id: constants(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and isinstance(node.value, ast.Dict)
        and isinstance(node.target if isinstance(node, ast.AnnAssign) else node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                given |= spread.get(ast.unparse(keyword.value), {})
            elif isinstance(keyword.value, ast.Constant):
                given[keyword.arg] = keyword.value.value
        if name in FORBIDDEN or name.split(".")[0] in UNPICKLERS:
            yield f"line {node.lineno}: {name}"
        for argument, value in TOLD.get(name, {}).items():
            if given.get(argument) is not value:
                yield f"line {node.lineno}: {name} without {argument}={value}"
        if given.get("shell") or given.get("trust_remote_code"):
            yield f"line {node.lineno}: {name} with {given}"


def constants(node: ast.Dict) -> dict[str, Any]:
    return {
        key.value: value.value
        for key, value in zip(node.keys, node.values)
        if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
    }


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_pickle_is_opened_and_no_shell_is_started(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(file)",
        "np.load(path)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "eval(text)",
    ],
)
def test_what_is_looked_for_is_found(line: str) -> None:
    assert list(faults(ast.parse(line)))


class Harm:
    """A pickle that runs a command when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.ray
def test_a_planted_checkpoint_runs_nothing_in_a_training_worker(tmp_path: Path) -> None:
    """DeepSpeed itself opens its files with `weights_only=False`; the import is what every worker does first."""
    torch.save({"step": 1, "harm": Harm(tmp_path / "harmed")}, tmp_path / "mp_rank_00_model_states.pt")
    code = (
        "import sys; from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine\n"
        "TorchCheckpointEngine().load(sys.argv[1])"
    )

    def opened(code: str) -> str:
        command = [sys.executable, "-c", code, str(tmp_path / "mp_rank_00_model_states.pt")]
        unset = {name: value for name, value in os.environ.items() if "WEIGHTS_ONLY" not in name}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=unset, cwd=ROOT).stderr

    assert "Weights only load failed" in opened(f"import ray_explain.distributed; {code}")
    assert not (tmp_path / "harmed").exists()
    opened(code)
    assert (tmp_path / "harmed").exists(), "the plant was harmless, the test shows nothing"


def made(target: str, folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """A target of the Makefile, with stand-ins for the environment's programs that note their arguments in `said`."""
    (folder / "bin").mkdir(exist_ok=True)
    for program in ("ray", "python", "tensorboard"):
        stand_in = folder / "bin" / program
        noted = f'printf "%s\\n" "$(basename $0)" "$RAY_AUTH_MODE" "$@" >> {folder}/said-$(basename $0)'
        # the real one stays, and what runs beside it has time to start
        until = f'[ -z "$CLUSTER" ] || [ -s {folder}/said-ray ] || [ $i = 100 ]'
        stays = f"i=0; until {until}; do sleep 0.1; i=$((i+1)); done" if program == "tensorboard" else ":"
        stand_in.write_text(f"#!/bin/sh\n{noted}\n{stays}\necho $(basename $0) complains >&2\n")
        stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)
    command = ["make", "-s", "--old-file=setup", target, f"VENV={folder}", *given]
    environment = os.environ | {"HOME": str(folder)}
    return subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, env=environment)


def makes(target: str, folder: Path, *given: str, program: str = "ray") -> list[str]:
    """The arguments of the programs of this name that a target starts."""
    for said in folder.glob("said-*"):
        said.unlink()
    made(target, folder, *given)
    return (folder / f"said-{program}").read_text().splitlines()


@pytest.mark.parametrize(
    "text",
    [
        "a; touch harmed",
        "$$(touch harmed)",
        "`touch harmed`",
        "'; touch harmed; '",
        "a && touch harmed",
        '"; touch harmed; "',
    ],
)
def test_what_a_user_gives_to_make_reaches_the_program_as_it_is(text: str, tmp_path: Path) -> None:
    said = makes("submit", tmp_path, f"JOB={text}", f"CONFIG={text}")
    given, text = text, text.replace("$$", "$")  # so make spells a dollar
    assert said[-4:] == ["python", text, "--config", text]
    assert makes("demo", tmp_path, f"CONFIG={given}", program="python")[-2:] == ["--config", text]
    assert makes("chaos", tmp_path, f"SEEDS={given}", program="python")[-len(text.split()) :] == text.split()
    numbers = [f"{name}={given}" for name in ("CPUS", "DASHBOARD_PORT", "OBJECT_STORE")]
    start = makes("cluster-up", tmp_path, *numbers)
    assert {f"--num-cpus={text}", f"--dashboard-port={text}", f"--object-store-memory={text}"} <= set(start)
    shown = makes("dashboard", tmp_path, f"RUN={given}", f"DASHBOARD_PORT={given}", program="tensorboard")
    assert shown[2:4] == ["--logdir", f"{text}/tensorboard"]
    if "$" not in text:  # a file name with one is for `make` a variable
        assert makes("cluster-down", tmp_path, f"CLUSTER={text}")[-3:] == ["down", "--yes", text]
        assert makes("dashboard", tmp_path, f"CLUSTER={text}")[-4:] == ["dashboard", "--port", "8265", text]
    assert not (ROOT / "harmed").exists()


def test_what_tensorboard_complains_of_is_seen(tmp_path: Path) -> None:
    """Such as of a port that is in use."""
    assert "tensorboard complains" in made("dashboard", tmp_path).stderr


def test_a_cluster_of_make_asks_for_the_token_and_has_its_dashboard_on_loopback(tmp_path: Path) -> None:
    said = makes("cluster-up", tmp_path)
    start = said[said.index("start") - 2 :]
    assert start[:2] == ["ray", "token"]
    assert "--dashboard-host=127.0.0.1" in start


ON_LOOPBACK = """
import ray  # before us, as in a notebook
import sys, psutil
from ray_explain.config import ClusterConfig
from ray_explain.distributed.cluster import cluster
with cluster(sys.argv[1], ClusterConfig()):
    ray.get(ray.remote(lambda: 1).remote())
    for process in psutil.Process().children(recursive=True):
        for one in process.net_connections():
            if one.status == psutil.CONN_LISTEN:
                print(process.name(), one.laddr.ip)
"""


@pytest.mark.ray
@pytest.mark.parametrize("there", [False, True])
def test_a_jobs_own_ray_listens_on_loopback_alone_and_its_token_is_for_its_user(tmp_path: Path, there: bool) -> None:
    token = tmp_path / ".ray" / "auth_token"
    if there:  # as Ray writes it
        token.parent.mkdir()
        token.write_text("0" * 64)
        token.chmod(0o644)
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, "-c", ON_LOOPBACK, str(tmp_path)],
        cwd=ROOT,
        env=outside | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    listening = [line.split()[-1] for line in ended.stdout.splitlines()]
    assert len(listening) > 3 and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}, ended.stdout
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == "0" * 64 or not there


def test_the_manifests_for_kubernetes_share_one_environment_and_open_nothing() -> None:
    [cluster] = yaml.safe_load_all((ROOT / "deploy/kuberay/raycluster.yaml").read_text())
    [job] = yaml.safe_load_all((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
    head, [workers] = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    containers = [group["template"]["spec"]["containers"][0] for group in (head, workers)]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert containers[0]["env"] == containers[1]["env"] and containers[0]["image"] == containers[1]["image"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["num-gpus"] == "0"
    assert workers["minReplicas"] == 0 and "nvidia.com/gpu" in containers[1]["resources"]["limits"]
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert job["spec"]["entrypoint"].startswith("python jobs/pipeline.py --config")
    assert re.search(rf"ray\[.*\]=={cluster['spec']['rayVersion']}", (ROOT / "pyproject.toml").read_text())
