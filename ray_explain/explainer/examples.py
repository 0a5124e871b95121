"""Questions as token ids: what the explainer reads, and from which token on it has to know the answer."""

from datetime import datetime
from typing import Any, NamedTuple, NoReturn

import numpy as np
from transformers import PreTrainedTokenizerBase

from ray_explain.errors import BadInput
from ray_explain.explainer.markers import VECTOR_MARK, Markers

TEXT_TASK = "text"
"""Task of plain texts that are replayed in training: no chat template, no end token, no vectors."""

_PLACE = "\u00a7answer\u00a7"  # stands for the answer while a chat is rendered
_ANY = "?"
_DAY = datetime(2024, 7, 26)  # what templates that write the date are told, so that a chat is the same on every day


class Question(NamedTuple):
    """`prompt` holds `VECTOR_MARK` once for each of `vectors`, which belong to the block of layers `layers`.

    Of a text (`task` "text"), only the answer is learned; with an empty prompt, all tokens after the first.
    """

    question_id: str
    task: str
    prompt: str
    answer: str
    vectors: np.ndarray  # [n_vectors, d_model of the target]
    layers: tuple[int, ...]


class Example(NamedTuple):
    """A question as tokens: `n_prompt` that are given, then those to be learned (none where only asked)."""

    input_ids: list[int]
    n_prompt: int
    vectors: np.ndarray  # float32 [n_vectors, d_model of the target]
    layers: tuple[int, ...]
    question_id: str
    task: str
    weight: float = 1.0  # of its answer tokens in the loss

    @property
    def n_answer(self) -> int:
        """Tokens to be learned, the end token among them."""
        return len(self.input_ids) - self.n_prompt


class Refused(ValueError):
    """A question that cannot be asked or learned. `reason` is a short fixed phrase, to be counted."""

    def __init__(self, question_id: str, reason: str, detail: str) -> None:
        super().__init__(f"question {question_id}: {reason} ({detail})")
        self.reason = reason


def encode(
    question: Question,
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    *,
    max_tokens: int,
    d_model: int | None = None,
) -> Example:
    """A question with its answer, to be learned.

    Prompt and answer are tokenized apart, so that what is read before an answer is the same in training and in
    generation. The answer ends with the end-of-turn token of the chat template, or with the end token of a tokenizer
    that has no template.

    Args:
        max_tokens: The longest prompt and answer together.
        d_model: Width that the vectors must have; not checked here where it is None.

    Raises:
        Refused: over-long, no answer, marks and vectors do not match, a marker in the text, a special token in
            the answer, a vector that is not finite or of another width.
        BadInput: as `check_end`.
    """
    if question.task == TEXT_TASK:
        return _checked_length(_text(question, tokenizer, markers), max_tokens)
    prompt, answer = _pieces(question, tokenizer, markers, d_model)
    if answer[-1] is None:
        raise _no_end(tokenizer)
    return _checked_length(_example(question, prompt, answer), max_tokens)


def encode_prompt(
    question: Question, tokenizer: PreTrainedTokenizerBase, markers: Markers, *, max_tokens: int
) -> Example:
    """A question without its answer, to be asked; `answer` is not looked at. Texts are not asked.

    Raises:
        Refused: as `encode` does without a width, as far as prompt and vectors go.
    """
    prompt, _ = _pieces(question._replace(answer=_ANY), tokenizer, markers, None)
    return _checked_length(_example(question, prompt, []), max_tokens)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a model reads before it answers `text`: with a chat template, up to the place of the answer."""
    return _framed(text, tokenizer)[0] if tokenizer.chat_template else _with_begin(text, tokenizer)


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: the end token, and the end-of-turn token of the chat template if there is one."""
    ids = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ids.add(_framed(_ANY, tokenizer)[1][0])
    return frozenset(ids - {None})


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands for what a tokenizer cannot read; None where it reads all. Such ones, of bytes (GPT-2,
    Pythia, OLMo 2), give their end token that name too: in a text it is one, as where a chat begins with it."""
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return None if tokenizer.unk_token_id in ends else tokenizer.unk_token_id


def check_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: BadInput: no token ends an answer, so that an explainer could not learn where to stop."""
    end = _framed(_ANY, tokenizer)[1][0] if tokenizer.chat_template else tokenizer.eos_token_id
    if end is None:
        raise _no_end(tokenizer)


def _no_end(tokenizer: PreTrainedTokenizerBase) -> BadInput:
    return BadInput(
        f"the tokenizer of {tokenizer.name_or_path or 'the explainer'} has no end token, and no chat template that "
        "ends a turn: an explainer could not learn where its answers end; give it one (tokenizer.eos_token = ...) and "
        "save it"
    )


def _example(question: Question, prompt: list[int], answer: list[int]) -> Example:
    vectors = np.asarray(question.vectors, dtype=np.float32)
    return Example(
        [*prompt, *answer], len(prompt), vectors, tuple(question.layers), question.question_id, question.task
    )


def _checked_length(example: Example, max_tokens: int) -> Example:
    if len(example.input_ids) > max_tokens:
        detail = f"{len(example.input_ids)} tokens, the longest allowed has {max_tokens}"
        raise Refused(example.question_id, "over-long", detail)
    return example


def _pieces(
    question: Question, tokenizer: PreTrainedTokenizerBase, markers: Markers, d_model: int | None
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and answer."""
    _check_vectors(question, d_model)
    _check_marks(question, markers)
    text = question.prompt.rstrip("\n").replace(VECTOR_MARK, markers.text)  # a newline is for `_continued` to add
    if tokenizer.chat_template:
        prompt, end = _framed(text, tokenizer)
        answer = tokenizer.encode(question.answer.strip(), add_special_tokens=False)
    else:
        prompt, answer = _continued(text, question.answer, tokenizer)
        end = [tokenizer.eos_token_id]
    _check_tokens(question, prompt, answer, tokenizer, markers)
    return prompt, [*answer, *end]


def _framed(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a user's turn up to the place of the answer, and of the end of the answer's turn.

    The template writes its own begin token. What follows the end of turn (Qwen: a newline) is not part of the answer.
    """
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": _PLACE}]
    rendered = rendered_chat(tokenizer, messages)
    if rendered.count(_PLACE) != 1:
        raise BadInput("the chat template does not write the assistant's turn: remove it to use plain prompts")
    before, after = rendered.split(_PLACE)
    end = tokenizer.encode(after.strip(), add_special_tokens=False)[:1]
    return tokenizer.encode(before, add_special_tokens=False), end or [tokenizer.eos_token_id]


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **how: Any) -> str:
    """The text of a chat, without thinking where the template can leave it out, and always of the same date.

    Raises:
        TemplateError: the template does not take these turns.
    """
    template = tokenizer.get_chat_template()
    if "strftime_now" in template:
        template = _fixed_clock() + template
    told: dict[str, Any] = {"enable_thinking": False, "date_string": _DAY.strftime("%d %b %Y"), **how}
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **told))


def _fixed_clock() -> str:
    """The line that gives a template another `strftime_now`: transformers lets no argument stand for its own.

    The template renders as it does without the line.
    """
    said = ""
    for directive in "aAbBcdeHIjmMpSxXyY":
        text = _DAY.strftime(f"%{directive}")
        unpadded = str(int(text)) if text.isdigit() else text
        said += f"|replace('%{directive}', '{text}')|replace('%-{directive}', '{unpadded}')"
    return "{% macro strftime_now(format) %}{{ format" + said + " }}{% endmacro %}\n"


def _continued(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids for a model without a chat template. A final space of the prompt goes to the answer, whose first word is then
    the token it is in running text; otherwise a newline parts them."""
    if prompt.endswith(" "):
        prompt, answer = prompt.rstrip(" "), " " + answer.lstrip(" ")
    else:
        prompt = prompt + "\n"
    return _with_begin(prompt, tokenizer), tokenizer.encode(answer, add_special_tokens=False)


def _with_begin(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids with the begin token, where the tokenizer writes one, but no end token."""
    ids = tokenizer.encode(text)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def _text(question: Question, tokenizer: PreTrainedTokenizerBase, markers: Markers) -> Example:
    """Prompt and answer as one running text."""
    _check_marks(question, markers)
    given = _with_begin(question.prompt, tokenizer)
    ids = _with_begin(f"{question.prompt} {question.answer}".strip(), tokenizer)
    n_same = next((i for i, (a, b) in enumerate(zip(given, ids)) if a != b), min(len(given), len(ids)))
    n_prompt = max(n_same, 1)
    if n_prompt >= len(ids):
        _refuse(question, "no answer", f"{question.answer!r} gives no token")
    return _example(question, ids[:n_prompt], ids[n_prompt:])


def _check_vectors(question: Question, d_model: int | None) -> None:
    vectors = np.asarray(question.vectors)
    if d_model is not None and len(vectors) and (vectors.ndim != 2 or vectors.shape[1] != d_model):
        _refuse(question, "vector of the wrong width", f"shape {list(vectors.shape)}, not [n, {d_model}]")
    if not np.isfinite(vectors).all():
        _refuse(question, "vector not finite", "a NaN or an infinity")


def _check_marks(question: Question, markers: Markers) -> None:
    for text in (question.prompt, question.answer):
        for marker in markers.texts:
            if marker in text:
                _refuse(question, "marker in the text", f"{marker} is reserved for vectors")
    n_marks, n_vectors = question.prompt.count(VECTOR_MARK), len(question.vectors)
    if n_marks != n_vectors or VECTOR_MARK in question.answer:
        _refuse(question, "marks and vectors do not match", f"{n_marks} of {VECTOR_MARK}, {n_vectors} vectors")


def _check_tokens(
    question: Question, prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase, markers: Markers
) -> None:
    if not answer:
        _refuse(question, "no answer", f"{question.answer!r} gives no token")
    known = [token for token in answer if token != unknown_id(tokenizer)]
    if tokenizer.decode(known, skip_special_tokens=True) != tokenizer.decode(known):
        _refuse(question, "special token in the answer", f"{question.answer!r}")
    found = [token for token in prompt if token in markers.ids]
    if found != list(markers.ids) * len(question.vectors):
        _refuse(question, "marker in the text", f"markers read as {found}")


def _refuse(question: Question, reason: str, detail: str) -> NoReturn:
    raise Refused(question.question_id, reason, detail)
