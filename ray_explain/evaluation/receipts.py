"""Live receipts: what an explainer says about its target, beside what the target does when it is really tried."""

import heapq
import math
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.evaluation.answering import AnswerStage
from ray_explain.evaluation.answers import parse
from ray_explain.evaluation.grading import grade
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.dictionaries import Windowed
from ray_explain.ground_truth.exemplars import token_texts
from ray_explain.ground_truth.mmlu import saying
from ray_explain.ground_truth.pairs import REPLACE, Block, Change, Pair, Span, SubjectPrompt, patching_case
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.positions import (
    ROLES,
    PromptTokens,
    Unusable,
    matched,
    prompt_tokens,
    span_positions,
    token_roles,
    words_of_tokens,
)
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.extraction import residuals
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.asking import asked
from ray_explain.questions.patching import patching_questions
from ray_explain.questions.wordings import drawing
from ray_explain.stages import Result
from ray_explain.world.concepts import concept_matrix, concepts_of, pearson
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World

DOCUMENTS = 1000  # of the world, on which a vector is tried
WINDOWS = 1000  # the same, of another corpus
STRONGEST = 6  # texts that are shown
_WINDOWS_AT_A_TIME = 64
_SHOWN = (12, 5)  # tokens of a window before the strongest one, and from it on
HERE = {"group": "asked", "split": "test", "stratum": "asked"}  # where a case belongs that is in no data set


class Receipt(NamedTuple):
    """One question: what was said and what was measured. `confirmed` is exact match, as evaluation counts it, and None
    where nothing is known to be right.
    """

    question: str
    answer: str
    confidence: float | None  # probability of the answer's tokens, all together; None where nothing was said
    measured: str  # the right answer, or "" where none is known
    readable: bool
    confirmed: bool | None
    details: tuple[str, ...] = ()  # of the measurement


class Responses(NamedTuple):
    """What the target's residual stream at one layer has of a vector, token by token over texts of the world."""

    best: str  # description of the concept that correlates best
    correlations: dict[str, float]  # of every concept's description
    strongest: tuple[tuple[str, str], ...]  # (token, its text) of the largest products


class Witness:
    """An explainer and the target it explains, each loaded when it is first needed.

    Args:
        explainer: Config of `AnswerStage`.
        target: Config of `ground_truth.target.Target`.
        wording: The set of wordings that the explainer was trained on.
        seed: Of the experiment: which wording of the set a case gets.
    """

    def __init__(self, explainer: dict[str, Any], target: dict[str, Any], *, wording: str, seed: int) -> None:
        self._explainer, self._target, self._wording, self._seed = explainer, target, wording, seed
        self._answering = AnswerStage(explainer)

    def patches(self, cases: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[Receipt]:
        """Of records.PATCHING_CASES; `tokenizer` is the target's.

        Raises:
            Unusable: a case cannot be run, or its outcome not be asked for.
        """
        effects = _whole(PatchingStage(self._target)(cases))
        words = partial(words_of_tokens, tokenizer)
        questions = patching_questions(effects, words, wording=self._wording, seed=self._seed)
        told = [_outcome(row, "base_answer", "patched_answer") for row in _plain(effects)]
        return self._receipts(_whole(questions), told)

    def ablations(self, cases: pa.Table, tokenizer: PreTrainedTokenizerBase) -> list[Receipt]:
        """Of records.ABLATION_CASES; `tokenizer` is the target's.

        Raises:
            Unusable: as `patches`.
        """
        effects = _whole(AblationStage(self._target)(cases))
        d_model = self._explainer["d_target"]
        questions = ablation_questions(
            effects, saying(tokenizer), d_model=d_model, wording=self._wording, seed=self._seed
        )
        told = [_outcome(row, "full_answer", "ablated_answer") for row in _plain(effects)]
        return self._receipts(_whole(questions), told)

    def feature(
        self,
        vector: Float[np.ndarray, " d_model"],
        layer: int,
        right: Sequence[str],
        details: Sequence[str] = (),
        *,
        case_id: str | None = None,
    ) -> Receipt:
        """Of a vector at a layer.

        Args:
            right: The right descriptions, if any are known.
            details: What it responds to.
            case_id: Of a feature of an experiment, which is asked about in the same words as there.
        """
        case_id = case_id or records.content_id("vector", np.asarray(vector, np.float32).tolist(), layer)
        words = drawing(self._wording, "features", self._seed)(case_id)
        question = {
            **HERE,
            "case_id": case_id,
            "task": "features",
            "prompt": words.prompt(vectors=words.vectors(1), layers=str(layer)),
            "answer": right[0] if right else "",
            "answers": list(right) or [""],
            "layers": [layer],
            "role": "",
            "changed": None,
            "wording": words.id,
        }
        made = asked([question], [np.asarray(vector, np.float32)[None]], len(vector), [])
        receipt = self._receipts(_whole(made), [tuple(details)])[0]
        return receipt if right else receipt._replace(confirmed=None)

    def _receipts(self, questions: pa.Table, details: Sequence[tuple[str, ...]]) -> list[Receipt]:
        control = pa.array(["none"] * questions.num_rows, pa.string())
        answers = self._answering(questions.append_column(pa.field("control", pa.string(), nullable=False), control))
        graded = grade(questions, answers.table, target=self._target["model"], seed=0)
        rows = zip(_plain(questions), answers.table.to_pylist(), graded.to_pylist(), details, strict=True)
        return [
            Receipt(
                question=question["prompt"],
                answer=answer["text"],
                confidence=None if answer["logprob"] is None else math.exp(answer["logprob"]),
                measured=question["answer"],
                readable=parse(answer["text"], question["task"]).content is not None,
                confirmed=grade["exact"],
                details=told,
            )
            for question, answer, grade, told in rows
        ]


def _whole(result: Result) -> pa.Table:
    """Raises: Unusable: something was dropped."""
    for _, reason in result.dropped:
        raise Unusable(reason)
    return result.table


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    return table.drop_columns(["vectors"] if "vectors" in table.column_names else []).to_pylist()


def _outcome(row: dict[str, Any], before: str, after: str) -> tuple[str, ...]:
    kinds = {"base_answer": ("as it is", "patched"), "full_answer": ("with the span", "without it")}[before]
    logprobs = (row[name.replace("answer", "logprob")] for name in (before, after))
    told = [
        f"{kind}: {row[name]!r} (probability {math.exp(logprob):.2f})"
        for kind, name, logprob in zip(kinds, (before, after), logprobs)
    ]
    return (*told, f"divergence of the two runs: {row['kl']:.2g} nats")


def patch_of(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    source: str,
    *,
    block: Block,
    position: str,
    source_position: str | None = None,
    subjects: tuple[str | None, str | None] = (None, None),
    change: Change = REPLACE,
) -> pa.Table:
    """The case (records.PATCHING_CASES, one row) that writes what `source` has at `source_position` into `prompt` at
    `position`, at every layer of `block`; or another `change` with it.

    A position is a role (`positions.ROLES`), the number of a token, or a piece of the prompt, whose last token is
    meant. Without `source_position` it is the same role, number or piece in the source. The subject, which roles rest
    on, is what the two prompts do not share at their ends unless it is given.

    Raises:
        ValueError: there is no such position; the message says which there are.
    """
    both = [prompt_tokens(tokenizer, text) for text in (prompt, source)]
    if position in ROLES and source_position is None:
        spans = _subjects(prompt, source, subjects)
        role, places = position, _by_role(both, (prompt, source), spans, position)
    else:
        places = (
            _place(both[0], prompt, position, "the prompt"),
            _place(both[1], source, source_position or position, "the source"),
        )
        role = "asked"
    whole = Pair(SubjectPrompt(prompt, (0, 1)), SubjectPrompt(source, (0, 1)), **HERE)
    case = patching_case(whole, role, block, [places[0]], [places[1]], change=change)
    return records.rows_table([case], records.PATCHING_CASES)


def _by_role(both: Sequence[PromptTokens], texts: tuple[str, str], spans: Sequence[Span], role: str) -> tuple[int, int]:
    roles = [token_roles(tokens, text, span) for tokens, text, span in zip(both, texts, spans)]
    found = matched(both[0], roles[0], both[1], roles[1])
    if role not in found:
        named = [text[start:end] for text, (start, end) in zip(texts, spans)]
        raise ValueError(
            f"position {role!r}: with the subjects {named[0]!r} and {named[1]!r}, the two prompts share "
            f"{', '.join(found) or 'no role'} (where both runs are not the same); give one of them, or the number of a "
            "token"
        )
    return found[role][-1]


def _subjects(prompt: str, source: str, given: tuple[str | None, str | None]) -> list[Span]:
    if given != (None, None):
        first, second = given
        return [
            _only_span(prompt, first or second or "", "the prompt"),
            _only_span(source, second or first or "", "the source"),
        ]
    words = [list(re.finditer(r"\S+", text)) for text in (prompt, source)]
    texts = [[word.group() for word in each] for each in words]
    if texts[0] == texts[1]:
        raise ValueError("prompt and source are the same: a patch between them changes nothing")
    shortest = min(map(len, texts))
    start = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), shortest)
    ends = zip(*(reversed(each[start:]) for each in texts))
    tail = next((i for i, (a, b) in enumerate(ends) if a != b), shortest - start)
    if not start + tail or any(start >= len(each) - tail for each in texts):
        raise ValueError(
            "the subjects of prompt and source cannot be told apart: give them (--subject, --source-subject), or the "
            "number of a token as position"
        )
    return [(each[start].start(), each[len(each) - tail - 1].end()) for each in words]


def _place(tokens: PromptTokens, text: str, position: str, where: str) -> int:
    """The token that a number, or a piece of the text, names."""
    if position.isdigit():
        if int(position) >= len(tokens.ids):
            raise ValueError(
                f"position {position}: {where} has {len(tokens.ids)} tokens, numbered from 0 ({_listed(tokens, text)})"
            )
        return int(position)
    if position in ROLES:
        raise ValueError(f"position {position!r} in {where}: a role is one for both prompts, leave the other out")
    return span_positions(tokens, text, _only_span(text, position, where))[-1]


def _only_span(text: str, piece: str, where: str) -> Span:
    if not piece or text.count(piece) != 1:
        times = "is not" if piece not in text or not piece else f"is {text.count(piece)} times"
        raise ValueError(
            f"{piece!r} {times} in {where}: {text!r}; a position is one of {', '.join(ROLES)}, the number of a token, "
            "or a piece that is there once"
        )
    return text.index(piece), text.index(piece) + len(piece)


def _listed(tokens: PromptTokens, text: str) -> str:
    return ", ".join(f"{at} {text[a:b].strip() or 'begin'!r}" for at, (a, b) in enumerate(tokens.offsets))


def ablation_of(prompt: str, span: str, kind: str = "hint") -> pa.Table:
    """The case (records.ABLATION_CASES, one row) that takes `span` and the space after it out of `prompt`.

    Raises:
        ValueError: the span is not there exactly once, or is the whole prompt.
    """
    start, end = _only_span(prompt, span, "the prompt")
    inside_a_word = start and not prompt[start - 1].isspace()
    spaces = 0 if inside_a_word else len(prompt) - end - len(prompt[end:].lstrip())
    if not (prompt[:start] + prompt[end + spaces :]).strip():
        raise ValueError(f"the span {span!r} is the whole prompt: nothing would be left to answer")
    case = {
        **HERE,
        "case_id": records.content_id("ablation", prompt, [start, end + spaces]),
        "prompt": prompt,
        "span_start": start,
        "span_end": end + spaces,
        "kind": kind,
        "truth": None,
    }
    return records.rows_table([case], records.ABLATION_CASES)


def responses(target: dict[str, Any], world: World, vector: Float[np.ndarray, " d_model"], layer: int) -> Responses:
    """What a vector responds to on texts of the world: its product with the residual stream after `layer`.

    Args:
        target: Config of `Target`.

    Raises:
        ValueError: the target does not read the world's words one by one.
    """
    foreign = (
        "a vector is tried on texts of the synthetic world, unless it is asked about in an experiment whose "
        "`ground_truth.features` has a corpus and a describer: "
    )
    loaded = Target(target)
    texts = list(islice(documents(world, "receipts", 1), DOCUMENTS))
    tokens_of = loaded.read(document.text for document in texts)
    try:
        prompts = [tokens_of(document.text).ids for document in texts]
    except Unusable as reason:
        raise ValueError(f"{foreign}this target cannot read the world's texts ({reason})") from reason
    if any(len(ids) != len(document.words) + 1 for ids, document in zip(prompts, texts)):
        raise ValueError(f"{foreign}this target has another tokenizer than the world's")
    read = residuals(loaded.model, prompts, [layer], memory_budget=loaded.memory_budget)
    product = torch.cat([own[0, 1:].float().cpu() for own in read]) @ torch.from_numpy(np.array(vector, np.float32))
    concepts = concepts_of(world)
    correlations = pearson(product[:, None], concept_matrix(world, texts, concepts))[0].tolist()
    told = {concept.description: value for concept, value in zip(concepts, correlations)}
    places = [(document, at) for document in texts for at in range(len(document.words))]
    top = [places[i] for i in product.topk(STRONGEST).indices.tolist()]
    return Responses(
        best=max(told, key=lambda text: told[text]),
        correlations=told,
        strongest=tuple((document.words[at].text, document.text) for document, at in top),
    )


def strongest_windows(
    target: dict[str, Any], corpus: str, n_windows: int, vector: Float[np.ndarray, " d_model"], layer: int
) -> tuple[tuple[str, str], ...]:
    """What a vector responds to on a corpus: (token, text around it) where its product with the residual stream after
    `layer` is largest, once for each window; the first token of a text is left out.

    Args:
        target: Config of `Target`.
        corpus: Folder of a table `corpora.WINDOWS`, of which up to WINDOWS are read, spread over all `n_windows`.
    """
    loaded, direction = Target(target), torch.from_numpy(np.array(vector, np.float32))
    windows = Windowed(loaded, corpus)
    numbers = range(0, n_windows, -(-n_windows // WINDOWS))
    found: list[tuple[float, int, list[int]]] = []
    for start in range(0, len(numbers), _WINDOWS_AT_A_TIME):
        for ids, stream in windows.residual(numbers[start : start + _WINDOWS_AT_A_TIME], [layer]):
            if ids:
                highest = (stream[0].float().cpu() @ direction).max(dim=0)
                found.append((float(highest.values), int(highest.indices), ids))
    best = heapq.nlargest(STRONGEST, found, key=lambda one: one[0])
    return tuple(_around(token_texts(loaded.tokenizer, ids), at) for _, at, ids in best)


def _around(tokens: Sequence[str], at: int) -> tuple[str, str]:
    before, after = _SHOWN
    return tokens[at].strip(), "".join(tokens[max(0, at - before) : at + after]).strip()
