"""Questions for models that were never trained to explain: with the form of the answer, and some answered examples."""

import random
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.questions.asking import plain_columns
from ray_explain.questions.wordings import ANSWERED, CHANGED, UNCHANGED

BEST_SELFIE = "SelfIE best scale"  # the best of its answers, chosen by the truth
_EFFECT = "Answer with exactly one of these two sentences and nothing else, where X is the output:\n{sentences}"
_INSTRUCTIONS = {
    "patching": _EFFECT.format(sentences=f"{UNCHANGED}\n{CHANGED}".format(content="X")),
    "ablation": _EFFECT.format(sentences=f"{UNCHANGED}\n{CHANGED}".format(content=ANSWERED.format(word="X"))),
    "features": "Answer with a short description and nothing else.",
}
_BRIEF_EFFECT = f"answer with one : {UNCHANGED.format(content='?')} {CHANGED.format(content='?')}"


def shots_label(shots: int) -> str:
    """What such answers are called: `zero-shot`, `4-shot`."""
    return f"{shots}-shot" if shots else "zero-shot"


def selfie_label(scale: float) -> str:
    """What SelfIE's answers at a scale are called: `SelfIE x5`."""
    return f"SelfIE x{scale:g}"


def prompted(questions: pa.Table, examples: pa.Table) -> pa.Table:
    """`questions` with prompts that say how to answer and hold the answered `examples`, the same ones for all; their
    vectors come before the question's own. Nothing else is changed, so that answers pair up by question.

    The instruction is that of the paper's zero-shot prompt (appendix H.3), with the sentence that is scored as right.
    """
    width = questions.schema.field("vectors").type.value_type.list_size
    before, shown = records.vectors_of(examples["vectors"]), plain_columns(examples)
    prompts = [_prompt(row, shown) for row in plain_columns(questions)]
    vectors = [np.concatenate([*before, each]) for each in records.vectors_of(questions["vectors"])]
    for name, column in (
        ("prompt", pa.array(prompts, pa.string())),
        ("vectors", records.vectors_array(vectors, width)),
    ):
        at = questions.column_names.index(name)
        questions = questions.set_column(at, questions.schema.field(name), column)
    return questions


def shown_examples(training: pa.Table, *, shots: int, seed: int) -> list[int]:
    """Rows of the questions that are shown: such as change the output and such as do not in turn, as far as there are
    such, each group once if that is enough; all of them where there are no more than `shots`.

    Args:
        training: Their columns `group` and `changed`.
    """
    groups, changed = (training[name].to_pylist() for name in ("group", "changed"))
    rng = random.Random(f"shots {shots} {seed}")
    seen: set[str] = set()
    first, again = list[int](), list[int]()
    for row in rng.sample(range(len(groups)), len(groups)):
        (again if groups[row] in seen else first).append(row)
        seen.add(groups[row])
    kinds = [[row for row in [*first, *again] if bool(changed[row]) is kind] for kind in (False, True)]
    in_turn = [row for pair in zip_longest(*kinds) for row in pair if row is not None]
    return in_turn[:shots]


def _prompt(question: dict[str, Any], examples: Sequence[dict[str, Any]]) -> str:
    brief = question["wording"].startswith("brief/")
    short = "" if question["task"] == "features" else _BRIEF_EFFECT
    instruction = short if brief else _INSTRUCTIONS[question["task"]]
    parting = " " if brief else "\n"
    shown = [f"{example['prompt'].strip()}{parting}{example['answer'].strip()}" for example in examples]
    parts = [part for part in (instruction, *shown, question["prompt"].strip()) if part]
    return (" " if brief else "\n\n").join(parts)
