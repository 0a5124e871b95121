"""How much memory a training step takes, from the model's config alone: nothing is loaded, nothing allocated."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from ray_explain.explainer.optimise import with_lora
from ray_explain.interventions.layout import layout_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BUCKET = 500_000_000  # elements that DeepSpeed sends at once, at most
_MAX_LIVE = 1_000_000_000  # elements that ZeRO-3 keeps gathered, at most
_FETCHED = 50_000_000  # elements that it gathers ahead of their use, at most
_FIXED = 35_000_000  # bytes of modules, hooks and the allocator's rest, measured: the same for every size


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One worker's forward and backward pass: what it takes beside gradients and the optimizer's state."""

    n_parameters: int
    n_trained: int  # of those that get gradients
    bytes_each: int  # of a parameter
    activations: int  # bytes that the forward pass keeps for the backward pass
    logits: int  # bytes, at answer tokens, with what the loss makes of them


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on one worker. What is offloaded to the host's memory is in none of the others."""

    weights: int
    optimizer: int  # Adam's moments, and what is kept in float32 beside the weights
    activations: int  # at the end of the forward pass; logits and what ZeRO-3 has gathered among them
    gradients: int  # at the end of the backward pass, when activations are gone
    buffers: int  # of communication, of the optimizer step and what ZeRO-3 has gathered, then
    offloaded: int

    @property
    def total(self) -> int:
        """At the peak of a step."""
        return _FIXED + self.weights + self.optimizer + max(self.activations, self.gradients + self.buffers)


def footprint(
    config: Any,
    *,
    dtype: str,
    lora_rank: int | None,
    n_beside: int,
    gradient_checkpointing: bool,
    rows: int,
    tokens: int,
    answer_tokens: int,
) -> Footprint:
    """Of a transformers config and a forward pass of `rows` examples of `tokens` tokens, `answer_tokens` of them (of
    each) learned. `n_beside` numbers are trained beside the model: of a projection, of markers. Attention is taken to
    keep no matrix of all pairs of tokens."""
    config._attn_implementation = "eager"  # others look at the values of the mask
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        if lora_rank is not None:
            model.requires_grad_(False)
            model = with_lora(model, rank=lora_rank, alpha=lora_rank, dropout=0.1)  # type: ignore[assignment]
    layout = layout_of(model)
    saved = _saved(model, rows, tokens)
    if gradient_checkpointing:  # the inputs of all blocks, and all of the one whose gradient is computed
        saved = saved // layout.n_layers + layout.n_layers * rows * tokens * layout.d_model * layout.dtype.itemsize
    parameters = list(model.parameters())
    return Footprint(
        n_parameters=sum(parameter.numel() for parameter in parameters) + n_beside,
        n_trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad) + n_beside,
        bytes_each=DTYPES[dtype].itemsize,
        activations=saved,
        logits=rows * answer_tokens * layout.d_vocab * (3 * 4 + (0 if dtype == "float32" else 2)),
    )


def _saved(model: Any, rows: int, tokens: int) -> int:
    """Bytes that a forward pass keeps, parameters and attention's matrices not counted."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and not (tensor.ndim > 2 and tensor.shape[-2:] == (tokens, tokens)):
            kept[storage._cdata] = (storage.nbytes(), tensor)  # the tensor keeps its storage's address from reuse
        return tensor

    ids = torch.ones(rows, tokens, dtype=torch.long, device="meta")
    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=1)
    return sum(size for size, _ in kept.values())


def peak(made: Footprint, *, zero_stage: int, workers: int, offload: bool) -> Peak:
    """Of one of `workers` workers with DeepSpeed's ZeRO at `zero_stage` and AdamW."""
    n, trained, each = made.n_parameters, made.n_trained, made.bytes_each
    share = trained // workers if zero_stage else trained
    weights = n * each if zero_stage < 3 else n * each // workers
    # ZeRO keeps float32 weights even beside float32 ones; without it, bfloat16 has them and float32 gradients.
    beside = 4 * share if zero_stage else (0 if each == 4 else 8 * trained)
    optimizer = beside + 8 * share
    gradients = trained * each if zero_stage < 2 else share * each
    alone = workers == 1 and not zero_stage and each == 4  # then nothing is sent, not even to oneself
    buffers = (0 if alone else min(trained, _BUCKET) * each) + (4 * share if zero_stage else 0)
    if zero_stage == 3:
        buffers += min(n, _MAX_LIVE) * each
    offloaded = 0
    if offload and zero_stage:
        offloaded, optimizer = optimizer + 4 * share, 0
        buffers -= 4 * share
        if zero_stage == 3:
            offloaded, weights = offloaded + n * each // workers, weights - n * each // workers
    return Peak(
        weights=weights,
        optimizer=optimizer,
        activations=made.activations + made.logits + (min(n, _FETCHED) * each if zero_stage == 3 else 0),
        gradients=gradients,
        buffers=buffers,
        offloaded=offloaded,
    )
