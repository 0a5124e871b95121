"""The explainer: a causal language model that reads a target's vectors."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ray_explain.explainer.batches import ExplainerBatch
from ray_explain.explainer.injection import (
    InjectionConfig,
    injecting,
    keeping_positions,
    mean_embedding_norm,
    overriding_tokens,
)
from ray_explain.explainer.markers import Markers
from ray_explain.explainer.projection import Projection
from ray_explain.interventions.layout import layout_of


class Outcome(NamedTuple):
    """Of one batch. `loss` is to be differentiated; the rest counts answer tokens, to be summed over batches."""

    loss: Float[Tensor, ""]
    nll: Float[Tensor, ""]  # summed over the answer tokens, unweighted, in nats
    n_right: Float[Tensor, ""]  # answer tokens that were the likeliest
    n_tokens: Float[Tensor, ""]


class Explainer(nn.Module):
    """A Hugging Face causal language model with projection and injection; the one module that training wraps.

    Args:
        model: Also one with PEFT's adapters.
        embedding_norm: Mean norm of the model's token embeddings; measured here where the scale asks for it and none is
            given. Under ZeRO-3, gather the embedding's weight around this call.
        train_markers: Give the marker tokens embeddings of their own beside a frozen embedding table (LoRA): markers
            that no text ever held say nothing to the model.

    Raises:
        ValueError: the projection gives another width than the model has, or the injection's layer is none of its.
    """

    def __init__(
        self,
        model: nn.Module,
        markers: Markers,
        projection: Projection,
        injection: InjectionConfig | None = None,
        *,
        embedding_norm: float | None = None,
        train_markers: bool = False,
    ) -> None:
        super().__init__()
        layout = layout_of(model)
        self.model, self.markers, self.projection = model, markers, projection
        self.injection = injection or InjectionConfig()
        if projection.d_explainer != layout.d_model:
            raise ValueError(
                f"a projection to width {projection.d_explainer} for an explainer of width {layout.d_model}"
            )
        if self.injection.layer is not None:
            layout.checked_layer(self.injection.layer)
        if embedding_norm is None and self.injection.scale == "mean_embedding":
            embedding_norm = mean_embedding_norm(model)
        self.embedding_norm = embedding_norm
        rows = layout.embedding(self._marker_ids(layout.device)).detach() if train_markers else None
        self.marker_embeddings = None if rows is None else nn.Parameter(rows.clone())
        self.train(layout.model.training)  # PEFT's wrapper always says that it trains

    @property
    def language_model(self) -> PreTrainedModel:
        """The transformers model, without PEFT's wrapper."""
        return layout_of(self.model).model

    @property
    def device(self) -> torch.device:
        return layout_of(self.model).device

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of blocks for the backward pass and compute the rest again: less memory, more time."""
        self.language_model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})

    @contextmanager
    def reading(self, batch: ExplainerBatch) -> Iterator[None]:
        """Let the model read `batch`'s vectors at its slots, and go on generating with a cache."""
        vectors = self.projection(batch.vectors, batch.layers)
        slot_id, norm = self.markers.slot_id, self.embedding_norm
        with self.reading_words(), injecting(self.model, slot_id, vectors, self.injection, norm):
            yield

    def reading_words(self) -> AbstractContextManager[None]:
        """As `reading`, for texts without vectors: the beginning of a prompt, an answer after its prompt was read."""
        if self.marker_embeddings is None:
            return nullcontext()
        return overriding_tokens(self.model, self._marker_ids(self.device), self.marker_embeddings)

    def answer_logits(self, batch: ExplainerBatch) -> Float[Tensor, "n_answer_tokens d_vocab"]:
        """Logits for each answer token of the batch, in reading order; no others are computed.

        Raises:
            ValueError: the batch's slots and vectors do not fit together.
        """
        before = batch.answer.roll(-1, dims=1)  # the logits of a token stand at the position before it
        before[:, -1] = False
        with self.reading(batch), keeping_positions(layout_of(self.model).unembedding, before):
            out = self.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
        return out.logits[0]

    def forward(self, batch: ExplainerBatch, *, n_answer_tokens: float | None = None) -> Outcome:
        """The batch's loss: the weighted sum of its answer tokens' negative log-likelihoods over `n_answer_tokens`.

        Args:
            n_answer_tokens: `answer_tokens` of the whole step, all micro-batches of all workers, so that the gradients
                of its micro-batches add up to that of one large batch; this batch's own where none is given. Where
                gradients are averaged over micro-batches and not summed, divide it by their number.
        """
        logits = self.answer_logits(batch).float()
        labels = batch.input_ids[batch.answer]
        losses = cross_entropy(logits, labels, reduction="none")
        weights = batch.weights[:, None].expand_as(batch.answer)[batch.answer]
        total = weights.sum() if n_answer_tokens is None else n_answer_tokens
        right = (logits.argmax(-1) == labels).sum()
        counts = torch.stack([losses.detach().sum(), right.float(), losses.new_tensor(len(labels))])
        return Outcome((losses * weights).sum() / total, *counts.unbind())

    def _marker_ids(self, device: torch.device) -> Tensor:
        return torch.tensor(self.markers.ids, device=device)
