"""Reading an explainer's answer: what it says would happen, and to what."""

import re
from typing import Literal, NamedTuple

Verdict = Literal["changed", "unchanged"]

# ">>>" that closes is the last three of a run: the content may itself end in ">".
_OPEN, _CLOSE = r"\s*<<<\s*", r"\s*>>>(?!>)"
_VERDICTS: dict[Verdict, re.Pattern[str]] = {
    "unchanged": re.compile(rf"remain\s+unchanged\s+from{_OPEN}(.*?){_CLOSE}", re.DOTALL | re.IGNORECASE),
    "changed": re.compile(rf"change\s+to{_OPEN}(.*?){_CLOSE}", re.DOTALL | re.IGNORECASE),
}


class Parsed(NamedTuple):
    """What an answer says. Both are None if it cannot be read; a description has no verdict."""

    verdict: Verdict | None
    content: str | None  # normalised: what it would change to, what it stays, or the description


def normalise(text: str) -> str:
    """`text` as it is compared: lower-case, single spaces, none beside <<< and >>> but one before <<<, no final stop.

    So "the output ... from <<< paris >>> ." is "The output ... from <<<Paris>>>." (the paper, section 5, and
    tokenizers that write a space before every token).
    """
    text = re.sub(r"\s+", " ", text)
    text = re.sub(_CLOSE + r"\s*", ">>>", re.sub(_OPEN, " <<<", text))
    return text.strip().rstrip(".").rstrip().lower()


def first_answer(text: str) -> str:
    """What a model says before it goes on with something else, the next question perhaps: the first line, as far as the
    content that it closes (the paper's stop strings, section 4.1). Who was never trained to answer does not stop by
    itself."""
    line = text.strip().split("\n", 1)[0]
    closed = re.search(rf"{_CLOSE}\s*\.?", line)
    return line[: closed.end()] if closed else line


def parse(text: str, task: str) -> Parsed:
    """What an answer to a question of `task` says.

    An answer to a patching or ablation question is read if it holds exactly one of the paper's two verdicts with its
    content between <<< and >>>; a description if it is not empty.
    """
    if task == "features":
        return Parsed(None, normalise(text) or None)
    found = [(verdict, match) for verdict, pattern in _VERDICTS.items() for match in pattern.findall(text)]
    if len(found) != 1:
        return Parsed(None, None)
    verdict, content = found[0]
    return Parsed(verdict, re.sub(r"\s+", " ", content).strip().lower())
