"""Cases from wherever an experiment wants them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from ray_explain.ground_truth import counterfact, jsonl, mmlu, pairs, released, world_cases
from ray_explain.ground_truth.pairs import REPLACE, Block, Change
from ray_explain.stages import Result
from ray_explain.world.facts import World

# Reasons why something is left out that say nothing against the data: they count in no share of dropped rows.
BY_DESIGN = frozenset(
    {
        counterfact.NO_PARTNER,
        counterfact.TOO_FEW_ANSWERS,
        jsonl.REPEATED,
        mmlu.REPEATED,
        pairs.REPEATED,
        released.ENDS,
    }
)


def patching_cases(
    source: World | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: Literal["counterfact", "jsonl"] = "jsonl",
    form: counterfact.Form = "completion",
    n: Mapping[str, int],
    blocks: Sequence[Block],
    seed: int,
    change: Change = REPLACE,
) -> Result:
    """Patching cases of a world or of a file in one of the formats: `n` of each split, of a file no more than it gives.

    Cases of the same base prompt stand side by side, of these such of the same source prompt: actors work on slices of
    the table, and run each prompt of a slice once.

    Raises:
        ValueError: the world does not give that many, or the file is not of that format.
        OSError: the file cannot be read.
    """
    if isinstance(source, World):
        made = Result(world_cases.patching_cases(source, tokenizer, n=n, layers=blocks, seed=seed, change=change), [])
    elif format == "counterfact":
        made = counterfact.counterfact_cases(source, tokenizer, blocks=blocks, n=n, form=form, seed=seed, change=change)
    else:
        made = jsonl.patching_cases(source, tokenizer, blocks=blocks, n=n, change=change)
    order = [(name, "ascending") for name in ("base_prompt", "source_prompt", "case_id")]
    return _distinct(made._replace(table=made.table.sort_by(order)))


def ablation_cases(
    source: World | str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: Literal["mmlu", "jsonl"] = "jsonl",
    form: mmlu.Form = "completion",
    hint: mmlu.Hint = "random",
    n: Mapping[str, int],
    seed: int,
) -> Result:
    """Ablation cases, as `patching_cases`."""
    if isinstance(source, World):
        return _distinct(Result(world_cases.ablation_cases(source, n=n, seed=seed), []))
    if format == "mmlu":
        return _distinct(mmlu.mmlu_cases(source, tokenizer, n=n, hint=hint, form=form, seed=seed))
    return _distinct(jsonl.ablation_cases(source, n=n))


def _distinct(made: Result) -> Result:
    """`made`.

    Raises:
        ValueError: two cases have the same id, and with it the same content; whoever made them has to drop one.
    """
    [(case_id, times)] = Counter(made.table["case_id"].to_pylist()).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"case {case_id} was made {times} times")
    return made
