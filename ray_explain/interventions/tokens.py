"""Prompts of unequal length as one batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Prompts padded on the left, so that index -1 is the last token of every one of them."""

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Each token's place in its own prompt, from 0 (padding counts as 0).

        transformers numbers the padded positions instead, which moves every learned position embedding (GPT-2).
        """
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)


def token_batch(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> TokenBatch:
    """`sequences` as one batch on `device`.

    Raises:
        ValueError: there is no sequence, or one is empty.
    """
    if not sequences:
        raise ValueError("a batch of no prompts: give at least one")
    for i, ids in enumerate(sequences):
        if not len(ids):
            raise ValueError(f"prompt {i} is empty: a prompt has at least one token")
    longest = max(map(len, sequences))
    padded = [[pad_id] * (longest - len(ids)) + list(ids) for ids in sequences]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in sequences]
    return TokenBatch(torch.tensor(padded, device=device), torch.tensor(mask, device=device))
