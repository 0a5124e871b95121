"""CounterFact (Meng et al. 2022): pairs of prompts that share a relation and its wording and differ in their subject.

The paper's form (Li et al. 2025, 2.2) asks the statement as a multiple-choice question.
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.chats import chat_prompt
from ray_explain.ground_truth.jsonl import Lines, read_lines
from ray_explain.ground_truth.pairs import REPLACE, Block, Change, Pair, SubjectPrompt, pair_cases
from ray_explain.ground_truth.positions import Unusable, is_text
from ray_explain.ground_truth.splits import split_of
from ray_explain.stages import READ, Result

Form = Literal["completion", "choice", "chat"]
"""The statement alone; the paper's multiple choice after it, for base models; the same as a chat's user turn."""

N_OPTIONS = 5
_TARGETS = ("target_true", "target_new")
CHOICE = "{statement}\n\nRespond with one of {options} or unknown and nothing else"
NOT_A_FACT = "no CounterFact record (`template` with a {} in it, `subject`, `target_true`, `target_new`)"
NO_PARTNER = "no other subject of this relation and split has another answer"
TOO_FEW_ANSWERS = "too few answers of this relation for the options"
NOT_SHOWN = "the chat template changes the words of the statement"


class Fact(NamedTuple):
    """A CounterFact record. `template` holds `{}` where the subject stands; `relation` is its Wikidata property, or the
    template where the file has none; `answers` are the true one and the one that editing would write."""

    template: str
    subject: str
    relation: str
    answers: tuple[str, str]

    @property
    def statement(self) -> str:
        """The sentence up to its answer."""
        return self.template.replace("{}", self.subject)

    @property
    def subject_span(self) -> tuple[int, int]:
        """The subject's characters in the statement."""
        start = self.template.index("{}")
        return start, start + len(self.subject)


def read_counterfact(path: str | Path) -> tuple[list[Fact], list[tuple[str, str]]]:
    """The facts of a file, and (place, reason) of each record that is none.

    Both forms are read: the original JSON (a list with `requested_rewrite`) and JSON lines with `template`, `subject`,
    `target_true` and `target_new`.

    Raises:
        ValueError: a JSON file that is not a list of records.
        OSError: the file cannot be read.
    """
    lines = _original(path) if Path(path).suffix == ".json" else read_lines(path)
    facts, dropped = [], list(lines.dropped)
    for place, row in lines.rows:
        fact = _fact(row)
        if fact is None:
            dropped.append((place, NOT_A_FACT))
        else:
            facts.append(fact)
    return facts, dropped


def _original(path: str | Path) -> Lines:
    forms = "a .json file holds one list of records, as the original does; JSON lines, a record a line, end in .jsonl"
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no CounterFact file ({error}): {forms}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} is no CounterFact file, it holds a {type(rows).__name__}: {forms}")
    return Lines([(f"record {i}", row) for i, row in enumerate(rows)], [])


def _fact(row: Any) -> Fact | None:
    """The fact of a record in either form; None where something is missing."""
    try:
        if "requested_rewrite" in row:
            row = row["requested_rewrite"]
            template, answers = row["prompt"], [row[name]["str"] for name in _TARGETS]
        else:
            template, answers = row["template"], [row[name] for name in _TARGETS]
        # without spaces at its ends, a statement stays as it is where chat templates trim what is said
        template = template.strip()
        true, new = (answer.strip() for answer in answers)
        fact = Fact(template, row["subject"].strip(), row.get("relation_id", template), (true, new))
    except (KeyError, TypeError, AttributeError):
        return None
    texts = [template, fact.subject, fact.relation, *fact.answers]
    fine = all(isinstance(text, str) and text.strip() and is_text(text) for text in texts) and template.count("{}") == 1
    return fact if fine else None


def counterfact_cases(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    blocks: Sequence[Block],
    n: Mapping[str, int],
    form: Form = "completion",
    seed: int = 0,
    change: Change = REPLACE,
) -> Result:
    """Up to `n` patching cases of each split, see `pairs.pair_cases`. Dropped are records (by their place in the file)
    and pairs.

    All cases about a subject, as base or as source, are in one split.
    """
    facts, dropped = read_counterfact(path)
    pairs, unpaired = counterfact_pairs(facts, tokenizer, form=form, seed=seed)
    made = pair_cases(pairs, tokenizer, blocks=blocks, n=n, seed=seed, change=change)
    return Result(made.table, [*dropped, *unpaired, *made.dropped], {READ: len(facts) + len(dropped)})


def counterfact_pairs(
    facts: Sequence[Fact], tokenizer: PreTrainedTokenizerBase, *, form: Form, seed: int
) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Each fact as base with one other as source: same wording, same split, another subject and another answer.

    Dropped facts are named by the id of their content.
    """
    facts = list(dict.fromkeys(facts))
    partners: dict[tuple[str, str], list[Fact]] = defaultdict(list)
    answers: dict[str, dict[str, None]] = defaultdict(dict)
    for fact in facts:
        partners[fact.template, split_of(fact.subject)].append(fact)
        answers[fact.relation] |= dict.fromkeys(fact.answers)
    pairs, dropped = [], []
    for fact in facts:
        rng = random.Random(f"{seed} {fact}")
        try:
            source = _partner(fact, partners[fact.template, split_of(fact.subject)], rng)
            options = () if form == "completion" else _options(fact, source, list(answers[fact.relation]), rng)
            prompts = [_prompt(one, (fact, source), options, form, tokenizer) for one in (fact, source)]
        except Unusable as reason:
            dropped.append((records.content_id("fact", fact), str(reason)))
            continue
        group = f"{fact.subject} {fact.relation}"
        pairs.append(Pair(prompts[0], prompts[1], group=group, split=split_of(fact.subject), stratum=fact.relation))
    return pairs, dropped


def _partner(fact: Fact, others: Sequence[Fact], rng: random.Random) -> Fact:
    sources = [one for one in others if one.subject != fact.subject and one.answers[0] != fact.answers[0]]
    if not sources:
        raise Unusable(NO_PARTNER)
    return rng.choice(sources)


def _options(fact: Fact, source: Fact, answers: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Both true answers among others of the relation, in random order."""
    own = [fact.answers[0], source.answers[0]]
    others = [answer for answer in answers if answer not in own]
    if len(others) < N_OPTIONS - len(own):
        raise Unusable(TOO_FEW_ANSWERS)
    chosen = [*own, *rng.sample(others, N_OPTIONS - len(own))]
    return tuple(rng.sample(chosen, N_OPTIONS))


def _prompt(
    fact: Fact, pair: tuple[Fact, Fact], options: Sequence[str], form: Form, tokenizer: PreTrainedTokenizerBase
) -> SubjectPrompt:
    """What is asked about `fact`; `pair` is (base, source), whose answers the options are named after."""
    if form == "completion":
        return SubjectPrompt(fact.statement, fact.subject_span, fact.answers[0])
    asked = CHOICE.format(statement=fact.statement, options=" or ".join(options))
    text = f"{asked}.\n\nResponse:" if form == "choice" else chat_prompt(tokenizer, user=asked)
    if (start := text.find(asked)) < 0:
        raise Unusable(NOT_SHOWN)
    end = start + len(fact.statement)
    names = {pair[1].answers[0]: "option_source", pair[0].answers[0]: "option_base"}
    named, at = [], end + CHOICE.index("{options}") - len("{statement}")
    for option in options:
        named.append((names.get(option, "option_other"), (at, at + len(option))))
        at += len(option) + len(" or ")
    subject = (start + fact.subject_span[0], start + fact.subject_span[1])
    return SubjectPrompt(text, subject, fact.answers[0], statement_end=end, named=tuple(named))
