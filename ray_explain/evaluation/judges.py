"""A language model as judge of descriptions: how well does an answer say what the right description says?

The paper's scale: 1 is unrelated and 5 the same, an answer's score is (mark - 1) / 4 against the nearest of
the right descriptions. What could not be judged stays unscored; it is never given a mark.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from ray_explain.endpoints import Ask, Chat
from ray_explain.evaluation.answers import parse

INSTRUCTION = """\
Two descriptions say when a feature of a language model is active. Judge whether the predicted one describes the same \
thing as the expected one. Marks:
1: unrelated (predicted: cooking recipes; expected: stock markets)
2: mostly unrelated (predicted: cats and dogs; expected: livestock on a farm)
3: somewhat related (predicted: rain and storms; expected: the change of the seasons)
4: related and close in meaning (predicted: jazz bands; expected: music)
5: the same or nearly so (predicted: tragedies by Shakespeare; expected: Shakespeare's plays)
If you hesitate between 4 and 5, choose 5. Reply with one digit and nothing else.

Predicted: {predicted}
Expected: {expected}"""

MARK_TOKENS = 10


class Judge:
    """A chat model that marks descriptions; a mark that was given once is not asked for again."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat

    def marks(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """The mark, 1 to 5, of each (predicted, expected) pair; None where the endpoint gave none.

        Raises:
            BadInput, JobFailed: as `Chat.replies`.
        """
        prompts = [INSTRUCTION.format(predicted=predicted, expected=expected) for predicted, expected in pairs]
        asks = [Ask(prompt, max_tokens=MARK_TOKENS) for prompt in prompts]
        return self._chat.replies(asks, lambda _, reply: _mark_in(reply))


def judged(graded: pa.Table, questions: pa.Table, answers: pa.Table, judge: Judge) -> pa.Table:
    """`graded` with the judge's scores of descriptions, 0 to 1; null where one of the marks is missing, for answers of
    other tasks and where no right answer is known. An empty answer is 0.

    Raises:
        ValueError: `graded` is not of these questions and answers.
        BadInput, JobFailed: as `Judge.marks`.
    """
    right = dict(zip(questions["question_id"].to_pylist(), questions["answers"].to_pylist(), strict=True))
    texts = {_key(row): row["text"] for row in answers.to_pylist()}
    rows = graded.select(["question_id", "explainer", "control", "task"]).to_pylist()
    if strange := [row for row in rows if row["question_id"] not in right or _key(row) not in texts]:
        raise ValueError(f"{len(strange)} graded answers are not among these answers (such as {strange[0]})")
    asked = [_pairs(row["task"], texts[_key(row)], right[row["question_id"]]) for row in rows]
    marks = iter(judge.marks([pair for pairs in asked for pair in pairs or []]))
    scores = [None if pairs is None else _score([next(marks) for _ in pairs]) for pairs in asked]
    at = graded.column_names.index("judged")
    return graded.set_column(at, graded.schema.field("judged"), pa.array(scores, pa.float64()))


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["question_id"], row["explainer"], row["control"]


def _pairs(task: str, text: str, right: Sequence[str]) -> list[tuple[str, str]] | None:
    """What is to be judged of an answer; nothing of an empty one, None if it is no description or none is right."""
    if task != "features" or not right:
        return None
    return [(text.strip(), each) for each in right] if parse(text, task).content else []


def _score(marks: Sequence[int | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    if len(known) < len(marks):
        return None
    return max(((mark - 1) / 4 for mark in known), default=0.0)


def _mark_in(reply: str) -> int | None:
    found = re.fullmatch(r"\s*([1-5])\s*\.?\s*", reply)
    return int(found.group(1)) if found else None
