"""A short `make chaos`: ground truth on several nodes and S3, while parts of them go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parent.parent.parent


def test_killed_actors_nodes_and_drivers_and_a_paused_storage_change_no_table(config: str) -> None:
    """In a process of its own: a Ray of several nodes would meet the session's."""
    kinds = ["actor", "node", "driver", "storage"]
    command = [sys.executable, "-m", "tests.chaos", "--seeds", "1", "--job", "ground_truth", "--undisturbed", config]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    ended = subprocess.run(
        [*command, "--kinds", *kinds], cwd=ROOT, env=outside, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "seed 1: the same tables" in ended.stdout
    for told in ("actor killed", "node with", "driver", "storage stands still"):
        assert told in ended.stdout
