"""Questions about patches: would the output change, and to what, if this vector stood at that token of that layer?"""

from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import pyarrow as pa

from ray_explain import records
from ray_explain.questions.asking import askable, asked, plain_columns
from ray_explain.questions.wordings import Wording, drawing, says
from ray_explain.stages import Result

NO_WORDS = "the wording has no words for this kind of patch"


def patching_questions(
    effects: pa.Table,
    tokens_of: Callable[[str], list[str]],
    *,
    wording: str,
    seed: int,
    special: Collection[str] = (),
) -> Result:
    """One question per patching effect (records.patching_effects); dropped are kinds of patches that the wording cannot
    say, and answers that are one of the target's `special` tokens.

    Args:
        tokens_of: The texts of the tokens that the target reads in a prompt, special tokens among them.
        wording: The set of wordings; which of them a case gets depends on its id and `seed`.

    Raises:
        ValueError: a patched position is past the end of its prompt's tokens.
    """
    draw, tokens_of = drawing(wording, "patching", seed), cache(tokens_of)
    wordless = [None if says(wording, kind) else NO_WORDS for kind in effects["kind"].to_pylist()]
    effects, dropped = askable(effects, ("base_answer", "patched_answer"), special, wordless)
    vectors = records.vectors_of(effects["vectors"])
    rows = [
        _question(effect, tokens_of(effect["base_prompt"]), len(own), draw(effect["case_id"]))
        for effect, own in zip(plain_columns(effects), vectors, strict=True)
    ]
    return asked(rows, vectors, effects.schema.field("vectors").type.value_type.list_size, dropped)


def _question(effect: dict[str, Any], tokens: list[str], n_vectors: int, wording: Wording) -> dict[str, Any]:
    positions, layers = effect["base_positions"], list(range(effect["first_layer"], effect["last_layer"] + 1))
    if max(positions) >= len(tokens):
        raise ValueError(
            f"case {effect['case_id']}: position {max(positions)} of a prompt of {len(tokens)} tokens; "
            "tokens_of must be the tokenizer of the target that was patched"
        )
    prompt = wording.prompt(
        vectors=wording.vectors(n_vectors),
        layers=wording.numbers(layers),
        positions=wording.numbers(positions),
        tokens=wording.tokens([tokens[position] for position in positions]),
        input=effect["base_prompt"],
    )
    answer = wording.effect(effect["changed"], effect["patched_answer" if effect["changed"] else "base_answer"])
    return {
        **{name: effect[name] for name in ("case_id", "group", "split", "role", "stratum", "changed")},
        "task": "patching",
        "prompt": prompt,
        "answer": answer,
        "answers": [answer],
        "layers": layers,
        "wording": wording.id,
    }
