"""`ray up` for real: three machines with sshd in namespaces, a job, the loss of a machine, and `ray down`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.machines]
ROOT = Path(__file__).resolve().parent.parent.parent
APART = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str:
    """What is missing for it here; nothing if all is there."""
    missing = [name for name in ("unshare", "ip", "ssh", "rsync", "curl", "make") if shutil.which(name) is None]
    if not Path("/usr/sbin/sshd").exists():
        missing.append("sshd")
    if missing:
        return f"not installed: {', '.join(missing)}"
    tried = subprocess.run([*APART, "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else f"namespaces are not allowed: {tried.stderr.decode().strip()}"


def test_a_job_on_machines_survives_the_loss_of_one(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    command = [*APART, sys.executable, "-m", "tests.machines", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "a machine is lost" in ended.stdout
