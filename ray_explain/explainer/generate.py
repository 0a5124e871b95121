"""Answers: greedy, batched, with a cache; what can be foretold of them is drafted and verified, not decoded."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ray_explain.explainer.batches import collate
from ray_explain.explainer.drafting import Drafts
from ray_explain.explainer.examples import Example, stop_ids
from ray_explain.explainer.injection import keeping_positions
from ray_explain.explainer.module import Explainer
from ray_explain.interventions.hooks import only_at
from ray_explain.interventions.layout import FAMILIES, Layout, layout_of

_LOGITS_AT_ONCE = 2**26  # numbers; bounds the drafts of large batches over large vocabularies
_LOGITS_IN_CACHE = 2**19  # numbers that a CPU's cache holds
_WORDS_A_BLOCK = 64  # divides the vocabularies of most models
_LONGEST_DRAFT = 15  # tokens
_PILOT = 8  # answers
_WORTH_SHARING = 1 / 8  # of a batch's prompt tokens have to be saved before beginnings are read by themselves


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
    drafts: Drafts | None = None,
    over: Callable[[Bool[Tensor, ""]], bool] | None = None,
) -> list[Generation]:
    """The likeliest answer, token by token, to each prompt (those of `encode_prompt`), in their order.

    Batches hold prompts of about the same length. An answer does not depend on its batch, up to rounding, nor on what
    was drafted.

    Args:
        drafts: From `new_drafts`, where several calls are to learn from one another.
        over: Told after each token whether all answers of the batch are at their end, says whether to stop. Under
            ZeRO-3 the processes have to agree, since all take part in every pass; nothing is drafted or shared then.
    """
    was_training = explainer.training
    explainer.eval()
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i].input_ids), prompts[i].input_ids))
    stops, pad_id = stop_ids(tokenizer), tokenizer.pad_token_id or 0
    if over:
        drafts = None
    elif drafts is None:
        drafts = new_drafts(explainer, tokenizer)
    answers: dict[int, Generation] = {}
    for chosen in _batches(order, batch_size, pilot=drafts is not None and not drafts):
        rows = [_Answer(max_new_tokens, stops) for _ in chosen]
        _decode(explainer, [prompts[i] for i in chosen], rows, pad_id, drafts, over or bool)
        for i, row in zip(chosen, rows):
            text = str(tokenizer.decode(row.ids, skip_special_tokens=True)).strip()
            answers[i] = Generation(text, row.logprob, len(row.ids))
            if drafts is not None:
                drafts.learn(row.ids)
    explainer.train(was_training)
    return [answers[i] for i in range(len(prompts))]


def _batches(order: Sequence[int], size: int, *, pilot: bool) -> Iterator[Sequence[int]]:
    """Pieces of `order`, of `size`; before them, a few from all over it, whose answers are the first to draft from."""
    if pilot and len(order) > size > _PILOT:
        first = order[:: len(order) // _PILOT][:_PILOT]
        yield first
        order = [i for i in order if i not in first]
    yield from (order[start : start + size] for start in range(0, len(order), size))


def new_drafts(explainer: Explainer, tokenizer: PreTrainedTokenizerBase) -> Drafts:
    """Without any answer yet."""
    return Drafts(never={explainer.markers.slot_id, *stop_ids(tokenizer)})


@dataclass
class _Answer:
    longest: int
    stops: frozenset[int]
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    done: bool = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float]) -> None:
        """Go on, as far as the end of the answer."""
        for token, logprob in zip(ids, logprobs):
            if self.done:
                return
            self.ids.append(token)
            self.logprob += logprob
            self.done = token in self.stops or len(self.ids) == self.longest


class _Text:
    """What a batch has read: keys and values, in a slot for each token, for padding and for drafts that were wrong."""

    def __init__(self, explainer: Explainer, n_rows: int) -> None:
        self.model, self.device = explainer.model, explainer.device
        self.cache = DynamicCache(config=explainer.language_model.config)
        self.mask: Int[Tensor, "batch slots"] = torch.ones(n_rows, 0, dtype=torch.long, device=self.device)

    def spare(self, n_slots: int, rows: Sequence[_Answer]) -> float:
        """How many slots drafts may still fill beside `n_slots` and the rest of the answers; below 0, none. Sliding
        windows count slots, gaps among them; a recurrent state cannot skip any."""
        layers = self.cache.layers
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
            return -1
        window = min((getattr(layer, "sliding_window", math.inf) for layer in layers), default=math.inf)
        return window - n_slots - max(row.longest - len(row.ids) for row in rows)

    def read(
        self, ids: Int[Tensor, "batch n"], real: Int[Tensor, "batch n"], asked: Bool[Tensor, "batch n"]
    ) -> tuple[Int[Tensor, "batch n"], Float[Tensor, "batch n"]]:
        """The likeliest token after each of the `asked` ones, and its log-probability; -1 and 0 after the others, of
        which no logits are computed: over a large vocabulary they cost more than all else."""
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        with _answering(layout_of(self.model), asked):
            logits = self.model(**given, past_key_values=self.cache, use_cache=True).logits[0]
        best, logprobs = torch.full_like(ids, -1), torch.zeros(ids.shape, device=self.device)
        best[asked], logprobs[asked] = _likeliest(logits)
        return best, logprobs

    def forget(self, n_right: Sequence[int], n_drafted: int) -> None:
        """Of the last `n_drafted` slots, each row keeps the first `n_right`."""
        if n_drafted:
            kept = torch.arange(n_drafted, device=self.device) < torch.tensor(n_right, device=self.device)[:, None]
            self.mask[:, -n_drafted:] *= kept

    def take(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may be taken more than once."""
        index = torch.tensor(rows, device=self.device)
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]


def _decode(
    explainer: Explainer,
    prompts: Sequence[Example],
    rows: Sequence[_Answer],
    pad_id: int,
    drafts: Drafts | None,
    over: Callable[[Bool[Tensor, ""]], bool],
) -> None:
    """Fills `rows`, the answers to `prompts`."""
    text, pending, most = _Text(explainer, len(prompts)), list(rows), _most_drafted(explainer, len(rows))
    spare = text.spare(max(len(prompt.input_ids) for prompt in prompts), rows)
    drafts = drafts if spare >= 0 else None
    drafted = _drafted(drafts, rows, min(most, spare))
    ids, logprobs = _read_prompts(explainer, text, prompts, drafted[0], pad_id, share=drafts is not None)
    while True:
        n_right = [_n_alike(*pair) for pair in zip(drafted, ids.tolist())]
        for row, n, *made in zip(pending, n_right, ids.tolist(), logprobs.tolist()):
            row.add(*(part[: n + 1] for part in made))
        text.forget(n_right, ids.shape[1] - 1)
        left = [i for i, row in enumerate(pending) if not row.done]
        if over(torch.tensor(not left, device=text.device)):
            return
        if 0 < len(left) <= len(pending) // 2:
            text.take(left)
            pending = [pending[i] for i in left]
        drafted = _drafted(drafts, pending, min(most, text.spare(text.mask.shape[1], pending)))
        width = 1 + max(map(len, drafted))
        fed = [[row.ids[-1], *draft] for row, draft in zip(pending, drafted)]
        ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in fed], device=text.device)
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in fed], device=text.device)
        open_rows = torch.tensor([not row.done for row in pending], device=text.device)
        with explainer.reading_words():
            ids, logprobs = text.read(ids, real, real.bool() & open_rows[:, None])


def _read_prompts(
    explainer: Explainer, text: _Text, prompts: Sequence[Example], draft: list[int], pad_id: int, *, share: bool
) -> tuple[Int[Tensor, "batch n"], Float[Tensor, "batch n"]]:
    """`_Text.read` of the prompts, each with `draft` after it; equal beginnings are read once."""
    n_shared = _n_shared(prompts, explainer.markers.slot_id) if share else 0
    if n_shared:
        beginnings = [tuple(prompt.input_ids[:n_shared]) for prompt in prompts]
        each = {beginning: i for i, beginning in enumerate(dict.fromkeys(beginnings))}
        ids = torch.tensor(list(each), device=text.device)
        text.mask = text.mask[: len(each)]
        with explainer.reading_words():
            text.read(ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool))
        text.take([each[beginning] for beginning in beginnings])
    rest = [prompt._replace(input_ids=[*prompt.input_ids[n_shared:], *draft]) for prompt in prompts]
    batch = collate(rest, pad_id).to(text.device)
    asked = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    asked[:, -1 - len(draft) :] = True
    with explainer.reading(batch):
        ids, logprobs = text.read(batch.input_ids, batch.attention_mask, asked)
    return ids[:, -1 - len(draft) :], logprobs[:, -1 - len(draft) :]


def _n_shared(prompts: Sequence[Example], slot_id: int) -> int:
    """The length of the beginnings whose sharing saves most tokens, 0 where it saves few; no vector is in them."""
    ordered = sorted(prompt.input_ids for prompt in prompts)
    before = [ids.index(slot_id) if slot_id in ids else len(ids) - 1 for ids in ordered]
    alike = sorted((min(_n_alike(*pair), *before) for pair in pairwise(ordered)), reverse=True)
    saved, n = max(((i * n, n) for i, n in enumerate(alike, 1)), default=(0, 0))
    return n if saved > _WORTH_SHARING * sum(map(len, ordered)) else 0


@contextmanager
def _answering(layout: Layout, asked: Bool[Tensor, "batch n"]) -> Iterator[None]:
    """Let the unembedding, and the last block's MLP where it can, work on the `asked` tokens alone."""
    with ExitStack() as hooks:
        hooks.enter_context(keeping_positions(layout.unembedding, asked))
        if layout.family in FAMILIES and not asked.all():
            hooks.enter_context(only_at(layout.mlp(layout.n_layers - 1), asked.flatten().nonzero()[:, 0]))
        yield


def _likeliest(logits: Float[Tensor, "n d_vocab"]) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """Tokens and log-probabilities; as many rows at a time as stay in a CPU's cache. `logits` are overwritten."""
    ids, logprobs = [logits.new_empty(0, dtype=torch.long)], [logits.new_empty(0, dtype=torch.float32)]
    for rows in logits.split(max(_LOGITS_IN_CACHE // logits.shape[-1], 1)):
        rows = rows.float()
        best = _largest(rows)
        ids.append(best.indices)
        logprobs.append(-rows.sub_(best.values[:, None]).exp_().sum(-1).log())
    return torch.cat(ids), torch.cat(logprobs)


def _largest(rows: Float[Tensor, "n d_vocab"]) -> torch.return_types.max:
    """As `rows.max(-1)`. PyTorch looks for a place one number at a time, for a value several at once: so first for the
    value in each block of words, then for the place in the best block."""
    if rows.shape[-1] % _WORDS_A_BLOCK:
        return rows.max(-1)
    blocks = rows.unflatten(-1, (-1, _WORDS_A_BLOCK))
    best = blocks.amax(-1).max(-1)
    within = blocks[torch.arange(len(rows), device=rows.device), best.indices].argmax(-1)
    return torch.return_types.max((best.values, best.indices * _WORDS_A_BLOCK + within))


def _n_alike(some: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((n for n, (a, b) in enumerate(zip(some, others)) if a != b), min(len(some), len(others)))


def _drafted(drafts: Drafts | None, rows: Sequence[_Answer], most: float) -> list[list[int]]:
    """A draft for each row, of at most `most` tokens; the pass that verifies it adds one more to the answer."""
    longest = [0 if row.done else int(min(most, row.longest - len(row.ids) - 1)) for row in rows]
    return [drafts.after(row.ids, n) if drafts is not None and n > 0 else [] for row, n in zip(rows, longest)]


def _most_drafted(explainer: Explainer, n_rows: int) -> int:
    d_vocab = explainer.language_model.config.get_text_config().vocab_size
    return max(min(_LONGEST_DRAFT, _LOGITS_AT_ONCE // (n_rows * d_vocab) - 1), 0)
