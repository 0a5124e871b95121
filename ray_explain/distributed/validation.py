"""Held-out questions asked while an explainer learns: how much it gets right, and how much of that the vectors tell."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.distributed.zero import gathered
from ray_explain.errors import BadInput
from ray_explain.evaluation.controls import under_control
from ray_explain.evaluation.grading import grade
from ray_explain.explainer.examples import Example, Refused, encode_prompt
from ray_explain.explainer.generate import Generation, generate
from ray_explain.explainer.markers import Markers
from ray_explain.explainer.module import Explainer
from ray_explain.questions.rows import questions_of, without_vectors

_OWN, _SHUFFLED = "none", "shuffled"
_MOST_PROMPTS_AT_ONCE = 64


class Asked(NamedTuple):
    """A question of the sample, under one control."""

    question_id: str
    control: str
    prompt: Example


class Sample(NamedTuple):
    """The questions that are asked each time: as they are, and those with vectors with shuffled ones as well."""

    questions: pa.Table
    asked: list[Asked]
    longest: int  # tokens of the longest right answer, with its end


def held_out(folder: str) -> pa.Table:
    """The validation split of a questions table; no more of the others is in memory than a few rows at a time."""
    return pa.concat_tables(_of_split(table) for table in storage.read_batches(folder))


def _of_split(table: pa.Table) -> pa.Table:
    return table.filter(pc.equal(table["split"], "validation"))


def sample_of(
    tables: Sequence[pa.Table],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    *,
    n: int,
    seed: int,
    max_tokens: int,
    blind: bool = False,
) -> Sample:
    """Up to `n` questions of the validation split, from each table its share, the same for the same seed. Vectors are
    shuffled among all questions of the split. A question that cannot be asked is left out. With `blind` all numbers of
    the vectors are 0, for an explainer that is trained so: to it, shuffled ones are the same.

    Raises:
        BadInput: the split is empty, has a single question whose vectors cannot be shuffled, or none of the sample can
            be asked.
    """
    tables = [_of_split(table) for table in tables]
    shares = _shares([table.num_rows for table in tables], n)
    if not sum(shares):
        raise BadInput("`train.validate_every`: the validation split is empty; give `cases: {validation: ...}` or 0")
    chosen, asked = [], list[Asked]()
    for table, share in zip(tables, shares, strict=True):
        own = table.take(pa.array(_first(table, share, seed), pa.int64()))  # of none, its type would not be known
        shuffled = own.slice(0, 0)
        if any(len(vectors) for vectors in records.vectors_of(table["vectors"])):
            try:
                shuffled = under_control(table, _SHUFFLED, seed)
            except ValueError as error:
                raise BadInput(f"`train.validate_every`: {error}") from error
            shuffled = shuffled.filter(pc.is_in(shuffled["question_id"], own["question_id"]))
        found = _asked(own, _OWN, tokenizer, markers, max_tokens, blind)
        can_be = pa.array([one.question_id for one in found], pa.string())
        chosen.append(own.filter(pc.is_in(own["question_id"], can_be)))
        asked += found + _asked(shuffled, _SHUFFLED, tokenizer, markers, max_tokens, blind)
    questions = pa.concat_tables(chosen)
    if not questions.num_rows:
        raise BadInput(f"`train.validate_every`: none of {sum(shares)} validation questions can be asked; give 0")
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in questions["answer"].to_pylist()]
    return Sample(questions, asked, max(map(len, answers), default=0) + 1)


def _shares(sizes: Sequence[int], n: int) -> list[int]:
    """Up to `n` in all, as evenly over what has these sizes as whole numbers can be."""
    total = sum(sizes)
    ends = [round(min(n, total) * end / max(1, total)) for end in itertools.accumulate(sizes, initial=0)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _first(table: pa.Table, n: int, seed: int) -> list[int]:
    """Rows of `n` questions, drawn by their ids."""
    ids = table["question_id"].to_pylist()
    return sorted(range(len(ids)), key=lambda row: records.content_id("validation", seed, ids[row]))[:n]


def _asked(
    table: pa.Table, control: str, tokenizer: PreTrainedTokenizerBase, markers: Markers, max_tokens: int, blind: bool
) -> list[Asked]:
    found = []
    for question in map(without_vectors, questions_of(table)) if blind else questions_of(table):
        try:
            prompt = encode_prompt(question, tokenizer, markers, max_tokens=max_tokens)
        except Refused:
            continue
        found.append(Asked(question.question_id, control, prompt))
    return found


def validate(
    explainer: Explainer, sample: Sample, tokenizer: PreTrainedTokenizerBase, *, zero_stage: int
) -> dict[str, float]:
    """`validation_exact`: the share of exact answers (as in the paper, section 5); `validation_uplift`: how much higher
    it is than with another question's vectors, on the questions that have vectors (absent where none has).

    All workers must call it, and all return the same.
    """
    prompts = [asked.prompt for asked in sample.asked]
    given = answers(explainer, prompts, tokenizer, max_new_tokens=sample.longest, zero_stage=zero_stage)
    return measured(sample, [answer.text for answer in given])


def answers(
    explainer: Explainer,
    prompts: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    zero_stage: int,
) -> list[Generation]:
    """`generate`, with a share of the prompts for each worker; all must call it, and all return the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = list(range(rank, len(prompts), world)) or [0]
    own = share + [share[0]] * (-(-len(prompts) // world) - len(share))  # under ZeRO-3 all take the same passes
    loose = [] if explainer.marker_embeddings is None else [explainer.marker_embeddings]
    with gathered(loose, zero_stage):
        given = generate(
            explainer,
            [prompts[i] for i in own],
            tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=_MOST_PROMPTS_AT_ONCE,
            over=_over_everywhere if zero_stage == 3 else None,
        )
    told: list[Any] = [None] * world
    dist.all_gather_object(told, dict(zip(own, given, strict=True)))
    found = {i: answer for part in told for i, answer in part.items()}
    return [found[i] for i in range(len(prompts))]


def _over_everywhere(done: Bool[Tensor, ""]) -> bool:
    all_done = done.int()
    dist.all_reduce(all_done, op=dist.ReduceOp.MIN)
    return bool(all_done)


def measured(sample: Sample, texts: Sequence[str]) -> dict[str, float]:
    """What `validate` returns, of one answer to each question that was asked."""
    right = {control: _exact(sample, texts, control) for control in (_OWN, _SHUFFLED)}
    told = {"validation_exact": _mean(right[_OWN].values())}
    if right[_SHUFFLED]:
        told["validation_uplift"] = _mean(right[_OWN][one] - exact for one, exact in right[_SHUFFLED].items())
    return told


def _exact(sample: Sample, texts: Sequence[str], control: str) -> dict[str, bool]:
    """question_id -> whether the answer under this control is exact."""
    common = {"explainer": "", "control": control, "logprob": None, "n_tokens": 0}
    rows = [
        {"question_id": asked.question_id, "text": text, **common}
        for asked, text in zip(sample.asked, texts, strict=True)
        if asked.control == control
    ]
    if not rows:
        return {}
    ids = pa.array([row["question_id"] for row in rows], pa.string())
    questions = sample.questions.filter(pc.is_in(sample.questions["question_id"], ids))
    graded = grade(questions, records.rows_table(rows, records.ANSWERS), target="", seed=0)
    return dict(zip(graded["question_id"].to_pylist(), graded["exact"].to_pylist(), strict=True))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))
