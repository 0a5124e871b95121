"""What a target answers with and without an intervention."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_explain import records

NOT_FINITE = "the model gave NaN or infinity"


class Outcome(NamedTuple):
    """Greedy next tokens of two runs as text, their log-probabilities in their own run, and the divergence of the
    runs, all in nats. `changed` compares the texts: tokens that read the same are the same answer."""

    before: str
    after: str
    changed: bool
    before_logprob: float
    after_logprob: float
    kl: float  # from the distribution before to the one after


def outcomes(
    tokenizer: PreTrainedTokenizerBase, before: Float[Tensor, "rows d_vocab"], after: Float[Tensor, "rows d_vocab"]
) -> list[Outcome | None]:
    """One outcome per row of the two runs' logits; None where a logit is NaN or infinite."""
    finite = torch.isfinite(before).all(1) & torch.isfinite(after).all(1)
    first, second = before.float().log_softmax(-1), after.float().log_softmax(-1)
    # Rounding can bring the divergence of two equal distributions below zero.
    kl = (first.exp() * (first - second)).sum(-1).clamp(min=0).tolist()
    best, best_after = first.max(-1), second.max(-1)
    columns = (finite, best.indices, best_after.indices, best.values, best_after.values)
    found: list[Outcome | None] = []
    for row, (fine, a, b, logprob, logprob_after) in enumerate(zip(*(column.tolist() for column in columns))):
        texts = answer_text(tokenizer, a), answer_text(tokenizer, b)
        outcome = Outcome(*texts, texts[0] != texts[1], logprob, logprob_after, kl[row])
        found.append(outcome if fine else None)
    return found


def outcome_columns(found: Sequence[Outcome], before: str, after: str) -> dict[str, list[Any]]:
    """The columns of a table of effects whose runs are called `before` and `after`."""
    return {
        f"{before}_answer": [outcome.before for outcome in found],
        f"{after}_answer": [outcome.after for outcome in found],
        "changed": [outcome.changed for outcome in found],
        f"{before}_logprob": [outcome.before_logprob for outcome in found],
        f"{after}_logprob": [outcome.after_logprob for outcome in found],
        "kl": [outcome.kl for outcome in found],
    }


def answer_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as an answer: its text without spaces around it.

    A token that is nothing but space, or part of a character, has no such text and is written as the tokenizer's
    vocabulary has it ("Ċ" for a line break); one beyond the vocabulary as its number ("<32001>").
    """
    text = str(tokenizer.decode([token], skip_special_tokens=False)).strip()
    if text and "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    piece = tokenizer.convert_ids_to_tokens(token)
    return piece if isinstance(piece, str) and piece else f"<{token}>"


def special_answers(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Answers that are no text but tokens of their own, such as the end of a turn: decoding leaves them out."""
    return frozenset(str(token).strip() for token in tokenizer.added_tokens_decoder.values() if token.special)


def rows_with(table: pa.Table, rows: Sequence[int], columns: dict[str, Any], schema: pa.Schema) -> pa.Table:
    """Some rows of `table` with further columns (values, or a finished Arrow array), as a table of `schema`."""
    made = table.take(pa.array(rows, type=pa.int64()))
    for name, values in columns.items():
        array = values if isinstance(values, pa.Array) else pa.array(values, type=schema.field(name).type)
        made = made.append_column(schema.field(name), array)
    return made.cast(schema)


def vectors_table(rows: Sequence[dict[str, Any]], vectors: Sequence[np.ndarray], schema: pa.Schema) -> pa.Table:
    """A table of `schema` from rows and the vectors [n, d_model] of each."""
    d_model = schema.field("vectors").type.value_type.list_size
    columns = {
        field.name: records.vectors_array(vectors, d_model)
        if field.name == "vectors"
        else pa.array([row[field.name] for row in rows], type=field.type)
        for field in schema
    }
    return records.conform(pa.table(columns), schema)
