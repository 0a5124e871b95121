"""Texts of the world as words that know what they stand for."""

from collections.abc import Sequence
from typing import NamedTuple

OBJECT_WEIGHT, NAME_WEIGHT, FREE_WEIGHT = 3.0, 0.1, 0.1
"""Loss weights: of values that follow from what is told, of names of subjects, of words that nothing predicts."""


class Word(NamedTuple):
    """One token. `weight` is its weight in the target's loss. `subject` and `relation` are what the text around it
    tells of (empty: nothing yet), `part` its part in the document (a key of `wordings.PARTS`, or empty)."""

    text: str
    weight: float = 1.0
    subject: str = ""
    relation: str = ""
    part: str = ""


class Document(NamedTuple):
    """`kind` is a key of `wordings.DOCUMENT_KINDS`."""

    kind: str
    words: tuple[Word, ...]

    @property
    def text(self) -> str:
        """What the tokenizer turns back into exactly these words."""
        return " ".join(word.text for word in self.words)


class Prompt(NamedTuple):
    """Text that ends right before its answer, which is a single token. Spans are character ranges of the text by
    name: "subject"; "hint", with the space after it, in hinted quizzes: without that range the text is the same
    quiz unhinted."""

    text: str
    answer: str
    spans: dict[str, tuple[int, int]]


def span_of_words(words: Sequence[str], first: int, last: int) -> tuple[int, int]:
    """Characters of words `first` to `last` (included) when joined by single spaces."""
    start = sum(len(word) + 1 for word in words[:first])
    return start, start + len(" ".join(words[first : last + 1]))
