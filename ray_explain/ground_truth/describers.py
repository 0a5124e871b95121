"""What a feature responds to, said by a language model that sees its exemplars, or by those who published it.

Bills et al. 2023 and Neuronpedia describe features like this; the prompts are our own. Only every second top window is
shown, so that the others can score what was said (`shown`, `held_out`).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from typing import Any, ClassVar, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.endpoints import Ask, Chat, Endpoint
from ray_explain.features.simulate import opening, pad_of
from ray_explain.ground_truth.chats import chat_prompt
from ray_explain.ground_truth.corpora import rows_about
from ray_explain.ground_truth.exemplars import EXEMPLARS
from ray_explain.interventions.tokens import token_batch
from ray_explain.models import load_model
from ray_explain.stages import Result

T = TypeVar("T")
UNDESCRIBED = "undescribed"
WARMTH = 0.7  # temperature of all candidates but the first
DESCRIPTION_TOKENS = 60
SHOWN_TOP = 10
_LONGEST = 400  # characters; what is longer is no description
_ON = 0.5  # of a feature's highest activation: tokens from there on are marked

SYSTEM = (
    "You study a language model. Its features are directions of its activations; each responds to something in text."
)
INSTRUCTION = """\
Below are passages on which one feature is active. The tokens on which it is most active stand between << and >>.
Say what the feature responds to, in one phrase of at most fifteen words: what the marked tokens and what stands \
around them have in common. Do not mention features, tokens or passages. Reply with one line that begins \
with "Description:".

{passages}
"""
_BEFORE = re.compile(r"^\s*[\"'*]*description[\"'*]*\s*:\s*[\"'*]*", re.IGNORECASE)

DESCRIBED = pa.schema(
    [
        *EXEMPLARS,
        pa.field(
            "descriptions",
            pa.list_(pa.struct([records.DESCRIPTIONS.field(name) for name in ("description", "origin")])),
            nullable=False,
        ),
    ]
)


class Replies(Protocol):
    """A language model, wherever it runs."""

    def replies(self, asks: Sequence[Ask], read: Callable[[Ask, str], T | None]) -> list[T | None]:
        """What `read` makes of each request and the reply to it; None where none came that it could read."""
        ...

    def usage_so_far(self) -> Mapping[str, float]:
        """Counts since the last call, by name."""
        ...


class EndpointModel:
    """A chat model at an endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._chat = Chat(endpoint)

    def replies(self, asks: Sequence[Ask], read: Callable[[Ask, str], T | None]) -> list[T | None]:
        """Raises: BadInput, JobFailed: as `Chat.replies`."""
        return self._chat.replies(asks, read)

    def usage_so_far(self) -> Mapping[str, float]:
        usage, self._chat = self._chat.usage, Chat(self._chat.endpoint)
        counts = {name: value for name, value in usage.plain().items() if name != "failures" and value}
        return counts | {f"failed: {why}": n for why, n in usage.failures.items()}


class LocalModel:
    """A Hugging Face language model in this process. Chat models read the request as a chat, others as plain text."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 16) -> None:
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._counts = {"asked": 0, "unanswered": 0}

    def replies(self, asks: Sequence[Ask], read: Callable[[Ask, str], T | None]) -> list[T | None]:
        found: dict[Ask, T | None] = {}
        for warm in (False, True):  # sampled replies one by one, so that each depends on its own request alone
            some = list(dict.fromkeys(ask for ask in asks if (ask.temperature > 0) == warm))
            size = 1 if warm else self._batch_size
            for start in range(0, len(some), size):
                batch = some[start : start + size]
                found |= zip(batch, map(read, batch, self._generated(batch)), strict=True)
        self._counts["asked"] += len(found)
        self._counts["unanswered"] += sum(reply is None for reply in found.values())
        return [found[ask] for ask in asks]

    def usage_so_far(self) -> Mapping[str, float]:
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts

    @torch.no_grad()
    def _generated(self, asks: Sequence[Ask]) -> list[str]:
        pad = pad_of(self._tokenizer)
        batch = token_batch([self._ids(ask) for ask in asks], pad, self._model.device)
        sampling: dict[str, Any] = {"do_sample": False}
        if asks[0].temperature > 0:
            torch.manual_seed(int(hashlib.sha256(json.dumps(asks[0]).encode()).hexdigest()[:8], 16))
            sampling = {"do_sample": True, "temperature": asks[0].temperature, "top_k": 0, "top_p": 1.0}
        generate: Any = self._model.generate
        out = generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max(ask.max_tokens for ask in asks),
            pad_token_id=pad,
            **sampling,
        )
        longest = batch.input_ids.shape[1]
        return [
            str(self._tokenizer.decode(row[longest:][: ask.max_tokens], skip_special_tokens=True))
            for row, ask in zip(out, asks, strict=True)
        ]

    def _ids(self, ask: Ask) -> list[int]:
        """The request in tokens; of one too long for the model, the end."""
        if self._tokenizer.chat_template:
            text = chat_prompt(self._tokenizer, user=ask.prompt, system=ask.system or None)
            ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = opening(self._tokenizer, f"{ask.system}\n\n{ask.prompt}".strip() + "\n")
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return ids[-(most - ask.max_tokens) :] if most else ids  # type: ignore[no-any-return]


def language_model(config: Mapping[str, Any]) -> Replies:
    """The model of a section `endpoint` or `local`; an endpoint's config has `cache` besides."""
    if config["kind"] == "endpoint":
        return EndpointModel(Endpoint(**{name: value for name, value in config.items() if name != "kind"}))
    loaded = load_model(config["path"], revision=config["revision"], dtype=config["dtype"])
    return LocalModel(loaded.model, loaded.tokenizer, config["batch_size"])


def shown(windows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The top windows that a describer may see: the best, the third, ..."""
    return [window for window in windows if window["kind"] == "top" and window["rank"] % 2 == 0]


def held_out(windows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The windows that descriptions are scored on: the top ones that no describer saw, random ones and near misses.

    Each text once: corpora repeat themselves, so that a text may be among the shown ones too, and where a feature is
    seldom off, its random windows and near misses are the same.
    """
    known = {tuple(window["tokens"]) for window in shown(windows)}
    found = []
    for window in windows:
        text = tuple(window["tokens"])
        if text not in known:
            known.add(text)
            found.append(window)
    return found


class DescribeStage:
    """Asks a language model for descriptions of features; a feature of which it gives none is dropped.

    Config: that of `language_model` under `describer`, and `candidates`.
    """

    schema_in: ClassVar[pa.Schema] = EXEMPLARS
    schema_out: ClassVar[pa.Schema] = DESCRIBED

    def __init__(self, config: dict[str, Any]) -> None:
        self._model, self._candidates = language_model(config["describer"]), config["candidates"]
        self._origin = config["describer"].get("model") or config["describer"]["path"]

    def __call__(self, table: pa.Table) -> Result:
        features = table.to_pylist()
        asks = [self._ask(feature["windows"], i) for feature in features for i in range(self._candidates)]
        replies = iter(self._model.replies(asks, lambda _, reply: description_in(reply)))
        told = []
        for _ in features:
            own = dict.fromkeys(text for text in (next(replies) for _ in range(self._candidates)) if text)
            told.append([{"description": text, "origin": self._origin} for text in own])
        return _described(features, told)._replace(measured=self._model.usage_so_far())

    def _ask(self, windows: Sequence[dict[str, Any]], candidate: int) -> Ask:
        passages = "\n".join(f"{i}. {marked(window)}" for i, window in enumerate(shown(windows)[:SHOWN_TOP], start=1))
        return Ask(
            INSTRUCTION.format(passages=passages),
            max_tokens=DESCRIPTION_TOKENS,
            temperature=WARMTH if candidate else 0.0,
            sample=candidate,
            system=SYSTEM,
        )


class ImportStage:
    """Gives features the descriptions that others wrote; a feature without any is dropped.

    Config: `labels`, folder of the table `neuronpedia.LABELS`.
    """

    schema_in: ClassVar[pa.Schema] = EXEMPLARS
    schema_out: ClassVar[pa.Schema] = DESCRIBED

    def __init__(self, config: dict[str, Any]) -> None:
        self._folder = config["labels"]

    def __call__(self, table: pa.Table) -> Result:
        features, labels = table.to_pylist(), self._labels(table)
        return _described(features, [labels.get((row["layer"], row["feature_id"]), []) for row in features])

    def _labels(self, table: pa.Table) -> dict[tuple[int, int], list[dict[str, str]]]:
        found: dict[tuple[int, int], list[dict[str, str]]] = {}
        for row in rows_about(self._folder, table).to_pylist():
            told = {"description": row["description"], "origin": row["origin"]}
            found.setdefault((row["layer"], row["feature_id"]), []).append(told)
        return found


def labelled(exemplars: pa.Table, descriptions: pa.Table) -> Result:
    """Exemplars with the descriptions (records.DESCRIPTIONS) that came with the features, as a describer would give
    them. A feature without any is dropped, unless it is one of the test split on whose windows answers can be scored.
    """
    told: dict[str, list[dict[str, str]]] = {}
    descriptions = descriptions.filter(pc.is_in(descriptions["case_id"], pc.unique(exemplars["case_id"])))
    for row in descriptions.select(["case_id", "description", "origin"]).to_pylist():
        told.setdefault(row.pop("case_id"), []).append(row)
    features = exemplars.to_pylist()
    own = [told.get(feature["case_id"], []) for feature in features]
    kept = [feature["split"] == "test" and can_score(held_out(feature["windows"])) for feature in features]
    return _described(features, own, kept)


def can_score(windows: Sequence[dict[str, Any]]) -> bool:
    """Whether these windows (`held_out`) tell a description from another: in some of them the feature is on."""
    return any(window["kind"] == "top" for window in windows)


def _described(
    features: Sequence[dict[str, Any]], told: Sequence[list[dict[str, str]]], kept: Iterable[bool] = repeat(False)
) -> Result:
    """The features with what is told of each; dropped are those of which nothing is, unless they are `kept`."""
    rows, dropped = [], []
    for feature, own, bare in zip(features, told, kept):
        if own or bare:
            rows.append(feature | {"descriptions": own})
        else:
            dropped.append((feature["case_id"], UNDESCRIBED))
    return Result(records.rows_table(rows, DESCRIBED), dropped)


def marked(window: Mapping[str, Any]) -> str:
    """The text of a window on one line, with << and >> around what the feature responds to most."""
    limit = _ON * max(window["activations"], default=0)
    text, open_ = "", False
    for token, activation in zip(window["tokens"], window["activations"], strict=True):
        on = activation > 0 and activation >= limit
        if on != open_:
            text += "<<" if on else ">>"
        text, open_ = text + token, on
    return " ".join((text + (">>" if open_ else "")).split())


def description_in(reply: str) -> str | None:
    """The description that a reply gives: its line that begins with "Description:", or else its only line.

    None if there is no such line, or one too long for a description.
    """
    lines = [line.strip() for line in reply.strip().splitlines() if line.strip()]
    said = [line for line in lines if _BEFORE.match(line)]
    line = said[0] if said else lines[0] if len(lines) == 1 else ""
    text = _BEFORE.sub("", line).strip().strip("\"'*").strip()
    return text if text and len(text) <= _LONGEST and any(map(str.isalnum, text)) else None
