"""A language model as judge of descriptions: how well does an answer say what the right description says?

The paper's scale: 1 is unrelated and 5 the same, an answer's score is (mark - 1) / 4 against the nearest of
the right descriptions. What could not be judged stays unscored; it is never given a mark.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_explain import records, storage
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

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A chat model at any endpoint that speaks the OpenAI protocol."""

    model: str
    cache: str  # folder, local or remote; a mark that was given once is not asked for again
    endpoint: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; an unset one sends none
    tries: int = 5
    pause: float = 1.0  # seconds before the second try; doubled before each further one
    timeout: float = 60.0  # seconds
    threads: int = 8

    def marks(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """The mark, 1 to 5, of each (predicted, expected) pair; None where the endpoint gave none in `tries`.

        Raises:
            ValueError: the endpoint refuses to be asked like this: a wrong key, model or address.
        """
        different = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(self.threads) as threads:
            marks = dict(zip(different, threads.map(self._mark, different), strict=True))
        return [marks[pair] for pair in pairs]

    def _mark(self, pair: tuple[str, str]) -> int | None:
        file = f"{self.cache}/{records.content_id(self.model, INSTRUCTION, *pair)}.json"
        if storage.exists(file):
            return int(storage.read_json(file)["mark"])
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            mark = _mark_in(self._reply(INSTRUCTION.format(predicted=pair[0], expected=pair[1])))
            if mark is not None:
                kept = {"model": self.model, "predicted": pair[0], "expected": pair[1], "mark": mark}
                storage.write_json(kept, file)
                return mark
        return None

    def _reply(self, prompt: str) -> str | None:
        """What the model says; None if the endpoint is busy, out of reach, or sends something else."""
        try:
            with urllib.request.urlopen(self._request(prompt), timeout=self.timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            if error.code in _RETRIED:
                return None
            raise ValueError(
                f"the judge {self.model!r} at {self.endpoint} refuses with {error.code} {error.reason}: check the "
                f"address, the model's name, and the key in ${self.key_variable}"
            ) from error
        except (OSError, http.client.HTTPException, json.JSONDecodeError, KeyError, IndexError, TypeError):
            return None

    def _request(self, prompt: str) -> urllib.request.Request:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 10,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        return urllib.request.Request(f"{self.endpoint}/chat/completions", json.dumps(body).encode(), headers)


def judged(graded: pa.Table, questions: pa.Table, answers: pa.Table, judge: Judge) -> pa.Table:
    """`graded` with the judge's scores of descriptions, 0 to 1; null where one of the marks is missing, and for answers
    of other tasks. An empty answer is 0.

    Raises:
        ValueError: `graded` is not of these questions and answers, or the judge refuses.
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
    """What is to be judged of an answer; nothing of an empty one, None if it is no description."""
    if task != "features":
        return None
    return [(text.strip(), each) for each in right] if parse(text, task).content else []


def _score(marks: Sequence[int | None]) -> float | None:
    known = [mark for mark in marks if mark is not None]
    if len(known) < len(marks):
        return None
    return max(((mark - 1) / 4 for mark in known), default=0.0)


def _mark_in(reply: str | None) -> int | None:
    found = re.fullmatch(r"\s*([1-5])\s*\.?\s*", reply or "")
    return int(found.group(1)) if found else None
