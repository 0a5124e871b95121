"""Answers: greedy, batched, with a cache."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_explain.explainer.batches import ExplainerBatch, collate
from ray_explain.explainer.examples import Example, stop_ids
from ray_explain.explainer.module import Explainer


class Generation(NamedTuple):
    """`text` is without special tokens; `logprob` (nats, summed) and `n_tokens` count the end token, if it came."""

    text: str
    logprob: float
    n_tokens: int


@torch.no_grad()
def generate(
    explainer: Explainer,
    prompts: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    batch_size: int,
    over: Callable[[Bool[Tensor, ""]], bool] | None = None,
) -> list[Generation]:
    """The likeliest answer, token by token, to each prompt (those of `encode_prompt`), in their order.

    Batches hold prompts of about the same length. An answer does not depend on its batch, up to rounding.

    Args:
        over: Told after each token whether all answers of the batch are at their end, says whether to stop. Under
            ZeRO-3 the processes have to agree, since all take part in every pass.
    """
    was_training = explainer.training
    explainer.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].input_ids))
    stops = stop_ids(tokenizer)
    answers: dict[int, Generation] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([prompts[i] for i in chosen], tokenizer.pad_token_id or 0).to(explainer.device)
        ids, logprobs = _decoded(explainer, batch, stops, max_new_tokens, over or bool)
        for i, row, row_logprobs in zip(chosen, ids.tolist(), logprobs):
            n = next((n for n, token in enumerate(row, 1) if token in stops), len(row))
            text = str(tokenizer.decode(row[:n], skip_special_tokens=True)).strip()
            answers[i] = Generation(text, row_logprobs[:n].sum().item(), n)
    explainer.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def _decoded(
    explainer: Explainer,
    batch: ExplainerBatch,
    stops: frozenset[int],
    max_new_tokens: int,
    over: Callable[[Bool[Tensor, ""]], bool],
) -> tuple[Int[Tensor, "batch n_new"], Float[Tensor, "batch n_new"]]:
    """Tokens and their log-probabilities; what comes after a row's first stop token means nothing."""
    stop = torch.tensor(sorted(stops), device=explainer.device)
    ids, logprobs = [], []
    done: Bool[Tensor, " batch"] = torch.zeros(len(batch.input_ids), dtype=torch.bool, device=explainer.device)
    step: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    mask, cache = batch.attention_mask, None
    with explainer.reading(batch):
        for _ in range(max_new_tokens):
            out = explainer.model(**step, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            best = out.logits[:, -1].float().log_softmax(-1).max(-1)
            logprobs.append(best.values)
            ids.append(best.indices)
            done = done | torch.isin(best.indices, stop)
            if over(done.all()):
                break
            step = {"input_ids": best.indices[:, None], "position_ids": step["position_ids"][:, -1:] + 1}
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return torch.stack(ids, 1).cpu(), torch.stack(logprobs, 1).cpu()
