"""What every job does before and after its one call: read the config, keep a log, and end with a sentence.

Exit codes: 0 done, 2 the input cannot be used, 1 the work failed, 130 stopped by hand, 143 stopped by SIGTERM, as
`ray job stop` sends it.
"""

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from ray_explain import storage
from ray_explain.config import Experiment, read_experiment
from ray_explain.errors import BadInput, JobFailed

logger = logging.getLogger(__name__)
STOPPED = "\nstopped; start it again and it goes on with what was finished"


def launch(step: str, what: str, argv: Sequence[str] | None = None, *, plan: str | None = None) -> int:
    """Run a step, a function of `ray_explain.distributed.pipeline`, as the command line says; returns the exit code.

    Where there is a `plan`, another such function, it runs instead of the step if the command line says `--plan`.

    Nothing heavy is imported before the config has been read, so a mistake is told at once.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--config", required=True, help="YAML file that describes the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="such as train.learning_rate=1e-4")
    if plan is not None:
        parser.add_argument("--plan", action="store_true", help="say what it would take, and start nothing")
    arguments = parser.parse_intermixed_args(argv)
    if plan is not None and arguments.plan:
        step = plan
    try:
        experiment = placed(read_experiment(arguments.config, arguments.overrides))
    except BadInput as error:
        return ended_by(error)
    log = _log_of_a_plan() if step == plan else _start_log(experiment)
    try:
        with _stopping_on_sigterm():
            steps = importlib.import_module("ray_explain.distributed.pipeline")
            with steps.Session(steps.Plan(experiment)) as session:
                getattr(steps, step)(session)
    except KeyboardInterrupt as stop:
        if isinstance(stop, _Terminated):
            return 143
        print(STOPPED, file=sys.stderr)
        return 130
    except Exception as error:  # the last place where an error can become a sentence
        logger.error("%s", "".join(traceback.format_exception(error)))
        return ended_by(error, log)
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: our Ray goes down with us, and what is half made has no manifest."""

    def stop(*_: object) -> None:
        print(STOPPED, file=sys.stderr, flush=True)  # at once: Ray kills a stopped job after three seconds
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # there Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def placed(experiment: Experiment) -> Experiment:
    """The experiment with its storage where `lasting` leads."""
    place = lasting(experiment.storage)
    if place == experiment.storage:
        return experiment
    print(f"storage: {place} (`storage` is a relative path, and a submitted job runs in a folder that is thrown away)")
    return experiment.model_copy(update={"storage": place})


def lasting(path: str) -> str:
    """Where what is written at `path` outlives the job: in a submitted one, a relative path lies below the home of the
    user who runs the cluster, since Ray unpacks the code into a folder that it throws away.
    """
    is_submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # Ray sets it for the processes of `ray job submit`
    given = Path(path.removeprefix("file://")).expanduser()
    if not is_submitted or storage.is_remote(path) or given.is_absolute():
        return path
    return str(Path.home() / "ray_explain" / given)


def log_folder(experiment: Experiment) -> Path:
    """Where this machine's logs of the experiment go: below its storage, or here when that is remote."""
    root = storage.absolute(experiment.storage)
    here = lasting(f"runs/{experiment.name}") if storage.is_remote(root) else root
    return Path(here).absolute() / "logs"


def _log_of_a_plan() -> Path:
    """There only after an error. What lies below the storage stays that of what was done, not of what might be."""
    path = storage.own_scratch() / _log_name()
    handler = logging.FileHandler(path, delay=True)
    handler.setLevel(logging.ERROR)  # not that of all logging: others in this process go on to say what they say
    _log_to(handler)
    return path


def _log_name() -> str:
    return f"{time.strftime('%Y%m%d-%H%M%S')}.log"


def _log_to(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def _start_log(experiment: Experiment) -> Path:
    """Logs go to a file, so that bars stay readable; the resolved config lies beside it."""
    folder = log_folder(experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _log_name()
        handler = logging.FileHandler(path)
        (folder.parent / "config.yaml").write_text(yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        print(f"cannot write to {folder}: {error.strerror}; set another `storage`", file=sys.stderr)
        raise SystemExit(1) from error
    _log_to(handler)
    return path


def _caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether the error is of this kind or came from one: Ray wraps what its workers raise."""
    while error is not None:
        if isinstance(error, kind) or isinstance(getattr(error, "cause", None), kind):
            return True
        error = error.__cause__
    return False


def ended_by(error: BaseException, log: Path | None = None) -> int:
    """Says in a sentence what ended a job, and where the details are; returns the exit code."""
    code = 2 if _caused_by(error, BadInput) else 1
    known = _caused_by(error, BadInput) or _caused_by(error, JobFailed)
    last_line = (str(error).strip().splitlines() or [""])[-1]
    text = _sentence(error) if known else _way_out(error) or f"{type(error).__name__}: {last_line}"
    print(f"{'bad input' if code == 2 else 'failed'}: {text}", file=sys.stderr)
    if log is not None:
        print(f"(details in {log})", file=sys.stderr)
    return code


def _way_out(error: BaseException) -> str | None:
    """What to do about an error of the cluster that has nothing to do with our work."""
    checks = sys.modules.get("ray_explain.distributed.checks")  # without it there was no cluster
    return None if checks is None else checks.way_out(error)


def _sentence(error: BaseException | None) -> str:
    while error is not None:
        for one in (error, getattr(error, "cause", None)):
            if isinstance(one, BadInput | JobFailed) and type(one).__module__ == BadInput.__module__:
                return str(one)
        if isinstance(error, BadInput | JobFailed):  # Ray's own subclass of it: the last line holds our sentence
            return str(error).strip().splitlines()[-1]
        error = error.__cause__
    return ""
