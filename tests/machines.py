"""`make cluster-up`, a job, the loss of a machine and `make cluster-down`, on three machines that are namespaces.

Run it as root in namespaces of its own, which takes everything away with it:
`unshare --net --mount --pid --fork --kill-child --mount-proc python -m tests.machines FOLDER`.
"""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from ray_explain.artifacts import finished
from tests.object_store import BUCKET, Server, environment
from tests.tiny import config_in, plan_of

ROOT = Path(__file__).resolve().parent.parent
HOME = "/mnt"  # of root on each machine; empty there, while /root may hold the Python that runs this
GATEWAY, *MACHINES = ("10.77.0.1", "10.77.0.10", "10.77.0.11", "10.77.0.12")
BIN = Path(sys.prefix) / "bin"
LONGEST = 600.0


def sh(command: str, **more: Any) -> None:
    subprocess.run(["bash", "-ec", command], check=True, **more)


def connect() -> None:
    """A bridge here, and a network namespace for each machine."""
    sh(f"""
    mount -t tmpfs none /run; mkdir -p /run/netns /run/sshd
    ip link set lo up; ip link add br0 type bridge; ip addr add {GATEWAY}/24 dev br0; ip link set br0 up
    for i in 0 1 2; do
        ip netns add n$i; ip link add v$i type veth peer name eth0 netns n$i; ip link set v$i master br0 up
        ip -n n$i addr add 10.77.0.1$i/24 dev eth0; ip -n n$i link set lo up; ip -n n$i link set eth0 up
        ip -n n$i route add default via {GATEWAY}
    done""")


class Machine:
    """A network, its own processes, an own home and folder for Ray, and sshd."""

    def __init__(self, number: int, folder: Path, server: Server) -> None:
        given = environment(server.port) | {"AWS_ENDPOINT_URL": f"http://{GATEWAY}:{server.port}"}
        given |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        config = folder / f"sshd-{number}"
        config.write_text(
            f"Port 22\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPidFile none\n"
            f"UsePAM no\nSubsystem sftp internal-sftp\nSetEnv {' '.join(f'{k}={v}' for k, v in given.items())}\n"
        )
        script = f"""
        hostname machine{number}; mount -t tmpfs none {HOME}; mkdir -p /tmp/ray; mount -t tmpfs none /tmp/ray
        sed 's#:/root:#:{HOME}:#' /etc/passwd > {HOME}/passwd; mount --bind {HOME}/passwd /etc/passwd
        echo 'export PATH={BIN}:$PATH' > {HOME}/.bashrc
        exec /usr/sbin/sshd -D -e -f {config}"""
        apart = "unshare --mount --pid --uts --fork --kill-child --mount-proc bash -ec"
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", f"n{number}", *apart.split(), script],
            stderr=(folder / f"sshd-{number}.log").open("wb"),
        )

    def lose(self) -> None:
        """All its processes at once; its address answers no more."""
        self.process.kill()
        self.process.wait()


def cluster_file(folder: Path) -> str:
    start = (
        "ulimit -n 65536; RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 {more} ray start --object-store-memory=80000000"
    )
    # The newer autoscaler counts a head on one's own premises as a worker, and starts one too few (Ray 2.60).
    head = start.format(more="RAY_enable_autoscaler_v2=0") + (
        " --head --num-cpus=1 --port=6379 --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    config = {
        "cluster_name": "machines",
        "provider": {"type": "local", "head_ip": MACHINES[0], "worker_ips": list(MACHINES[1:])},
        "auth": {"ssh_user": "root", "ssh_private_key": str(folder / "key")},
        "min_workers": 2,
        "max_workers": 2,
        "idle_timeout_minutes": 10,
        "file_mounts": {"~/.ray/auth_token": "~/.ray/auth_token"},
        "head_start_ray_commands": ["ray stop", head],
        "worker_start_ray_commands": ["ray stop", start.format(more="") + " --num-cpus=2 --address=$RAY_HEAD_IP:6379"],
    }
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def make(target: str, *given: str) -> None:
    """Of the project's Makefile, with the environment that this runs in."""
    command = ["make", "--no-print-directory", "--old-file=setup", target, f"VENV={sys.prefix}", *given]
    subprocess.run(command, cwd=ROOT, check=True, timeout=LONGEST)


def wait(until: Any, what: str) -> None:
    deadline = time.monotonic() + LONGEST / 3
    while not until():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def n_nodes(cluster: str) -> int:
    command = ["make", "-s", "--old-file=setup", "cluster-status", f"VENV={sys.prefix}", f"CLUSTER={cluster}"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    active = asked.stdout.split("Pending:")[0]
    return sum(map(int, re.findall(r"^ (\d+) \S+$", active, re.MULTILINE)))


def main(folder: Path) -> None:
    """Raises: AssertionError, CalledProcessError: something did not go as it should."""
    os.environ.pop("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", None)  # of the tests' own Ray, which is this machine's alone
    os.environ.update(HOME=str(folder), RAY_AUTH_MODE="token", PYTHONPATH=str(ROOT))
    connect()
    sh("ssh-keygen -q -t ed25519 -N '' -f key; ssh-keygen -q -t ed25519 -N '' -f host", cwd=folder)
    server = Server(folder / "server.log", host="0.0.0.0")
    machines = [Machine(number, folder, server) for number in range(3)]
    os.environ.update(environment(server.port))
    cluster = cluster_file(folder)
    make("cluster-up", f"CLUSTER={cluster}")
    assert _ray_runs(machines[0])
    wait(lambda: n_nodes(cluster) == 3, "not all three nodes came")
    print("three nodes", flush=True)
    tunnel = subprocess.Popen([str(BIN / "ray"), "dashboard", cluster], stdout=subprocess.DEVNULL)
    config = config_in(folder, storage=f"s3://{BUCKET}/tiny")
    plan = plan_of(config)
    effects = plan.path(plan.effects("patching", "llama")).removeprefix("s3://")
    wait(lambda: b"HTTP" in _dashboard(), "the dashboard cannot be reached")
    lost = threading.Thread(target=lambda: _lose_at_work(server, effects, machines[1]), daemon=True)
    lost.start()
    make("submit", "JOB=jobs/ground_truth.py", f"CONFIG={config}")
    lost.join(timeout=1)
    assert machines[1].process.poll() is not None, "the job ended before the machine could be lost"
    for task in plan.experiment.tasks:
        cases, made = (finished(of(task, "llama"), plan.root) for of in (plan.cases, plan.effects))
        assert cases is not None and made is not None
        if task != "features":
            assert made.rows + sum(made.dropped.values()) == cases.rows
    tunnel.kill()
    make("cluster-down", f"CLUSTER={cluster}")
    wait(lambda: not any(_ray_runs(machine) for machine in machines[::2]), "Ray runs on after cluster-down")
    print("done", flush=True)
    server.stop()


def _dashboard() -> bytes:
    asked = subprocess.run(["curl", "-si", "http://127.0.0.1:8265/api/version"], capture_output=True, check=False)
    return asked.stdout


def _lose_at_work(server: Server, effects: str, machine: Machine) -> None:
    while not [name for name in server.names() if name.startswith(effects)]:
        time.sleep(0.1)
    machine.lose()
    print("a machine is lost", flush=True)


def _ray_runs(machine: Machine) -> bool:
    inside = psutil.Process(machine.process.pid).children(recursive=True)
    return any(process.name() == "raylet" for process in inside)  # `ray down` gives up on the head's GCS too early


if __name__ == "__main__":
    main(Path(sys.argv[1]))
