"""What training the explainers of an experiment would take, said before anything is started."""

import math
from typing import NamedTuple

import psutil
import pyarrow.compute as pc
import torch
from rich.table import Table

from ray_explain import storage
from ray_explain.artifacts import finished
from ray_explain.config import FeaturesConfig, Task, TrainConfig
from ray_explain.distributed.models import d_model, model_config, n_layers
from ray_explain.distributed.plan import Plan, Run
from ray_explain.distributed.session import Session
from ray_explain.distributed.training_setup import micro_batches, projection_kind
from ray_explain.explainer.batches import n_steps
from ray_explain.explainer.examples import TEXT_TASK
from ray_explain.explainer.markers import N_MARKERS
from ray_explain.explainer.memory import Footprint, Peak, footprint, peak
from ray_explain.ground_truth.splits import training_rows

_GIB = 2**30
_SAFETY = 0.9  # of a device's memory: the rest is fragments, libraries and what others hold


class Work(NamedTuple):
    """One explainer's training in numbers."""

    made: Footprint
    questions: int | None  # None where all features are asked about that something holds which was not read yet
    steps: int | None
    rows: int  # of a forward pass
    known: bool  # whether the questions are there to be counted


def plan_training(session: Session) -> None:
    """Parameters, steps, and the peak of each worker's memory by ZeRO stage; starts nothing and writes nothing.

    Memory is that of the longest examples that `train.max_tokens` allows.

    Raises:
        BadInput: a model's config cannot be read.
    """
    machine = _machine()
    for run in session.plan.runs():
        train, done = session.plan.train_config(run), work_of(session.plan, run)
        session.say(
            f"\n{run.name}: {done.made.n_parameters:,} parameters, {done.made.n_trained:,} trained in "
            f"{train.precision}; {_length(done, train.epochs)} of {train.batch_size}, {done.rows} at once on each of "
            f"{train.workers} workers, up to {train.max_tokens} tokens each"
        )
        gpus = session.plan.experiment.cluster.gpus_per_worker
        session.console.print(_table(train, done.made, gpus, machine))


def _length(done: Work, epochs: int) -> str:
    if done.questions is None:
        every = "all features there are, `per_layer` is not given"
        return f"an unknown number of questions ({every}) x {epochs} epochs, steps"
    about = "" if done.known else ", at most"
    return f"{done.questions:,} questions{about} x {epochs} epochs = {done.steps:,} steps"


def work_of(plan: Plan, run: Run) -> Work:
    """What a run takes, from configs alone; questions are counted where they are there already."""
    train = plan.train_config(run)
    passes, asked = micro_batches(train, train.workers), [_asked(plan, run, task) for task in run.tasks]
    rows = math.ceil(train.batch_size / passes)
    made = footprint(
        model_config(plan, run.explainer),
        dtype=train.precision,
        lora_rank=train.lora.rank if train.lora else None,
        n_beside=_beside(plan, run, len(set().union(*(one.layers for one in asked)))),
        gradient_checkpointing=train.gradient_checkpointing,
        rows=rows,
        tokens=train.max_tokens,
        answer_tokens=min(plan.experiment.evaluate.max_new_tokens, train.max_tokens),
    )
    known = all(one.known for one in asked)
    counts = {str(task): one.n for task, one in zip(run.tasks, asked) if one.n is not None}
    if len(counts) < len(run.tasks):
        return Work(made, None, None, rows, known)
    questions = sum(counts.values())
    steps = n_steps(
        counts | {TEXT_TASK: round(questions * train.replay)},
        {str(task): weight for task, weight in train.weights.items()},
        epochs=train.epochs,
        batch_size=train.batch_size,
    )
    return Work(made, questions, steps, rows, known)


def _beside(plan: Plan, run: Run, n_layers_read: int) -> int:
    """Numbers trained beside the model: the projection from so many layers and, with adapters, the markers."""
    train, d_target, d_explainer = plan.train_config(run), d_model(plan, run.target), d_model(plan, run.explainer)
    is_linear = projection_kind(train, d_target, d_explainer, n_layers_read) == "linear"
    return is_linear * n_layers_read * d_target * d_explainer + (train.lora is not None) * N_MARKERS * d_explainer


class _Asked(NamedTuple):
    """The questions of one task that a run is trained on."""

    n: int | None  # None where nothing says it yet
    layers: set[int]  # that their vectors belong to
    known: bool  # counted, and not only what the config asks for


def _asked(plan: Plan, run: Run, task: Task) -> _Asked:
    questions = plan.questions(task, run.target)
    if finished(questions, plan.root) is not None:
        every = storage.read_table(plan.path(questions), ["split", "group", "layers"])
        rows = training_rows(every, run.fraction)
        return _Asked(rows.num_rows, set(pc.unique(pc.list_flatten(every["layers"])).to_pylist()), True)
    section, layers = getattr(plan.experiment.ground_truth, task), _layers(plan, run, task)
    each, parts = (_per_layer(section), len(layers)) if task == "features" else (section.cases.train, 1)
    return _Asked(None if each is None else max(1, round(run.fraction * parts * each)), layers, False)


def _per_layer(section: FeaturesConfig) -> int | None:
    """Features of a layer; None where all are taken that a published SAE, the target's MLP or released data have."""
    if section.per_layer is not None or section.source != "sae" or section.sae is not None:
        return section.per_layer
    return section.d_sae


def _layers(plan: Plan, run: Run, task: Task) -> set[int]:
    """Those of the target that the config asks for vectors of."""
    if task == "ablation":
        return set()
    section = getattr(plan.experiment.ground_truth, task)
    asked = section.layers if task == "features" else section.blocks
    if isinstance(asked, str | int):  # all of them, or as many blocks as to hold them all
        return set(range(n_layers(plan, run.target)))
    return set(asked) if task == "features" else {at for first, last in asked for at in range(first, last + 1)}


class Machine(NamedTuple):
    """What there is here, in bytes."""

    gpus: list[int]  # memory of each
    gpu: str  # their name
    memory: int

    def __str__(self) -> str:
        return f"{len(self.gpus)} x {self.gpu}" if self.gpus else "no GPU"


def _machine() -> Machine:
    every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    name = every[0].name if every else ""
    return Machine([one.total_memory for one in every], name, psutil.virtual_memory().total)


def _table(train: TrainConfig, made: Footprint, gpus_per_worker: float, machine: Machine) -> Table:
    here = machine if gpus_per_worker else f"{machine.memory / _GIB:.0f} GiB of memory"
    title = f"peak of each worker, GiB, and whether {train.workers} of them fit this machine: {here}"
    table = Table(title=title, title_justify="left")
    names = ("ZeRO", "weights", "optimizer", "activations", "gradients", "buffers", "peak", "on the host", "fits")
    for name in names:
        table.add_column(name, justify="right")
    for stage in (0, 1, 2, 3):
        found = peak(made, zero_stage=stage, workers=train.workers, offload=train.offload)
        parts = [found.weights, found.optimizer, found.activations, found.gradients, found.buffers, found.total]
        mark = f"{stage} <" if stage == train.zero_stage else f"{stage}  "
        fit = fits(found, train.workers, gpus_per_worker, machine)
        table.add_row(mark, *(f"{part / _GIB:.2f}" for part in [*parts, found.offloaded]), fit)
    return table


def fits(found: Peak, workers: int, gpus_per_worker: float, machine: Machine) -> str:
    """ "yes", or "no" and of what there is too little on this machine.

    A worker has its GPU to itself unless other trainings share it.
    """
    most = _SAFETY * machine.memory
    if not gpus_per_worker:
        return "yes" if (found.total + found.offloaded) * workers <= most else "no: memory"
    if len(machine.gpus) < workers:
        return f"no: {workers} x GPU"
    if found.total > _SAFETY * min(machine.gpus):
        return "no: GPU memory"
    return "yes" if found.offloaded * workers <= most else "no: host memory"
