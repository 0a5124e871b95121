"""Cases from the synthetic world: facts to patch between, and quizzes whose hint is to be removed."""

import random
from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.pairs import REPLACE, Block, Change, Pair, SubjectPrompt, ablation_case, patching_case
from ray_explain.ground_truth.pairs import layer_blocks as layer_blocks
from ray_explain.ground_truth.positions import PromptTokens, reading, span_positions
from ray_explain.world.cases import PatchingPair, hint_cases, patching_pairs
from ray_explain.world.facts import World


def patching_cases(
    world: World,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Mapping[str, int],
    layers: Sequence[Block],
    seed: int,
    change: Change = REPLACE,
) -> pa.Table:
    """`n` cases of each split (records.PATCHING_CASES): one block of `layers`, both included, is changed at one token;
    within each role, the blocks are equally frequent.

    Raises:
        ValueError: the world does not give that many cases, or the tokenizer is not the world's.
    """
    rows = []
    for split, size in n.items():
        pairs = patching_pairs(world, size, split, seed) if size else []  # type: ignore[arg-type]
        tokens_of = reading(tokenizer, (text for pair in pairs for text in (pair.base_prompt, pair.source_prompt)))
        for pair, block in zip(pairs, _dealt_blocks(pairs, layers, f"{split} {seed}")):
            rows.append(_patching_case(pair, block, tokens_of, change))
    return records.rows_table(rows, records.PATCHING_CASES)


def _dealt_blocks(pairs: Sequence[PatchingPair], blocks: Sequence[Block], seed: str) -> list[Block]:
    """Each role goes around the blocks in its own random order, so that role and block are independent."""
    rng, counts, orders = random.Random(f"blocks {seed}"), dict[str, int](), dict[str, list[Block]]()
    dealt = []
    for pair in pairs:
        at = counts.get(pair.role, 0) % len(blocks)
        if at == 0:
            orders[pair.role] = rng.sample(list(blocks), len(blocks))
        counts[pair.role] = counts.get(pair.role, 0) + 1
        dealt.append(orders[pair.role][at])
    return dealt


def _patching_case(
    pair: PatchingPair, block: Block, tokens_of: Callable[[str], PromptTokens], change: Change
) -> dict[str, object]:
    base = SubjectPrompt(pair.base_prompt, pair.base_span, pair.base_truth)
    source = SubjectPrompt(pair.source_prompt, pair.source_span, pair.source_truth)
    positions = [span_positions(tokens_of(prompt.text), prompt.text, prompt.subject) for prompt in (base, source)]
    whole = Pair(base, source, group=pair.group, split=pair.split, stratum=pair.relation)
    return patching_case(whole, pair.role, block, positions[0][-1:], positions[1][-1:], change=change)


def ablation_cases(world: World, *, n: Mapping[str, int], seed: int) -> pa.Table:
    """`n` hinted quizzes of each split (records.ABLATION_CASES); the span is the hint, the stratum what the target can
    know without it.

    Raises:
        ValueError: the world does not give that many cases.
    """
    cases = [case for split, size in n.items() if size for case in hint_cases(world, size, split, seed)]  # type: ignore[arg-type]
    rows = [
        ablation_case(
            case.prompt, case.span, group=case.group, split=case.split, stratum=case.stratum, truth=case.truth
        )
        for case in cases
    ]
    return records.rows_table(rows, records.ABLATION_CASES)
