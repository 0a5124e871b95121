"""What each worker of an explainer's training does: Ray Train has made the process group, DeepSpeed does the steps."""

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray.train
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.artifacts import finish
from ray_explain.config import TrainConfig
from ray_explain.distributed.progress import Teller
from ray_explain.distributed.train import TrainRun
from ray_explain.distributed.zero import engine_of, whole_state, zero_config
from ray_explain.errors import BadInput, JobFailed
from ray_explain.evaluation.answering import questions_of
from ray_explain.explainer.batches import Step, answer_tokens, collate, training_steps
from ray_explain.explainer.examples import TEXT_TASK, Example, Question, Refused, encode
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers, make_room, markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import learning_rate_factor, parameter_groups, with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.sidecar import save_explainer, sidecar_of
from ray_explain.explainer.training import LossNotFinite, check_finite
from ray_explain.ground_truth.splits import training_rows
from ray_explain.models import load_model
from ray_explain.questions import wordings

CURVE = "training.jsonl"  # in the explainer's folder: one line every few steps
_STEPS_PER_LINE = 10
_TAG = "engine"  # of DeepSpeed's part of a checkpoint


def train_on_worker(run: TrainRun, root: str, board: Any) -> None:
    """What every worker does: the same steps in the same order, each with its share of every step's examples."""
    started, train, context = time.monotonic(), run.train, ray.train.get_context()
    torch.manual_seed(run.seed)
    with storage.local_folder(run.model["model"]) as folder:
        loaded = load_model(folder, revision=run.model["revision"], dtype=train.precision)
    markers = markers_of(loaded.tokenizer)
    examples, dropped = examples_of(run, loaded.tokenizer, markers)
    explainer = new_explainer(run, loaded.model, loaded.tokenizer, markers, examples)
    micro_batches = _micro_batches(train, context.get_world_size())
    steps = training_steps(
        [len(example.input_ids) for example in examples],
        [example.task for example in examples],
        epochs=train.epochs,
        batch_size=train.batch_size,
        micro_batches=micro_batches,
        seed=run.seed,
        weights={str(task): weight for task, weight in train.weights.items()},
    )
    accumulation = micro_batches // context.get_world_size()
    optimizer = torch.optim.AdamW(
        parameter_groups(explainer, weight_decay=train.weight_decay), lr=train.learning_rate, fused=True
    )
    engine = engine_of(
        explainer, optimizer, zero_config(train, max(1, train.batch_size // micro_batches), accumulation)
    )
    watch = _Watch(board, run, root, len(steps), first=context.get_world_rank() == 0)
    _train_steps(engine, examples, steps, train, loaded.pad_id, watch)
    _save(engine, run, root, loaded.tokenizer, watch, len(examples), dropped, time.monotonic() - started)
    watch.close()


def examples_of(
    run: TrainRun, tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> tuple[list[Example], dict[str, int]]:
    """The questions of the training split and the replayed texts as tokens, and why others were left out.

    Raises:
        BadInput: no question is left.
    """
    questions = [
        question
        for folder in run.questions
        for question in questions_of(training_rows(storage.read_table(folder), run.fraction))
    ]
    none = questions[0].vectors[:0] if questions else None
    texts = [Question(f"text {i}", TEXT_TASK, p, a, none, ()) for i, (p, a) in enumerate(run.replay)]  # type: ignore[arg-type]
    examples, dropped = [], Counter[str]()
    for question in questions + texts:
        try:
            examples.append(encode(question, tokenizer, markers, max_tokens=run.train.max_tokens))
        except Refused as refusal:
            dropped[refusal.reason] += 1
    if not any(example.task != TEXT_TASK for example in examples):
        raise BadInput(f"{run.artifact.label}: no question of the training split can be learned ({dict(dropped)})")
    return examples, dict(dropped)


def new_explainer(
    run: TrainRun, model: Any, tokenizer: PreTrainedTokenizerBase, markers: Markers, examples: Sequence[Example]
) -> Explainer:
    train = run.train
    make_room(model, tokenizer)
    model.requires_grad_(train.lora is None)
    if train.lora is not None:
        model = with_lora(model, **train.lora.model_dump(), seed=run.seed)
    layers = sorted({layer for example in examples for layer in example.layers})
    d_target = next(example.vectors.shape[1] for example in examples)
    d_explainer = model.config.get_text_config().hidden_size
    kind = "linear" if d_target != d_explainer else train.injection.projection
    injection = InjectionConfig(**train.injection.model_dump(exclude={"projection"}))
    explainer = Explainer(
        model,
        markers,
        Projection(kind, d_target, d_explainer, layers, seed=run.seed),
        injection,
        train_markers=train.lora is not None,
    )
    if train.gradient_checkpointing:
        explainer.checkpoint_gradients()
    return explainer


def _micro_batches(train: TrainConfig, workers: int) -> int:
    """Forward passes of a step over all workers: a whole number on each."""
    share = max(1, train.batch_size // workers)
    return workers * -(-share // (train.micro_batch_size or share))


def _train_steps(
    engine: Any, examples: Sequence[Example], steps: Sequence[Step], train: TrainConfig, pad_id: int, watch: "_Watch"
) -> None:
    """All steps after those of the last checkpoint.

    Raises:
        JobFailed: a loss is not finite; the message names the questions.
    """
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    engine.train()
    for number in range(_resume(engine), len(steps)):
        rate = train.learning_rate * learning_rate_factor(
            number, len(steps), schedule=train.schedule, warmup=train.warmup
        )
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        step = steps[number]
        # DeepSpeed averages over workers and accumulated passes; the step's loss is a sum over its micro-batches.
        share = answer_tokens([examples[i] for part in step for i in part]) / len(step)
        sums = torch.zeros(3)
        for part in step[rank::world]:
            batch = collate([examples[i] for i in part], pad_id).to(engine.device)
            outcome = engine(batch, n_answer_tokens=share)
            _check_finite(outcome, [examples[i].question_id for i in part])
            engine.backward(outcome.loss)
            engine.step()
            sums += torch.stack([outcome.nll, outcome.n_right, outcome.n_tokens]).float().cpu()
        watch.step(number + 1, sums, rate)
        if (number + 1) % train.checkpoint_every == 0 and number + 1 < len(steps):
            _report_checkpoint(engine, number + 1)


def _check_finite(outcome: Any, question_ids: Sequence[str]) -> None:
    try:
        check_finite(outcome, question_ids)
    except LossNotFinite as error:
        raise JobFailed(str(error)) from error


def _report_checkpoint(engine: Any, step: int) -> None:
    """Every worker adds its share; Ray puts them together and takes the checkpoint up once it is whole."""
    with tempfile.TemporaryDirectory() as folder:
        engine.save_checkpoint(folder, tag=_TAG, client_state={"step": step}, exclude_frozen_parameters=True)
        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def _resume(engine: Any) -> int:
    """Steps that the last checkpoint has behind it; 0 where there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        _, state = engine.load_checkpoint(folder, tag=_TAG, load_module_strict=False)
    return state["step"]


def _save(
    engine: Any,
    run: TrainRun,
    root: str,
    tokenizer: PreTrainedTokenizerBase,
    watch: "_Watch",
    n_examples: int,
    dropped: dict[str, int],
    seconds: float,
) -> None:
    """The explainer's folder and, last, its manifest; written by the first worker, the others give it their shares."""
    state = whole_state(engine.module, run.train.zero_stage)
    if watch.first:
        sidecar = sidecar_of(
            engine.module,
            tokenizer,
            target=run.target["name"],
            target_revision=run.target["revision"],
            base=run.model["model"],
            base_revision=run.model["revision"],
            wordings={run.wording: wordings.version(run.wording)},
        )
        with storage.new_folder(run.artifact.path(root)) as folder:
            save_explainer(engine.module, folder, sidecar, tokenizer, state_dict=state)
            shutil.copy(watch.curve, Path(folder) / CURVE)
        finish(
            run.artifact,
            root,
            rows=n_examples,
            dropped=dropped,
            seconds=seconds,
            measured={"workers": ray.train.get_context().get_world_size(), **watch.last},
        )
    torch.distributed.barrier()


class _Watch:
    """What the first worker tells of the training: a live line, a curve in JSON lines, and TensorBoard."""

    def __init__(self, board: Any, run: TrainRun, root: str, n_steps: int, *, first: bool) -> None:
        self.first, self.n_steps, self.last = first, n_steps, dict[str, float]()
        self._tell = Teller(board if first else None, f"train {run.artifact.label}")
        self._started, self._sums = time.monotonic(), torch.zeros(3)
        if first:
            self._folder = tempfile.TemporaryDirectory()
            self.curve = f"{self._folder.name}/{CURVE}"
            self._board = None if storage.is_remote(root) else SummaryWriter(f"{root}/tensorboard/{run.name}")

    def step(self, step: int, sums: Float[Tensor, "3"], rate: float) -> None:
        """Called by every worker after each step with its own share: NLL, right answer tokens, answer tokens."""
        self._sums += sums
        if step % _STEPS_PER_LINE and step != self.n_steps:
            return
        latest, whole = sums.clone(), self._sums.clone()
        torch.distributed.all_reduce(latest)
        torch.distributed.all_reduce(whole)
        if self.first:
            self._tell_all(step, latest.tolist(), whole[2].item(), rate)

    def _tell_all(self, step: int, latest: list[float], n_tokens: float, rate: float) -> None:
        loss, accuracy = latest[0] / latest[2], latest[1] / latest[2]
        speed = n_tokens / (time.monotonic() - self._started)
        self.last = {"steps": step, "loss": loss, "accuracy": accuracy, "answer_tokens_per_second": round(speed, 1)}
        self._tell(step, self.n_steps, f"loss {loss:.3f}, right {accuracy:.2f}")
        with open(self.curve, "a", encoding="utf-8") as file:
            file.write(json.dumps({**self.last, "learning_rate": rate}) + "\n")
        if self._board is not None:
            for name, value in {**self.last, "learning_rate": rate}.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Flush what is still in memory."""
        if self.first:
            self._folder.cleanup()
            if self._board is not None:
                self._board.close()
