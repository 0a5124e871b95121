"""From characters of a text to tokens of a tokenizer, and what part a token plays in a prompt about a subject.

Works for every fast tokenizer, through its offsets. A token belongs to a span if it holds one of its characters:
" Rome" belongs to "Rome", and all byte tokens of one character belong to the span of that character.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from ray_explain.explainer.examples import unknown_id

Case = TypeVar("Case")
Made = TypeVar("Made")

ROLES = ("subject_first", "subject_last", "relation", "final", "other")
"""Of the tokens of a prompt about a subject: the first and the last one of the subject (a subject of one token has only
a last one), those between subject and end, the last one of the prompt, and all others."""

EMPTY_PROMPT = "the prompt is empty"
OUTSIDE = "a span outside the text"
NO_TOKEN = "a span without a token"
UNKNOWN_TOKEN = "an unknown token"
HALF_CHARACTER = "half a character (a lone surrogate)"


class Unusable(ValueError):
    """A case that cannot be made or measured. The message is the short fixed phrase under which it is counted."""


def usable(cases: Iterable[tuple[str, Case]], make: Callable[[Case], Made]) -> tuple[list[Made], list[tuple[str, str]]]:
    """What `make` makes of each (id, case); and (id, reason) of those that it finds Unusable."""
    made, dropped = [], []
    for name, case in cases:
        try:
            made.append(make(case))
        except Unusable as reason:
            dropped.append((name, str(reason)))
    return made, dropped


def usable_rows(
    cases: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Made]
) -> tuple[list[tuple[int, Made]], list[tuple[str, str]]]:
    """As `usable`, of the cases of a table; what is made goes with its row."""
    numbered = ((case["case_id"], (row, case)) for row, case in enumerate(cases))
    return usable(numbered, lambda one: (one[0], make(one[1])))


class PromptTokens(NamedTuple):
    """A prompt as its target reads it. A special token that the tokenizer added has the empty range (0, 0)."""

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]  # characters of the prompt

    def is_text(self, position: int) -> bool:
        """Whether a token stands for characters of the prompt."""
        start, end = self.offsets[position]
        return start < end


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> PromptTokens:
    """The tokens of a prompt and the special ones that the tokenizer puts before it, but none behind it: what is asked
    is how the prompt goes on.

    A prompt that begins with the begin-of-text token, or all those special ones (GLM-4), as a rendered chat does, gets
    no second ones.

    Raises:
        Unusable: the prompt is empty, no text, or holds a word that the tokenizer does not know.
        ValueError: the tokenizer is not a fast one.
    """
    return reading(tokenizer, [prompt])(prompt)


def words_of_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[str]:
    """The text of each of its `prompt_tokens`, special ones included.

    Raises:
        Unusable, ValueError: as `prompt_tokens`.
    """
    return [str(tokenizer.decode([token])) for token in prompt_tokens(tokenizer, prompt).ids]


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text, such as begin-of-text."""
    with_them, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return tuple(with_them[: with_them.index(bare[0])]) if bare else ()


def reading(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str]) -> Callable[[str], PromptTokens]:
    """`prompt_tokens` for these prompts only: all are encoded in one call, which is several times faster.

    Raises:
        ValueError: the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets: load the fast tokenizer of this model")
    found: dict[str, PromptTokens | str] = {p: EMPTY_PROMPT if is_text(p) else HALF_CHARACTER for p in prompts}
    prefix = "".join(tokenizer.convert_ids_to_tokens(list(special_prefix(tokenizer))))
    begins = tuple(text for text in (tokenizer.bos_token, prefix) if text)
    for begun in (True, False):
        some = [p for p in found if p.strip() and is_text(p) and p.startswith(begins) == begun]
        if some:
            found |= zip(some, _encoded(tokenizer, some, begun))

    def tokens_of(prompt: str) -> PromptTokens:
        tokens = found[prompt]
        if isinstance(tokens, str):
            raise Unusable(tokens)
        return tokens

    return tokens_of


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: list[str], begun: bool) -> Iterator[PromptTokens | str]:
    """The tokens of each prompt, or the reason why it cannot be used."""
    # not verbose: whoever reads a prompt compares its length with the context
    more = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    encoded = tokenizer(prompts, add_special_tokens=not begun, **more)
    unknown = unknown_id(tokenizer)
    for ids, offsets, added in zip(*(encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))):
        n = len(ids) - next((i for i, special in enumerate(reversed(added)) if not special), 0)
        tokens = PromptTokens(tuple(ids[:n]), tuple(offsets[:n]))
        known = unknown not in ids or not any(i == unknown and tokens.is_text(at) for at, i in enumerate(ids))
        yield tokens if known else UNKNOWN_TOKEN


def is_text(string: str) -> bool:
    """Whether it is made of whole characters: JSON can hold halves of them, which no tokenizer or table takes."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def span_positions(tokens: PromptTokens, prompt: str, span: tuple[int, int]) -> list[int]:
    """Positions of the tokens that hold a character of `span` (start, end), spaces at its ends not counted.

    Raises:
        Unusable: the span is not within the prompt, or no token holds any of it.
    """
    start, end = checked_span(prompt, span)
    inner = prompt[start:end]
    start, end = start + len(inner) - len(inner.lstrip()), end - (len(inner) - len(inner.rstrip()))
    found = [at for at, (low, high) in enumerate(tokens.offsets) if low < high and low < end and high > start]
    if not found or start >= end:
        raise Unusable(NO_TOKEN)
    return found


def checked_span(prompt: str, span: tuple[int, int]) -> tuple[int, int]:
    """`span`.

    Raises:
        Unusable: it is empty, reversed or not within the prompt.
    """
    start, end = span
    if not 0 <= start < end <= len(prompt):
        raise Unusable(OUTSIDE)
    return start, end


def token_roles(
    tokens: PromptTokens,
    prompt: str,
    subject: tuple[int, int],
    *,
    statement_end: int | None = None,
    named: Sequence[tuple[str, tuple[int, int]]] = (),
) -> list[str | None]:
    """The role of each token, None for special tokens.

    Args:
        statement_end: Character at which the statement about the subject ends, if the prompt goes on after it; what
            follows is "other".
        named: Further (role, span) pairs; the last token of each span gets the role.

    Raises:
        Unusable: see `span_positions`.
    """
    of_subject = span_positions(tokens, prompt, subject)
    end = len(prompt) if statement_end is None else statement_end
    text = [at for at in range(len(tokens.ids)) if tokens.is_text(at)]
    roles: list[str | None] = [None] * len(tokens.ids)
    for at in text:
        roles[at] = "relation" if at > of_subject[-1] and tokens.offsets[at][0] < end else "other"
    for role, span in named:
        roles[span_positions(tokens, prompt, span)[-1]] = role
    roles[text[-1]] = "final"
    roles[of_subject[0]] = "subject_first"
    roles[of_subject[-1]] = "subject_last"
    return roles


def matched(
    base: PromptTokens, base_roles: Sequence[str | None], source: PromptTokens, source_roles: Sequence[str | None]
) -> dict[str, list[tuple[int, int]]]:
    """(base position, source position) pairs by role: the last token of a role with the last one of the other prompt,
    the one before with the one before, and so on while both have one.

    Left out are pairs before which, and at which, both prompts are the same: there, both runs are the same too.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for role in dict.fromkeys(role for role in base_roles if role is not None):
        places = [[at for at, own in enumerate(roles) if own == role] for roles in (base_roles, source_roles)]
        pairs = list(zip(reversed(places[0]), reversed(places[1])))[::-1]
        different = [(b, s) for b, s in pairs if base.ids[: b + 1] != source.ids[: s + 1]]
        if different:
            found[role] = different
    return found
