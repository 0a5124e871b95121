"""Rows of a model for the tokens that its tokenizer has."""

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain.interventions.layout import layout_of


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `model` a row for each token of `tokenizer`; new rows are the mean of the old ones (nothing random).

    Does nothing where there are rows enough; vocabularies are often padded.
    """
    layout = layout_of(model)
    table = _rows(layout.embedding)
    n_rows = getattr(table, "ds_shape", table.shape)[0]  # ZeRO-3 leaves parameters empty
    if len(tokenizer) <= n_rows:
        return
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layout = layout_of(model)
    with torch.no_grad():
        for weight in {_rows(layout.embedding), _rows(layout.unembedding)}:  # one, where they are tied
            weight[n_rows:] = weight[:n_rows].mean(0)


def _rows(table: nn.Module) -> nn.Parameter:
    return table.weight  # type: ignore[return-value]
