"""Jobs in processes of their own, with a Ray of their own, that tests end in the middle."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
_LONGEST = 600.0  # seconds that a job may take to come so far


class Ended(NamedTuple):
    """A job that was interrupted."""

    code: int
    said: str


def interrupt(job: str, config: str, *, when: Callable[[], object], by: signal.Signals = signal.SIGKILL) -> Ended:
    """Start a job, and send the signal to all its processes as soon as `when` is true.

    Raises:
        AssertionError: it ended before, or did not come so far.
    """
    log = Path(config).with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, f"jobs/{job}.py", "--config", config],
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_sigint,
        )
    try:
        deadline = time.monotonic() + _LONGEST
        while not when() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, f"the job ended before it could be interrupted: {log.read_text()}"
        assert when(), f"the job took too long: {log.read_text()}"
        os.killpg(process.pid, by)
        return Ended(process.wait(timeout=120), log.read_text())
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _hear_sigint() -> None:
    """Also where the tests run in a shell's background, which lets its children ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
