"""Questions for models that were never trained to explain: with the form of the answer, and some answered examples."""

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.questions.asking import plain_columns
from ray_explain.questions.wordings import CHANGED, UNCHANGED

BEST_SELFIE = "SelfIE best scale"  # the best of its answers, chosen by the truth
_EFFECT = (
    "Answer with exactly one of these two sentences and nothing else, where X is the output:\n"
    f"{UNCHANGED.format(content='X')}\n{CHANGED.format(content='X')}"
)
_FEATURE = "Answer with a short description and nothing else."
_BRIEF_EFFECT = f"answer with one : {UNCHANGED.format(content='?')} {CHANGED.format(content='?')}"


def shots_label(shots: int) -> str:
    """What such answers are called: `zero-shot`, `4-shot`."""
    return f"{shots}-shot" if shots else "zero-shot"


def selfie_label(scale: float) -> str:
    """What SelfIE's answers at a scale are called: `SelfIE x5`."""
    return f"SelfIE x{scale:g}"


def prompted(questions: pa.Table, training: pa.Table, *, shots: int, seed: int) -> pa.Table:
    """`questions` with prompts that say how to answer and hold `shots` answered `training` questions, the same ones for
    all; their vectors come before the question's own. Nothing else is changed, so that answers pair up by question.

    The instruction is that of the paper's zero-shot prompt (appendix H.3), with the sentence that is scored as right.
    Of the examples, every second one changes the output, as far as there are such. With fewer training questions than
    `shots`, all are shown.
    """
    width = questions.schema.field("vectors").type.value_type.list_size
    chosen = _examples(plain_columns(training), shots, random.Random(f"shots {shots} {seed}"))
    own = records.vectors_of(training["vectors"])
    before = [own[row] for row, _ in chosen]
    rows = plain_columns(questions)
    prompts = [_prompt(row, [example for _, example in chosen]) for row in rows]
    vectors = [np.concatenate([*before, each]) for each in records.vectors_of(questions["vectors"])]
    for name, column in (
        ("prompt", pa.array(prompts, pa.string())),
        ("vectors", records.vectors_array(vectors, width)),
    ):
        at = questions.column_names.index(name)
        questions = questions.set_column(at, questions.schema.field(name), column)
    return questions


def _examples(training: list[dict[str, Any]], shots: int, rng: random.Random) -> list[tuple[int, dict[str, Any]]]:
    """(row, question): such as change the output and such as do not in turn, each group once if that is enough."""
    order = rng.sample(range(len(training)), len(training))
    seen: set[str] = set()
    first, again = list[int](), list[int]()
    for row in order:
        (again if training[row]["group"] in seen else first).append(row)
        seen.add(training[row]["group"])
    kinds = [[row for row in [*first, *again] if bool(training[row]["changed"]) is kind] for kind in (False, True)]
    in_turn = [row for pair in zip_longest(*kinds) for row in pair if row is not None]
    return [(row, training[row]) for row in in_turn[:shots]]


def _prompt(question: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    brief = question["wording"].startswith("brief/")
    plain, short = (_FEATURE, "") if question["task"] == "features" else (_EFFECT, _BRIEF_EFFECT)
    instruction = short if brief else plain
    parting = " " if brief else "\n"
    shown = [f"{example['prompt'].strip()}{parting}{example['answer'].strip()}" for example in examples]
    parts = [part for part in (instruction, *shown, question["prompt"].strip()) if part]
    return (" " if brief else "\n\n").join(parts)
