"""Training in plain PyTorch on one process: what every distributed run has to reproduce."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ray_explain.explainer.batches import Step, answer_tokens, collate, micro_batch, training_steps
from ray_explain.explainer.examples import Example
from ray_explain.explainer.module import Explainer, Outcome
from ray_explain.explainer.optimise import Schedule, learning_rate_factor, parameter_groups


@dataclass(frozen=True, kw_only=True)
class PlainTraining:
    """`batch_size` examples make a step, in `micro_batches` forward passes; `warmup` is a share of the steps; `weights`
    say how often a task's examples are seen in an epoch (1 unless given)."""

    epochs: int
    batch_size: int
    learning_rate: float
    micro_batches: int = 1
    schedule: Schedule = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)


class StepReport(NamedTuple):
    """Of one optimizer step (from 1). `loss` is the mean over its answer tokens, in nats, before the step."""

    step: int
    n_steps: int
    loss: float
    accuracy: float  # share of the answer tokens that were the likeliest
    n_answer_tokens: int
    gradient_norm: float  # before clipping
    learning_rate: float


class NotFinite(ArithmeticError):
    """A loss or the norm of a gradient is NaN or infinite; the message names the questions it comes from."""


def train_plain(
    explainer: Explainer,
    examples: Sequence[Example],
    config: PlainTraining,
    *,
    pad_id: int,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[float]:
    """Train in place with AdamW and gradient clipping; the losses of all steps, as in `StepReport`.

    Raises:
        NotFinite: before the weights are touched by it.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(explainer, weight_decay=config.weight_decay), lr=config.learning_rate, fused=True
    )
    steps = training_steps(
        [len(example.input_ids) for example in examples],
        [example.task for example in examples],
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        seed=config.seed,
        weights=config.weights,
    )
    losses = []
    explainer.train()
    for i, step in enumerate(steps):
        rate = config.learning_rate * learning_rate_factor(
            i, len(steps), schedule=config.schedule, warmup=config.warmup
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        outcomes = _backward(explainer, examples, step, pad_id)
        norm = torch.nn.utils.clip_grad_norm_(explainer.parameters(), config.clip).item()
        check_norm(norm, [examples[i].question_id for part in step for i in part])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report = _report(i, len(steps), outcomes, norm, rate)
        losses.append(report.loss)
        if on_step:
            on_step(report)
    explainer.eval()
    return losses


def _backward(explainer: Explainer, examples: Sequence[Example], step: Step, pad_id: int) -> list[Outcome]:
    total = answer_tokens([examples[i] for part in step for i in part])
    outcomes = []
    for part in step:
        batch = collate(micro_batch(examples, step, part), pad_id).to(explainer.device)
        outcome = explainer(batch, n_answer_tokens=total)
        check_finite(outcome, [examples[i].question_id for i in part])
        outcome.loss.backward()
        outcomes.append(outcome)
    return outcomes


def check_finite(outcome: Outcome, question_ids: Sequence[str]) -> None:
    """Raises: NotFinite: the loss of the batch of these questions is NaN or infinite."""
    if not torch.isfinite(outcome.loss):
        raise not_finite("the loss", outcome.loss.item(), question_ids)


def check_norm(norm: float, question_ids: Sequence[str]) -> None:
    """Raises: NotFinite: the gradient of the step with these questions has a norm that is NaN or infinite; their losses
    may be finite even so, where a backward pass overflows."""
    if not math.isfinite(norm):
        raise not_finite("the gradient's norm", norm, question_ids)


def not_finite(what: str, value: float, question_ids: Sequence[str]) -> NotFinite:
    """The error of a batch of these questions."""
    return NotFinite(
        f"{what} is {value} on questions {', '.join(question_ids)}: lower the learning rate, or look at their vectors"
    )


def _report(i: int, n_steps: int, outcomes: Sequence[Outcome], norm: float, rate: float) -> StepReport:
    n_tokens = sum(outcome.n_tokens.item() for outcome in outcomes)
    return StepReport(
        step=i + 1,
        n_steps=n_steps,
        loss=sum(outcome.nll.item() for outcome in outcomes) / n_tokens,
        accuracy=sum(outcome.n_right.item() for outcome in outcomes) / n_tokens,
        n_answer_tokens=int(n_tokens),
        gradient_norm=norm,
        learning_rate=rate,
    )
