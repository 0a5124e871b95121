"""How far a description can be trusted: what a simulator, and a model that tells windows apart, make of it.

Scored on windows that its describer did not see (`describers.held_out`): top ones, random ones in which the feature is
off, and near misses.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from ray_explain import records
from ray_explain.endpoints import Ask
from ray_explain.features.simulate import UNSCORED, Score, Simulator, detection_score, simulator_score
from ray_explain.ground_truth.describers import DESCRIBED, Replies, can_score, held_out, language_model
from ray_explain.ground_truth.dictionaries import directions_of
from ray_explain.models import load_model
from ray_explain.stages import Result

Texts = Sequence[Sequence[str]]  # windows as the texts of their tokens
Values = Float[np.ndarray, " pos"]
Windows = Sequence[dict[str, Any]]  # of exemplars.EXEMPLARS
Foretell = Callable[[Sequence[tuple[str, Texts]]], Sequence[list[Values] | None]]
"""Of each description and its windows, a value for each token; None where one could not be had."""
LEVEL = 10  # activations are foretold on a scale from 0 to this
_SCORE_FIELDS = [
    pa.field(name, pa.int32() if name.endswith("_n") else pa.float32())
    for name in ("score_low", "score_high", "score_n", "detection", "detection_low", "detection_high", "detection_n")
]
_TOLD = pa.list_(
    pa.struct(
        [
            *(records.DESCRIPTIONS.field(name) for name in ("description", "origin", "score", "gold")),
            *_SCORE_FIELDS,  # null where there is no such score; intervals are of 95 %, n counts windows
        ]
    )
)

SIMULATE = """\
A feature of a language model responds to: {description}

Below is a text as numbered tokens. For each token, foretell how active the feature is on it, as a whole number from 0 \
(not at all) to {level} (most). Most tokens of most texts are 0. Reply with a JSON list of {n} numbers and nothing else.

{tokens}"""
DETECT = """\
A feature of a language model responds to: {description}

For each of the texts below, tell whether the feature is active somewhere in it. Reply with a JSON list of {n} \
numbers, 1 for active and 0 for not, and nothing else.

{texts}"""


def asked_values(model: Replies, asked: Sequence[tuple[str, Texts]]) -> list[list[Values] | None]:
    """As `Foretell`, by any language model that is asked for a number for each token."""
    asks = [(_simulation(description, window), len(window)) for description, own in asked for window in own]
    found = iter(lists_of_numbers(model, asks, LEVEL))
    values: list[list[Values] | None] = []
    for _, own in asked:
        replies = [next(found) for _ in own]
        whole = [np.array(reply, dtype=np.float32) for reply in replies if reply is not None]
        values.append(whole if len(whole) == len(own) else None)
    return values


def verdicts(model: Replies, asked: Sequence[tuple[str, Texts]]) -> list[list[bool] | None]:
    """Of each description, whether a language model takes each of its windows for active; None where it did not say."""
    found = lists_of_numbers(model, [(_detection(description, own), len(own)) for description, own in asked], 1)
    return [None if reply is None else [number == 1 for number in reply] for reply in found]


def lists_of_numbers(model: Replies, asks: Sequence[tuple[Ask, int]], top: int) -> list[list[float] | None]:
    """The replies to requests for JSON lists of so many numbers, from 0 to `top`; None for any other."""
    lengths = dict(asks)
    return model.replies([ask for ask, _ in asks], lambda ask, reply: numbers_in(reply, length=lengths[ask], top=top))


def numbers_in(reply: str, *, length: int, top: int) -> list[float] | None:
    """The JSON list of so many numbers from 0 to `top` in a reply; None if there is none, or one of another kind."""
    found = re.search(r"\[[^\[\]]*\]", reply)
    try:
        numbers = json.loads(found.group()) if found else None
    except json.JSONDecodeError:
        return None
    if not isinstance(numbers, list) or len(numbers) != length:
        return None
    if not all(type(number) in (int, float) and 0 <= number <= top for number in numbers):
        return None
    return [float(number) for number in numbers]


class ScoreStage:
    """Directions with their descriptions and what those are worth: the effects of the task `features`.

    A description that cannot be scored keeps a null, as do those of a feature that is on in no window of which its
    describer knew nothing: nothing is asked about it. Gold are those that are unscored or score at least `gold_from`.

    Config: that of `directions_of`, `d_model`, `simulator`, `detector` (or None), `gold_from`,
    `seed`.
    """

    schema_in: ClassVar[pa.Schema] = DESCRIBED

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._asked: dict[str, Replies] = {}
        self._foretell = self._simulator(config["simulator"])
        if config["detector"]:
            self._asked["detector"] = language_model(config["detector"])

    def _simulator(self, config: dict[str, Any] | None) -> Foretell | None:
        if config is None:
            return None
        if config["kind"] == "endpoint":
            self._asked["simulator"] = language_model(config)
            return partial(asked_values, self._asked["simulator"])
        loaded = load_model(config["path"], revision=config["revision"], dtype=config["dtype"])
        trained = Simulator(loaded.model, loaded.tokenizer, config["batch_size"])
        return lambda asked: [trained.of_texts(description, windows) for description, windows in asked]

    @property
    def schema_out(self) -> pa.Schema:
        own = records.features(self._config["d_model"])
        return pa.schema([*own, pa.field("descriptions", _TOLD, nullable=False)])

    def __call__(self, table: pa.Table) -> Result:
        features = table.to_pylist()
        scored = [windows if can_score(windows := held_out(feature["windows"])) else [] for feature in features]
        asked = [
            (told["description"], windows)
            for feature, windows in zip(features, scored, strict=True)
            if windows
            for told in feature["descriptions"]
        ]
        simulated, detected = iter(self._simulated(asked)), iter(self._detected(asked))
        for feature, windows in zip(features, scored, strict=True):
            for told in feature["descriptions"]:
                score, detection = (next(simulated), next(detected)) if windows else (UNSCORED, UNSCORED)
                told |= _columns(score, ("score", "score_low", "score_high", "score_n"))
                names = ("detection", "detection_low", "detection_high", "detection_n")
                told |= _columns(detection, names)
                told["gold"] = told["score"] is None or told["score"] >= self._config["gold_from"]
        return Result(self._rows(table, features), [], self._usage())

    def _simulated(self, asked: Sequence[tuple[str, Windows]]) -> list[Score]:
        if self._foretell is None:
            return [UNSCORED] * len(asked)
        found = self._foretell([(text, [w["tokens"] for w in windows]) for text, windows in asked])
        return [
            UNSCORED
            if values is None
            else simulator_score(
                values,
                [np.array(window["activations"], dtype=np.float32) for window in windows],
                [window["kind"] for window in windows],
                self._config["seed"],
            )
            for values, (_, windows) in zip(found, asked, strict=True)
        ]

    def _detected(self, asked: Sequence[tuple[str, Windows]]) -> list[Score]:
        if "detector" not in self._asked:
            return [UNSCORED] * len(asked)
        mixed = [(text, _mixed(windows)) for text, windows in asked]
        found = verdicts(self._asked["detector"], [(text, [w["tokens"] for w in windows]) for text, windows in mixed])
        return [
            UNSCORED if said is None else detection_score(said, [window["kind"] == "top" for window in windows])
            for said, (_, windows) in zip(found, mixed, strict=True)
        ]

    def _rows(self, table: pa.Table, features: Sequence[dict[str, Any]]) -> pa.Table:
        vectors = directions_of(self._config, table) if features else np.empty((0, self._config["d_model"]), np.float32)
        columns = [table.column(name).combine_chunks() for name in self.schema_out.names[:-2]]
        columns.append(records.vectors_array(list(vectors[:, None]), self._config["d_model"]))
        columns.append(pa.array([feature["descriptions"] for feature in features], type=_TOLD))
        return pa.table(columns, schema=self.schema_out)

    def _usage(self) -> dict[str, float]:
        return {
            f"{name}: {what}": number
            for name, model in self._asked.items()
            for what, number in model.usage_so_far().items()
        }


def _columns(score: Score, names: tuple[str, str, str, str]) -> dict[str, float | int | None]:
    """What is undefined, as of a simulator that foretells the same for all tokens, is null but for its windows."""
    values = (None,) * 3 if math.isnan(score.value) else score[:3]
    return dict(zip(names, (*values, score.n or None), strict=True))


def _mixed(windows: Windows) -> list[dict[str, Any]]:
    """In an order that tells nothing of their kinds."""
    return sorted(windows, key=lambda window: records.content_id("".join(window["tokens"])))


def _simulation(description: str, window: Sequence[str]) -> Ask:
    tokens = "\n".join(f"{i}: {json.dumps(token, ensure_ascii=False)}" for i, token in enumerate(window, start=1))
    prompt = SIMULATE.format(description=description, level=LEVEL, n=len(window), tokens=tokens)
    return Ask(prompt, max_tokens=4 * len(window) + 20)


def _detection(description: str, windows: Texts) -> Ask:
    texts = "\n".join(f"{i}. {' '.join(''.join(window).split())}" for i, window in enumerate(windows, start=1))
    return Ask(DETECT.format(description=description, n=len(windows), texts=texts), max_tokens=4 * len(windows) + 20)
