"""Questions about ablations: would the answer change, and to what, without the hint, or a span, of the prompt?"""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pyarrow as pa

from ray_explain.questions.asking import askable, asked, plain_columns
from ray_explain.questions.wordings import ANSWERED, Wording, drawing
from ray_explain.stages import Result


def ablation_questions(
    effects: pa.Table,
    said: Callable[[str], str],
    *,
    d_model: int,
    wording: str,
    seed: int,
    special: Collection[str] = (),
) -> Result:
    """One question per ablation effect (records.ABLATION_EFFECTS); it holds no vector. Dropped are answers that
    are one of the target's `special` tokens.

    `d_model` is that of the table it will share a file with. The role of a question is the kind of its span. A span
    that is no hint is quoted: nothing else says which one of the prompt's is meant.

    Args:
        said: What a question about a hint shows of the prompt that the target reads (`ground_truth.mmlu.saying`).
    """
    draw = drawing(wording, "ablation", seed)
    effects, dropped = askable(effects, ("full_answer", "ablated_answer"), special, [None] * effects.num_rows)
    rows = [_question(effect, said, draw(effect["case_id"])) for effect in plain_columns(effects)]
    return asked(rows, [np.empty((0, d_model), np.float32)] * len(rows), d_model, dropped)


def _question(effect: dict[str, Any], said: Callable[[str], str], wording: Wording) -> dict[str, Any]:
    word = effect["ablated_answer" if effect["changed"] else "full_answer"].strip()
    answer = wording.effect(effect["changed"], word if wording.brief else ANSWERED.format(word=word))
    return {
        **{name: effect[name] for name in ("case_id", "group", "split", "stratum", "changed")},
        "task": "ablation",
        "prompt": _prompt(effect, said, wording),
        "answer": answer,
        "answers": [answer],
        "layers": [],
        "role": effect["kind"],
        "wording": wording.id,
    }


def _prompt(effect: dict[str, Any], said: Callable[[str], str], wording: Wording) -> str:
    prompt = effect["prompt"]
    if effect["kind"] == "hint":
        return wording.prompt(prompt=said(prompt))
    return wording.quoting.prompt(prompt=prompt, span=prompt[effect["span_start"] : effect["span_end"]].strip())
