"""What an answer is likely to go on with, from the answers before it: drafts, which the explainer then verifies.

Speculative decoding (arXiv 2211.17192) with n-grams for the small model. Explainers' answers are a few fixed sentences
around a word or two, so that most of their tokens can be foretold, and many be checked in one forward pass.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

_ANY = -1  # stands for a token that is not looked at
_BEFORE = -2  # stands for what comes before an answer
_SEEN = 2  # so often a context has to have come before it foretells anything
_SHARE = 0.8  # of its sightings that have to have gone on alike
_Context = tuple[int, ...]


@dataclass
class _Next:
    """What came after one context."""

    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    seen: int = 0
    likeliest: int = _ANY

    def add(self, token: int) -> None:
        self.counts[token] += 1
        self.seen += 1
        if self.counts[token] > self.counts.get(self.likeliest, 0):
            self.likeliest = token

    @property
    def sure(self) -> bool:
        return self.counts[self.likeliest] >= _SHARE * self.seen


class Drafts:
    """Remembers how answers went on. Contexts are the three tokens before, or else the last one, or else the one before
    the last (a word that never came before ends as others at its place do).

    Args:
        never: Tokens that are not drafted: those that end an answer, those that ask for a vector.
    """

    def __init__(self, never: Collection[int] = ()) -> None:
        self._never = frozenset(never)
        self._after: dict[_Context, _Next] = {}

    def __bool__(self) -> bool:
        """Whether there was any answer yet."""
        return bool(self._after)

    def learn(self, answer: Sequence[int]) -> None:
        """Remember an answer, its end token included."""
        text = [_BEFORE] * 3 + list(answer)
        for place in range(3, len(text)):
            for context in _contexts(text[place - 3 : place]):
                if (after := self._after.get(context)) is None:
                    after = self._after[context] = _Next()
                after.add(text[place])

    def after(self, answer: Sequence[int], longest: int) -> list[int]:
        """At most `longest` tokens that `answer` probably goes on with; none where its next token is open."""
        text = [_BEFORE] * 3 + list(answer[-3:])
        n = len(text)
        while len(text) < n + longest:
            token = self._next(text[-3:])
            if token is None or token in self._never:
                break
            text.append(token)
        return text[n:]

    def _next(self, last: list[int]) -> int | None:
        for context in _contexts(last):
            after = self._after.get(context)
            if after is not None and after.seen >= _SEEN:
                return after.likeliest if after.sure else None
        return None


def _contexts(last: list[int]) -> tuple[_Context, _Context, _Context]:
    """From the most to the least telling."""
    a, b, c = last
    return (a, b, c), (c,), (b, _ANY)
