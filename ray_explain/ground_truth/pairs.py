"""Patching cases from pairs of prompts about two subjects: which token, by its role, and which block of layers."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.positions import PromptTokens, Unusable, matched, reading, token_roles, usable
from ray_explain.stages import Result

Span = tuple[int, int]
Block = tuple[int, int]

REPEATED = "the same two prompts as before"


class Change(NamedTuple):
    """What a patch does, and where in a block: see `interventions.patching.Intervention`."""

    site: str = "resid_post"
    kind: str = "replace"


REPLACE = Change()


class SubjectPrompt(NamedTuple):
    """A prompt about a subject. Spans are characters; see `positions.token_roles` for `statement_end` and `named`."""

    text: str
    subject: Span
    truth: str | None = None
    statement_end: int | None = None
    named: tuple[tuple[str, Span], ...] = ()


class Pair(NamedTuple):
    """Two prompts to patch between, and where the cases made of them belong."""

    base: SubjectPrompt
    source: SubjectPrompt
    group: str
    split: str
    stratum: str


class Places(NamedTuple):
    """A pair, and its (base position, source position) pairs by role."""

    pair: Pair
    by_role: dict[str, list[tuple[int, int]]]


def layer_blocks(n_layers: int, n_blocks: int) -> list[Block]:
    """The layers in `n_blocks` contiguous (first, last) blocks of equal size (Li et al. 2025, 2.3: 4 blocks), the
    lower ones larger by one layer where they cannot be equal.

    Raises:
        ValueError: fewer layers than blocks.
    """
    if not 1 <= n_blocks <= n_layers:
        raise ValueError(f"{n_blocks} blocks of {n_layers} layers: each block has at least one layer")
    small, larger = divmod(n_layers, n_blocks)
    sizes = [small + (i < larger) for i in range(n_blocks)]
    firsts = [sum(sizes[:i]) for i in range(n_blocks)]
    return [(first, first + size - 1) for first, size in zip(firsts, sizes)]


def pair_cases(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: Sequence[Block],
    n: Mapping[str, int],
    seed: int,
    change: Change = REPLACE,
) -> Result:
    """Up to `n` cases of each split (records.PATCHING_CASES): fewer where the pairs give no more.

    Every (role, block) comes about equally often; a pair gets another one each time it is used. Dropped are pairs, by
    the id of their content: such whose spans or words the tokenizer cannot place, and such whose prompts are those of
    an earlier pair, since their cases would be the same ones, maybe with another truth.
    """
    tokens_of = reading(tokenizer, (prompt.text for pair in pairs for prompt in (pair.base, pair.source)))
    seen = set[tuple[str, str]]()

    def place(pair: Pair) -> Places:
        prompts = pair.base.text, pair.source.text
        if prompts in seen:
            raise Unusable(REPEATED)
        placed = Places(pair, _by_role(pair, tokens_of))
        seen.add(prompts)
        return placed

    placed, dropped = usable(((records.content_id("pair", pair), pair) for pair in pairs), place)
    rows = []
    for split, size in n.items():
        own = [places for places in placed if places.pair.split == split]
        rows += _dealt(own, blocks, size, change, random.Random(f"pairs {split} {seed}"))
    return Result(records.rows_table(rows, records.PATCHING_CASES), dropped)


def _by_role(pair: Pair, tokens_of: Callable[[str], PromptTokens]) -> dict[str, list[tuple[int, int]]]:
    tokens, roles = [], []
    for prompt in (pair.base, pair.source):
        tokens.append(tokens_of(prompt.text))
        roles.append(
            token_roles(tokens[-1], prompt.text, prompt.subject, statement_end=prompt.statement_end, named=prompt.named)
        )
    return matched(tokens[0], roles[0], tokens[1], roles[1])


def _dealt(
    own: Sequence[Places], blocks: Sequence[Block], size: int, change: Change, rng: random.Random
) -> list[dict[str, Any]]:
    """Up to `size` cases, round after round over the pairs; each takes the (role, block) it still has that is the
    rarest so far."""
    counts: Counter[tuple[str, Block]] = Counter()
    left = [(places, [(role, block) for role in places.by_role for block in blocks]) for places in own]
    for _, cells in left:
        rng.shuffle(cells)
    rows: list[dict[str, Any]] = []
    for places, cells in _rounds(rng.sample(left, len(left))):
        if len(rows) == size:
            break
        cell = min(cells, key=lambda cell: counts[cell])
        cells.remove(cell)
        counts[cell] += 1
        role, block = cell
        base, source = rng.choice(places.by_role[role])
        rows.append(patching_case(places.pair, role, block, [base], [source], change=change))
    return rows


def _rounds(left: list[tuple[Places, list[Any]]]) -> Iterator[tuple[Places, list[Any]]]:
    """Each item that has a cell left, round after round, until none has."""
    while left := [item for item in left if item[1]]:
        yield from left


def ablation_case(
    prompt: str, span: Span, *, group: str, split: str, kind: str = "hint", stratum: str, truth: str | None
) -> dict[str, Any]:
    """The row of records.ABLATION_CASES that removes `span`."""
    return {
        "case_id": records.content_id("ablation", prompt, span),
        "group": group,
        "split": split,
        "prompt": prompt,
        "span_start": span[0],
        "span_end": span[1],
        "kind": kind,
        "stratum": stratum,
        "truth": truth,
    }


def patching_case(
    pair: Pair, role: str, block: Block, base: list[int], source: list[int], *, change: Change = REPLACE
) -> dict[str, Any]:
    """The row of records.PATCHING_CASES that changes the positions `base`, by default replacing the residual stream
    there by that at `source`."""
    case = {
        "base_prompt": pair.base.text,
        "source_prompt": pair.source.text,
        "first_layer": block[0],
        "last_layer": block[1],
        **change._asdict(),
        "base_positions": base,
        "source_positions": source,
    }
    return {
        "case_id": records.content_id("patching", case),
        "group": pair.group,
        "split": pair.split,
        **case,
        "role": role,
        "stratum": pair.stratum,
        "base_truth": pair.base.truth,
        "source_truth": pair.source.truth,
    }
