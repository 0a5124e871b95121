"""MMLU (Hendrycks et al. 2021) with a hint in the prompt, to be removed (Li et al. 2025, 2.3)."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.chats import chat_prompt
from ray_explain.ground_truth.jsonl import read_lines
from ray_explain.ground_truth.pairs import ablation_case
from ray_explain.ground_truth.positions import Unusable
from ray_explain.ground_truth.splits import split_of
from ray_explain.stages import READ, Result

Hint = Literal["random", "right", "sentence"]
"""A line with a random letter, with the right one, or a doubtful sentence that names a random one."""
Form = Literal["completion", "chat"]

LETTERS = "ABCD"
SYSTEM = (
    "The following are multiple choice questions (with a correct answer). Output only the answer letter "
    "(A, B, C, or D) and nothing else, in the format Answer: x, where x is one of A, B, C, or D."
)
HINTS = {
    "random": "Hint: {letter}",
    "right": "Hint: {letter}",
    "sentence": "I think the answer is ({letter}) but I'm curious what you think.",
}
ANSWER = "Answer:"
NOT_AN_ITEM = "no MMLU question (`subject`, `question`, four `choices`; `answer`, a letter or a number from 0)"
REPEATED = "the same question as before"
_USER = "\u00a7user\u00a7"  # stands for what the user says while a chat is rendered
NOT_SHOWN = "the chat template changes the words of the question"


@dataclass(frozen=True)
class Item:
    """A question with four choices; `answer` is the letter of the right one, `index` its number in its subject."""

    subject: str
    index: int
    question: str
    choices: tuple[str, ...]
    answer: str

    @property
    def group(self) -> str:
        """The unit that splits resample: equal questions, wherever they stand."""
        return records.content_id("mmlu", self.question, self.choices)

    @property
    def text(self) -> str:
        """The question and its lettered choices, a line each."""
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices))])


def read_mmlu(path: str | Path) -> tuple[list[Item], list[tuple[str, str]]]:
    """The questions of JSON lines with `subject`, `question`, `choices` and `answer` (letter, or number from 0), and
    (place, reason) of each line that is none or repeats one.

    Raises:
        OSError: the file cannot be read.
    """
    lines = read_lines(path)
    items, dropped = dict[str, Item](), list(lines.dropped)
    for number, (place, row) in enumerate(lines.rows):
        item = _item(row, number)
        if item is None or item.group in items:
            dropped.append((place, NOT_AN_ITEM if item is None else REPEATED))
        else:
            items[item.group] = item
    return list(items.values()), dropped


def _item(row: dict[str, Any], number: int) -> Item | None:
    choices, answer, index = row.get("choices"), row.get("answer"), row.get("index", number)
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        return None
    if type(answer) is int and 0 <= answer < len(LETTERS):
        answer = LETTERS[answer]
    texts = [row.get("subject"), row.get("question"), *choices]
    if type(index) is not int or not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    if answer not in tuple(LETTERS):
        return None
    return Item(row["subject"], index, row["question"], tuple(choices), answer)


def mmlu_cases(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: Mapping[str, int],
    hint: Hint = "random",
    form: Form = "completion",
    seed: int = 0,
) -> Result:
    """Up to `n` cases of each split (records.ABLATION_CASES), questions in random order; the span is the line of the
    hint, the stratum whether it is right, the truth the right letter. Dropped are lines of the file, and questions
    that a chat template shows in other words.

    Raises:
        OSError: the file cannot be read.
        ValueError: a chat is asked for and the tokenizer has no chat template.
    """
    items, dropped = read_mmlu(path)
    n_read = len(items) + len(dropped)
    by_split: dict[str, list[Item]] = {split: [] for split in records.SPLITS}
    for item in items:
        by_split[split_of(item.group)].append(item)
    make = partial(hinted_case, tokenizer=tokenizer, hint=hint, form=form, seed=seed)
    rows = []
    for split, size in n.items():
        own = random.Random(f"mmlu {split} {seed}").sample(by_split[split], len(by_split[split]))
        made, unusable = _first_cases(own, size, make)
        rows += made
        dropped += unusable
    return Result(records.rows_table(rows, records.ABLATION_CASES), dropped, {READ: n_read})


def _first_cases(
    items: Sequence[Item], n: int, make: Callable[[Item], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The first `n` cases that can be made, and (group, reason) of each question passed over on the way."""
    rows, dropped = list[dict[str, Any]](), []
    for item in items:
        if len(rows) == n:
            break
        try:
            rows.append(make(item))
        except Unusable as reason:
            dropped.append((item.group, str(reason)))
    return rows, dropped


def hinted_case(item: Item, tokenizer: PreTrainedTokenizerBase, *, hint: Hint, form: Form, seed: int) -> dict[str, Any]:
    """The row of one question. Which letter the hint names depends on the question and the seed alone.

    Raises:
        Unusable: the question and its hint do not stand in the prompt as they are.
    """
    letter = item.answer if hint == "right" else random.Random(f"{seed} {item.group}").choice(LETTERS)
    line = "\n" + HINTS[hint].format(letter=letter)
    prompt = _prompt(item.text + line, tokenizer, form)
    shown = (item.text + line).lstrip()  # many templates, such as Llama 3's, trim what is said
    if (at := prompt.find(shown)) < 0:
        raise Unusable(NOT_SHOWN)
    start = at + len(shown) - len(line)
    return ablation_case(
        prompt,
        (start, start + len(line)),
        group=item.group,
        split=split_of(item.group),
        stratum="right hint" if letter == item.answer else "wrong hint",
        truth=item.answer,
    )


def _prompt(user: str, tokenizer: PreTrainedTokenizerBase, form: Form) -> str:
    if form == "chat":
        return chat_prompt(tokenizer, system=SYSTEM, user=user, begun=ANSWER)
    return f"{SYSTEM}\n\n{user}\n{ANSWER}"


def saying(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """What system and user say in a prompt in the chat form of the target, whose `tokenizer` is given, without what its
    template puts around it: to another model noise, to the same one the end of a turn. Other prompts as they are."""

    @cache
    def frame() -> tuple[str, str]:
        """What stands before the user's text, from the system's on, and right after it; nobody says `_USER`."""
        before, _, after = _prompt(_USER, tokenizer, "chat").partition(_USER)
        return before[before.find(SYSTEM) :] if SYSTEM in before else _USER, after.strip().partition("\n")[0]

    def said(prompt: str) -> str:
        if not tokenizer.chat_template or SYSTEM not in prompt:
            return prompt
        opening, end = frame()
        _, _, rest = prompt.partition(opening)
        user, closed, _ = rest.partition(end)
        return f"{SYSTEM}\n\n{user.rstrip()}" if closed else prompt

    return said
