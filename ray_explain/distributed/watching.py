"""What the first worker tells of a training: a live line, a curve in JSON lines, TensorBoard and other trackers."""

import json
import resource
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ray_explain import storage
from ray_explain.distributed.progress import Teller
from ray_explain.distributed.trackers import open_trackers
from ray_explain.distributed.train import TrainRun

CURVE = "training.jsonl"  # in the explainer's folder: one line every few steps
STEPS_PER_LINE = 10


class Watch:
    """One for each worker; that of the first one tells.

    Args:
        lines: Of the curve so far, where the training goes on from a checkpoint.
    """

    def __init__(self, board: Any, run: TrainRun, root: str, n_steps: int, *, first: bool, lines: str = "") -> None:
        self.first, self.n_steps, self.last = first, n_steps, dict[str, float]()
        self._tell = Teller(board if first else None, f"train {run.artifact.label}")
        self._since, self._n_tokens, self._note = time.monotonic(), torch.tensor(0.0), ""
        if first:
            self._folder = tempfile.TemporaryDirectory()
            self.curve = f"{self._folder.name}/{CURVE}"
            with open(self.curve, "w", encoding="utf-8") as file:
                file.write(lines)
            self._curves = f"{root}/tensorboard/{run.name}"
            self._board = SummaryWriter(f"{self._folder.name}/curves" if storage.is_remote(root) else self._curves)
            self._trackers = open_trackers(run.train.trackers, "ray_explain", run.name, run.train.model_dump(), root)

    @property
    def lines(self) -> str:
        """The curve so far; nothing on other workers."""
        if not self.first:
            return ""
        with open(self.curve, encoding="utf-8") as file:
            return file.read()

    def step(self, step: int, sums: Float[Tensor, "3"], norm: float, rate: float) -> None:
        """Called by every worker after each step with its own share: NLL, right answer tokens, answer tokens."""
        self._n_tokens = self._n_tokens + sums[2]  # a tensor: a number would wait for the GPU
        if step % STEPS_PER_LINE and step != self.n_steps:
            return
        whole, now = torch.cat([sums, self._n_tokens[None]]), time.monotonic()
        torch.distributed.all_reduce(whole)
        seconds, self._since, self._n_tokens = now - self._since, now, torch.zeros_like(self._n_tokens)
        if self.first:
            nll, n_right, n_tokens, all_tokens = whole.tolist()
            self.last = {
                "steps": step,
                "loss": nll / n_tokens,
                "accuracy": n_right / n_tokens,
                "answer_tokens_per_second": round(all_tokens / seconds, 1),  # since the last line
                "gradient_norm": norm,
                "learning_rate": rate,
                "memory_gib": _memory_gib(),
            }
            line = f"loss {self.last['loss']:.3f}, right {self.last['accuracy']:.2f}"
            self._tell(step, self.n_steps, line + self._note)
            self._write(self.last, step)

    def validation(self, step: int, measured: Mapping[str, float]) -> None:
        """What `validate` measured after this step."""
        if self.first:
            self.last |= measured
            self._note = "".join(
                f", {name.removeprefix('validation_')} {value:.2f}" for name, value in measured.items()
            )
            self._write(measured, step, validation=True)

    def _write(self, values: Mapping[str, float], step: int, *, validation: bool = False) -> None:
        with open(self.curve, "a", encoding="utf-8") as file:
            file.write(json.dumps({"steps": step, **values}) + "\n")
        for name, value in values.items():
            where = name.replace("_", "/", 1) if validation else f"train/{name}"
            self._board.add_scalar(where, value, step)
        for tracker in self._trackers:
            tracker.log({name: value for name, value in values.items() if name != "steps"}, step)

    def share(self) -> None:
        """Let TensorBoard see the curves so far; on S3, where nothing can be appended, as whole files."""
        if self.first:
            self._board.flush()
            if storage.is_remote(self._curves):
                storage.upload_folder(self._board.log_dir, self._curves)

    def close(self) -> None:
        """Flush what is still in memory."""
        if self.first:
            self.share()
            self._board.close()
            self._folder.cleanup()
            for tracker in self._trackers:
                tracker.close()


def _memory_gib() -> float:
    """The largest so far: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
