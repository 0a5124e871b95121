"""Which examples make up which step, and a step's examples as tensors."""

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ray_explain.explainer.examples import Example
from ray_explain.interventions.tokens import token_batch

Step = list[list[int]]
"""Indices of a step's examples, in as many lists as there are micro-batches; some are empty where these are more."""

STEPS_PER_POOL = 8
"""So many steps share a random pool of examples, from which each takes those of about the same length."""


@dataclass(frozen=True)
class ExplainerBatch:
    """Examples padded on the left. `answer` marks the tokens to be learned, `weights` is their weight in the loss;
    `vectors` are those of all examples in reading order, each with the target's layers it belongs to."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    answer: Bool[Tensor, "batch pos"]
    weights: Float[Tensor, " batch"]
    vectors: Float[Tensor, "n_vectors d_target"]
    layers: tuple[tuple[int, ...], ...]

    def to(self, device: torch.device | str) -> "ExplainerBatch":
        moved: dict[str, Any] = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **moved)


def collate(examples: Sequence[Example], pad_id: int) -> ExplainerBatch:
    """`examples` as one batch on the CPU.

    Raises:
        ValueError: there is no example, or their vectors differ in width.
    """
    tokens = token_batch([example.input_ids for example in examples], pad_id, "cpu")
    width = tokens.input_ids.shape[1]
    n_answers = torch.tensor([example.n_answer for example in examples])
    vectors = [example.vectors for example in examples if len(example.vectors)] or [examples[0].vectors]
    return ExplainerBatch(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        position_ids=tokens.position_ids,
        answer=torch.arange(width) >= width - n_answers[:, None],
        weights=torch.tensor([example.weight for example in examples]),
        vectors=torch.from_numpy(np.concatenate(vectors)),
        layers=tuple(example.layers for example in examples for _ in example.vectors),
    )


def answer_tokens(examples: Sequence[Example]) -> float:
    """Tokens to be learned, weighted: what the losses of a whole step are divided by."""
    return float(sum(example.weight * example.n_answer for example in examples))


def micro_batch(examples: Sequence[Example], step: Step, part: Sequence[int]) -> list[Example]:
    """The examples of one `part` of a step. Of an empty one, the step's shortest prompt without its answer: workers
    have to take equally many passes together, and this one adds nothing to the loss, its counts or the gradient."""
    if part:
        return [examples[i] for i in part]
    shortest = min((examples[i] for other in step for i in other), key=lambda example: example.n_prompt)
    return [shortest._replace(input_ids=shortest.input_ids[: shortest.n_prompt])]


def training_steps(
    lengths: Sequence[int],
    tasks: Sequence[str],
    *,
    epochs: int,
    batch_size: int,
    micro_batches: int,
    seed: int,
    weights: Mapping[str, float] | None = None,
) -> list[Step]:
    """The steps of a whole training, the same for the same arguments; `epoch_steps` one epoch after the other."""
    return [
        step
        for epoch in range(epochs)
        for step in epoch_steps(
            lengths,
            tasks,
            epoch=epoch,
            batch_size=batch_size,
            micro_batches=micro_batches,
            seed=seed,
            weights=weights or {},
        )
    ]


def epoch_steps(
    lengths: Sequence[int],
    tasks: Sequence[str],
    *,
    epoch: int,
    batch_size: int,
    micro_batches: int,
    seed: int,
    weights: Mapping[str, float],
) -> list[Step]:
    """The steps of one epoch; the examples depend on nothing else, their order on `batch_size` too.

    Every example is in it as often as `weights` says for its task (1 unless given); of a fraction, the epochs take
    turns. Each step has examples of about the same length, dealt out to its micro-batches so that these have about the
    same number of tokens. Steps are as even as they can be and at most `batch_size` long; none is dropped. One that has
    fewer examples than micro-batches leaves the last of these empty.

    Args:
        lengths: Tokens of each example.
        micro_batches: Forward passes of a step: workers times accumulation.

    Raises:
        ValueError: an epoch without any example, a weight of a task that has none, or one that is not above 0.
    """
    _check_weights(weights, tasks)
    chosen = _chosen(tasks, weights, epoch, seed)
    if not chosen:
        raise ValueError(f"no example in epoch {epoch + 1}: raise the weights {dict(weights)}, or give more examples")
    n_steps = -(-len(chosen) // batch_size)
    rng = random.Random(f"order {seed} {epoch}")
    rng.shuffle(chosen)
    steps = _by_length(chosen, lengths, n_steps)
    rng.shuffle(steps)
    return [_dealt(step, lengths, micro_batches) for step in steps]


def _check_weights(weights: Mapping[str, float], tasks: Sequence[str]) -> None:
    for task, weight in weights.items():
        if task not in tasks:
            raise ValueError(f"a weight for task {task!r}: there are {', '.join(sorted(set(tasks)))}")
        if weight <= 0:
            raise ValueError(f"weight {weight} of task {task!r}: it has to be above 0; leave the task out instead")


def _chosen(tasks: Sequence[str], weights: Mapping[str, float], epoch: int, seed: int) -> list[int]:
    """Each task's examples in an endless row of shuffles, of which every epoch takes the next piece."""
    chosen: list[int] = []
    for task in sorted(set(tasks)):
        members = [i for i, other in enumerate(tasks) if other == task]
        start, end = _turn(len(members), weights.get(task, 1.0), epoch)
        for turn in range(start // len(members), -(-end // len(members))):
            shuffled = random.Random(f"turn {seed} {task} {turn}").sample(members, len(members))
            first = turn * len(members)
            chosen += shuffled[max(start - first, 0) : end - first]
    return chosen


def _turn(n: int, weight: float, epoch: int) -> tuple[int, int]:
    """Where the piece of an epoch begins and ends in the endless row of a task's `n` examples."""
    return round(epoch * n * weight), round((epoch + 1) * n * weight)


def n_steps(counts: Mapping[str, int], weights: Mapping[str, float], *, epochs: int, batch_size: int) -> int:
    """How many steps `training_steps` makes of so many examples of each task."""
    turns = [[_turn(n, weights.get(task, 1.0), epoch) for task, n in counts.items()] for epoch in range(epochs)]
    return sum(-(-sum(end - start for start, end in epoch) // batch_size) for epoch in turns)


def _by_length(chosen: list[int], lengths: Sequence[int], n_steps: int) -> list[list[int]]:
    """Pools of `STEPS_PER_POOL` steps are sorted by length before they are cut into steps."""
    bounds = [round(i * len(chosen) / n_steps) for i in range(n_steps + 1)]
    ordered: list[int] = []
    for first in range(0, n_steps, STEPS_PER_POOL):
        pool = chosen[bounds[first] : bounds[min(first + STEPS_PER_POOL, n_steps)]]
        ordered += sorted(pool, key=lambda i: lengths[i])
    return [ordered[start:end] for start, end in itertools.pairwise(bounds)]


def _dealt(step: list[int], lengths: Sequence[int], n: int) -> Step:
    """Longest first, there and back again."""
    ordered = sorted(step, key=lambda i: -lengths[i])
    hands: Step = [[] for _ in range(n)]
    for place, i in enumerate(ordered):
        turn, seat = divmod(place, n)
        hands[seat if turn % 2 == 0 else n - 1 - seat].append(i)
    return hands
