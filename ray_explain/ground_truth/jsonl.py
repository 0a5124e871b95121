"""Cases from anyone's JSON lines: pairs of prompts to patch between, and prompts with a span to remove.

A patching line has `base_prompt`, `source_prompt`, `base_span` and `source_span`. Spans are [start, end] characters.
The tokens that hold any of them are patched, so both spans must have as many. An ablation line has `prompt` and `span`.
Every line may have `group` (default: all lines with its base prompt; or with its prompt, whole or without the span),
`split` (default: drawn by group) and `stratum`; further `role`, `base_truth`, `source_truth`, `site` and `kind` (of the
patch), or `kind` (of the span) and `truth`.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.pairs import REPLACE, Block, Change, Pair, SubjectPrompt, ablation_case, patching_case
from ray_explain.ground_truth.positions import (
    HALF_CHARACTER,
    Unusable,
    checked_span,
    prompt_tokens,
    span_positions,
    usable,
)
from ray_explain.ground_truth.splits import split_of
from ray_explain.stages import READ, Result

NOT_JSON = "not JSON"
NOT_UTF8 = "no UTF-8 text, as in a packed file"
NOT_AN_OBJECT = "no JSON object"
TOO_DEEP = "brackets in brackets, thousands deep"
LONG_NUMBER = "a number of thousands of digits"
NO_TEXT = "a prompt (`base_prompt` and `source_prompt`, or `prompt`) is missing or no text"
NO_SPAN = "a span (`base_span` and `source_span`, or `span`) is missing or not [start, end]"
NO_SPLIT = "an unknown split"
NO_GROUP = "an empty `group`"
NO_STRING = "a field that is no text"
UNMATCHED = "positions of base and source do not match"
REPEATED = "the same case as before"


class Lines(NamedTuple):
    """Rows of a file, and (place, reason) of each that is no row. Places read "line 3", from 1."""

    rows: list[tuple[str, Any]]
    dropped: list[tuple[str, str]]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.dropped)


def read_lines(path: str | Path) -> Lines:
    """The JSON objects of a file with one a line; empty lines say nothing.

    Raises:
        OSError: the file cannot be read.
    """
    numbered = enumerate(Path(path).read_bytes().split(b"\n"), start=1)
    lines = ((f"line {number}", line) for number, line in numbered if line.strip())
    return Lines(*usable(((place, (place, line)) for place, line in lines), lambda one: (one[0], json_object(one[1]))))


def json_object(line: bytes) -> dict[str, Any]:
    """What a line of JSON says.

    Raises:
        Unusable: it is no JSON object, or one that Python or a tokenizer cannot take.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if b"\\ud" in line.lower():  # where a surrogate is written, its other half may be missing
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise Unusable(NOT_JSON) from error
    except UnicodeDecodeError as error:
        raise Unusable(NOT_UTF8) from error
    except UnicodeEncodeError as error:
        raise Unusable(HALF_CHARACTER) from error
    except RecursionError as error:
        raise Unusable(TOO_DEEP) from error
    except ValueError as error:
        raise Unusable(LONG_NUMBER) from error
    if not isinstance(row, dict):
        raise Unusable(NOT_AN_OBJECT)
    return row


def patching_cases(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: Sequence[Block],
    n: Mapping[str, int],
    change: Change = REPLACE,
) -> Result:
    """Each line once with each block, up to `n` cases of each split (records.PATCHING_CASES), lines in order.

    `change` is of lines that say nothing else.
    """
    lines = read_lines(path)
    rows, dropped = usable(lines.rows, lambda row: _patching_rows(row, tokenizer, blocks, change))
    return _limited(rows, n, lines, dropped, records.PATCHING_CASES)


def ablation_cases(path: str | Path, *, n: Mapping[str, int]) -> Result:
    """Up to `n` cases of each split (records.ABLATION_CASES), lines in order."""
    lines = read_lines(path)
    removals, _ = usable(((place, row) for place, row in lines.rows if row.get("group") is None), _removal)
    linked = _linked(removals)
    rows, dropped = usable(lines.rows, lambda row: [_ablation_row(row, linked)])
    return _limited(rows, n, lines, dropped, records.ABLATION_CASES)


def _patching_rows(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, blocks: Sequence[Block], otherwise: Change
) -> list[dict[str, Any]]:
    prompts, positions = [], []
    for name in ("base", "source"):
        text, span = _text(row, f"{name}_prompt"), _span(row, f"{name}_span")
        prompts.append(SubjectPrompt(text, span, _string(row, f"{name}_truth", None)))
        tokens = prompt_tokens(tokenizer, text)
        positions.append(span_positions(tokens, text, checked_span(text, span)))
    if len(positions[0]) != len(positions[1]):
        raise Unusable(UNMATCHED)
    group, split = _group_and_split(row, prompts[0].text)
    pair = Pair(prompts[0], prompts[1], group=group, split=split, stratum=_string(row, "stratum", "all"))
    change = Change(_string(row, "site", otherwise.site), _string(row, "kind", otherwise.kind))
    return [patching_case(pair, _string(row, "role", "other"), block, *positions, change=change) for block in blocks]


def _removal(row: dict[str, Any]) -> tuple[str, tuple[int, int]]:
    prompt = _text(row, "prompt")
    return prompt, checked_span(prompt, _span(row, "span"))


def _linked(removals: Sequence[tuple[str, tuple[int, int]]]) -> dict[str, str]:
    """For each prompt the first, by its text, of those whose answers it tells: two are linked where they are the same
    whole or without a span, and so are those that a third one links."""
    above: dict[str, str] = {}

    def top(text: str) -> str:
        while above.setdefault(text, text) != text:
            above[text] = text = above[above[text]]
        return text

    for prompt, (start, end) in removals:
        above[top(prompt)] = top(prompt[:start] + prompt[end:])
    first: dict[str, str] = {}
    return {prompt: first.setdefault(top(prompt), prompt) for prompt in sorted({prompt for prompt, _ in removals})}


def _ablation_row(row: dict[str, Any], linked: Mapping[str, str]) -> dict[str, Any]:
    prompt, span = _removal(row)
    group, split = _group_and_split(row, linked.get(prompt, prompt))
    kind, stratum = _string(row, "kind", "span"), _string(row, "stratum", "all")
    truth = _string(row, "truth", None)
    return ablation_case(prompt, span, group=group, split=split, kind=kind, stratum=stratum, truth=truth)


def _group_and_split(row: dict[str, Any], prompt: str) -> tuple[str, str]:
    """Lines about one `prompt`, or ones linked to it, are in one group: split up, training would tell what the target
    answers in the test."""
    group = _string(row, "group", records.content_id("line", prompt))
    if not group.strip():
        raise Unusable(NO_GROUP)
    split = _string(row, "split", split_of(group))
    if split not in records.SPLITS:
        raise Unusable(NO_SPLIT)
    return group, split


def _text(row: dict[str, Any], name: str) -> str:
    if not isinstance(row.get(name), str):
        raise Unusable(NO_TEXT)
    return row[name]


def _span(row: dict[str, Any], name: str) -> tuple[int, int]:
    span = row.get(name)
    if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
        raise Unusable(NO_SPAN)
    return span[0], span[1]


def _string(row: dict[str, Any], name: str, otherwise: Any) -> Any:
    value = row.get(name)
    if value is None:
        return otherwise
    if not isinstance(value, str):
        raise Unusable(NO_STRING)
    return value


def _limited(
    rows_of_lines: Sequence[list[dict[str, Any]]],
    n: Mapping[str, int],
    lines: Lines,
    unusable: list[tuple[str, str]],
    schema: Any,
) -> Result:
    """The first `n` cases of each split; a case that was there before is dropped."""
    counts, kept, seen, dropped = Counter[str](), [], set[str](), lines.dropped + unusable
    for row in (row for rows in rows_of_lines for row in rows):
        if row["case_id"] in seen:
            dropped.append((row["case_id"], REPEATED))
        elif counts[row["split"]] < n.get(row["split"], 0):
            kept.append(row)
            counts[row["split"]] += 1
        seen.add(row["case_id"])
    return Result(records.rows_table(kept, schema), dropped, {READ: lines.size})
