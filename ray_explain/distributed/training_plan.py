"""What training the explainers of an experiment would take, said before anything is started."""

import math
from typing import Any, NamedTuple

import psutil
import pyarrow.compute as pc
import torch
from rich.table import Table

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import TrainConfig
from ray_explain.distributed.experiment import Session, model_config
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.training_setup import micro_batches
from ray_explain.explainer.memory import Footprint, Peak, footprint, peak

_GIB = 2**30
_SAFETY = 0.9  # of a device's memory: the rest is fragments, libraries and what others hold


class Work(NamedTuple):
    """One explainer's training in numbers."""

    made: Footprint
    questions: int
    steps: int
    rows: int  # of a forward pass
    known: bool  # whether the questions are there to be counted


def plan_training(session: Session) -> None:
    """Parameters, steps, and the peak of each worker's memory by ZeRO stage; starts nothing and writes nothing.

    Memory is that of the longest examples that `train.max_tokens` allows.

    Raises:
        BadInput: a model's config cannot be read.
    """
    device, has = _device()
    for run in session.plan.runs():
        train, done = session.plan.train_config(run), work_of(session.plan, run)
        about = "" if done.known else ", at most"
        session.say(
            f"\n{run.name}: {done.made.n_parameters:,} parameters, {done.made.n_trained:,} trained in "
            f"{train.precision}; {done.questions:,} questions{about} x {train.epochs} epochs = {done.steps:,} steps of "
            f"{train.batch_size}, {done.rows} at once on each of {train.workers} workers, up to {train.max_tokens} "
            "tokens each"
        )
        session.console.print(_table(train, done.made, device, has))


def work_of(plan: Plan, run: Run) -> Work:
    """What a run takes, from configs alone; questions are counted where they are there already."""
    train = plan.train_config(run)
    passes = micro_batches(train, train.workers)
    rows = math.ceil(train.batch_size / passes)
    made = footprint(
        model_config(plan, run.explainer),
        dtype=train.precision,
        lora_rank=train.lora.rank if train.lora else None,
        gradient_checkpointing=train.gradient_checkpointing,
        rows=rows,
        tokens=train.max_tokens,
        answer_tokens=min(plan.experiment.evaluate.max_new_tokens, train.max_tokens),
    )
    counts = [_questions(plan, run, task) for task in run.tasks]
    weighted = sum(
        count * train.weights.get(task, 1.0) + count * train.replay for task, (count, _) in zip(run.tasks, counts)
    )
    steps = train.epochs * math.ceil(weighted / train.batch_size)
    return Work(made, sum(count for count, _ in counts), steps, rows, all(known for _, known in counts))


def _questions(plan: Plan, run: Run, task: Any) -> tuple[int, bool]:
    """Questions of the training split, and whether they were counted or are only what the config asks for."""
    questions = plan.questions(task, run.target)
    if finished(questions, plan.root) is not None:
        split = storage.read_table(plan.path(questions), ["split"]).column("split")
        return pc.sum(pc.equal(split, "train")).as_py() or 0, True
    section = getattr(plan.experiment.ground_truth, task)
    if task != "features":
        return section.cases.train, False
    n_layers = len(section.layers)
    if section.layers == "all":
        n_layers = model_config(plan, run.target).get_text_config().num_hidden_layers
    return n_layers * (section.per_layer or section.d_sae), False


def _device() -> tuple[str, list[int]]:
    """What a worker would run on, and the bytes of each such device of this machine."""
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return every[0].name, [one.total_memory for one in every]
    return "the memory of this machine (no GPU is here)", [psutil.virtual_memory().total]


def _table(train: TrainConfig, made: Footprint, device: str, has: list[int]) -> Table:
    table = Table(title=f"peak of each worker, GiB, and whether it fits {len(has)} x {device}", title_justify="left")
    names = ("ZeRO", "weights", "optimizer", "activations", "gradients", "buffers", "peak", "on the host", "fits")
    for name in names:
        table.add_column(name, justify="right")
    for stage in (0, 1, 2, 3):
        found = peak(made, zero_stage=stage, workers=train.workers, offload=train.offload)
        parts = [found.weights, found.optimizer, found.activations, found.gradients, found.buffers, found.total]
        here = f"{stage} <" if stage == train.zero_stage else f"{stage}  "
        table.add_row(here, *(f"{part / _GIB:.2f}" for part in [*parts, found.offloaded]), _fits(found, train, has))
    return table


def _fits(found: Peak, train: TrainConfig, has: list[int]) -> str:
    if torch.cuda.is_available():
        return "yes" if found.total <= _SAFETY * min(has) else "no"
    return "yes" if (found.total + found.offloaded) * train.workers <= _SAFETY * has[0] else "no"
