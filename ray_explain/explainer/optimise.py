"""What is trained, and how fast: adapters, parameter groups, learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ray_explain.explainer.module import Explainer
from ray_explain.interventions.layout import layout_of

Schedule = Literal["constant", "linear", "cosine", "wsd"]
DECAY_SHARE = 0.4
"""Share of the steps in which "wsd" (warm-up, stable, decay) goes down."""


def with_lora(model: PreTrainedModel, *, rank: int, alpha: int, dropout: float, seed: int = 0) -> PeftModel:
    """`model`, frozen, with adapters of rank `rank` beside all linear maps of its blocks, scaled by alpha / rank.

    The paper's are those (q, k, v, o, gate, up, down for Llama). The same seed gives the same adapters. Make its
    `Explainer` with `train_markers`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(  # type: ignore[return-value]
            model,
            LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )


def parameter_groups(explainer: Explainer, *, weight_decay: float) -> list[dict[str, Any]]:
    """Everything that is trained, for an optimizer: matrices decay; vectors, embeddings, markers and projections do
    not (a projection would decay away from the identity)."""
    embeddings = [module for module in explainer.modules() if isinstance(module, nn.Embedding)]
    spared = [*embeddings, layout_of(explainer.model).unembedding, explainer.projection]
    spared_ids = {id(parameter) for module in spared for parameter in module.parameters()}
    spared_ids.add(id(explainer.marker_embeddings))
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in explainer.parameters():
        if parameter.requires_grad:
            n_axes = len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves parameters empty
            (others if n_axes < 2 or id(parameter) in spared_ids else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate_factor(step: int, n_steps: int, *, schedule: Schedule, warmup: float) -> float:
    """Share of the learning rate at `step` (from 0) of `n_steps`; linear warm-up over the share `warmup` of them.

    Afterwards: constant 1; linear or cosine down to 0 at `n_steps`; wsd stays at 1 and goes down linearly in the last
    `DECAY_SHARE` of the steps.
    """
    n_warmup = round(warmup * n_steps)
    if step < n_warmup:
        return (step + 1) / (n_warmup + 1)
    left = (n_steps - step) / max(n_steps - n_warmup, 1)
    return _AFTER_WARMUP[schedule](left, (n_steps - step) / max(DECAY_SHARE * n_steps, 1))


_AFTER_WARMUP: dict[Schedule, Callable[[float, float], float]] = {
    "constant": lambda left, decay: 1.0,
    "linear": lambda left, decay: left,
    "cosine": lambda left, decay: (1 - math.cos(math.pi * left)) / 2,
    "wsd": lambda left, decay: min(1.0, decay),
}
