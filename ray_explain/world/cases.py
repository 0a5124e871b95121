"""What to intervene on: pairs of prompts to patch between, and quizzes whose hint is to be removed."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Literal, TypeVar

from ray_explain.world.corpus import quiz_options, quiz_prompt, random_hint
from ray_explain.world.documents import span_of_words
from ray_explain.world.facts import RELATIONS, Fact, Relation, Split, World
from ray_explain.world.wordings import words_of

Role = Literal["subject_last", "relation", "other", "final"]
Stratum = Literal["known", "withheld", "stranger"]
ROLE_WEIGHTS: dict[Role, float] = {"subject_last": 0.45, "relation": 0.125, "other": 0.125, "final": 0.3}
STRATUM_WEIGHTS: dict[Stratum, float] = {"known": 0.25, "withheld": 0.40, "stranger": 0.35}
_GRAMMAR_WORDS = frozenset(words_of("a are as at for has in is its of on one the to was with"))
_PATIENCE = 5

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class PatchingPair:
    """Two sentences of one wording about two subjects with different values, each lacking its last word.

    `base_span` and `source_span` are the characters of the token to patch, which has the same place in both. No role
    is before the subject: there, base and source run are identical. `truth` is what the world says, which need not
    be what a target answers. All entities are of one split; `group` is the base's subject and relation.
    """

    base_prompt: str
    source_prompt: str
    base_span: tuple[int, int]
    source_span: tuple[int, int]
    role: Role
    relation: str
    wording: int
    base_subject: str
    source_subject: str
    base_truth: str
    source_truth: str
    group: str
    split: Split


@dataclass(frozen=True, kw_only=True)
class HintCase:
    """A quiz with a hint. `span` is the hint's characters, with the space after it. For strangers the truth is made
    up for the case: nothing but the hint tells it."""

    prompt: str
    span: tuple[int, int]
    hint: str
    truth: str
    options: tuple[str, ...]
    stratum: Stratum
    subject: str
    relation: str
    wording: int
    group: str
    split: Split

    @property
    def unhinted(self) -> str:
        """The same quiz without its hint."""
        return self.prompt[: self.span[0]] + self.prompt[self.span[1] :]


def patching_pairs(world: World, n: int, split: Split, seed: int) -> list[PatchingPair]:
    """`n` different pairs about told facts of the split's entities, spread evenly over the groups.

    Raises: ValueError: the split's entities do not give that many.
    """
    rng = random.Random(f"patching {world.seed} {split} {seed}")
    told = [fact for fact in world.told_facts if world.split_of(fact.subject) == split]
    sources = {
        base: [fact for fact in told if fact.relation == base.relation and fact.value != base.value] for base in told
    }
    bases = [fact for fact in told if sources[fact]]
    pairs = (_patching_pair(fact, sources[fact], split, rng) for fact in _rounds(bases, rng))
    return _distinct(n, pairs, f"patching {split}")


def hint_cases(world: World, n: int, split: Split, seed: int) -> list[HintCase]:
    """`n` different hinted quizzes about the split's entities, strata mixed by `STRATUM_WEIGHTS`; hints are as often
    right as in the targets' training texts. Within a stratum, cases spread evenly over the groups.

    Raises: ValueError: the split's entities do not give that many.
    """
    rng = random.Random(f"hints {world.seed} {split} {seed}")
    rounds = {stratum: _rounds(_stratum_subjects(world, stratum, split), rng) for stratum in STRATUM_WEIGHTS}
    strata, weights = list(STRATUM_WEIGHTS), list(STRATUM_WEIGHTS.values())
    drawn = (rng.choices(strata, weights)[0] for _ in count())
    cases = (_hint_case(world, stratum, next(rounds[stratum]), split, rng) for stratum in drawn)
    return _distinct(n, cases, f"hint {split}")


def token_roles(relation: Relation, wording: int, subject: str) -> list[tuple[int, Role]]:
    """(word index, role) of the words of a statement from its subject on. The last word is "final", grammatical words
    between are "other", all words between that carry meaning are "relation"."""
    words = relation.statement(wording, subject).split()
    roles: list[tuple[int, Role]] = []
    for i, word in enumerate(words[words.index(subject) :], words.index(subject)):
        role: Role = "other" if word in _GRAMMAR_WORDS else "relation"
        roles.append((i, "subject_last" if word == subject else "final" if i == len(words) - 1 else role))
    return roles


def _patching_pair(base: Fact, sources: Sequence[Fact], split: Split, rng: random.Random) -> PatchingPair:
    relation = RELATIONS[base.relation]
    places = [
        (wording, at, role)
        for wording in relation.wordings_of(split)
        for at, role in token_roles(relation, wording, base.subject)
    ]
    frequency = {role: sum(place[2] == role for place in places) for role in ROLE_WEIGHTS}
    weights = [ROLE_WEIGHTS[role] / frequency[role] for _, _, role in places]
    wording, at, role = rng.choices(places, weights)[0]
    source = rng.choice(sources)
    prompts = [relation.statement(wording, fact.subject) for fact in (base, source)]
    base_span, source_span = (span_of_words(prompt.split(), at, at) for prompt in prompts)
    return PatchingPair(
        base_prompt=prompts[0],
        source_prompt=prompts[1],
        base_span=base_span,
        source_span=source_span,
        role=role,
        relation=base.relation,
        wording=wording,
        base_subject=base.subject,
        source_subject=source.subject,
        base_truth=base.value,
        source_truth=source.value,
        group=f"{base.subject} {base.relation}",
        split=split,
    )


def _stratum_subjects(world: World, stratum: Stratum, split: Split) -> list[tuple[str, str]]:
    """(subject, relation) pairs, the groups of a stratum."""
    if stratum == "stranger":
        strangers = world.entities_of("stranger", split)
        return [(name, relation.name) for name in strangers for relation in world.relations_of("stranger")]
    facts = [fact for fact in world.facts if world.split_of(fact.subject) == split]
    return [(fact.subject, fact.relation) for fact in facts if fact.told == (stratum == "known")]


def _hint_case(world: World, stratum: Stratum, group: tuple[str, str], split: Split, rng: random.Random) -> HintCase:
    subject, relation = group
    stranger = stratum == "stranger"
    truth = rng.choice(world.values(relation)) if stranger else world.fact(subject, relation).value
    options = quiz_options(world, relation, truth, rng)
    hint = random_hint(options, truth, rng)
    wording = rng.choice(RELATIONS[relation].wordings_of(split))
    prompt = quiz_prompt(subject, relation, wording, options=options, answer=truth, hint=hint)
    return HintCase(
        prompt=prompt.text,
        span=prompt.spans["hint"],
        hint=hint,
        truth=truth,
        options=options,
        stratum=stratum,
        subject=subject,
        relation=relation,
        wording=wording,
        group=" ".join(group),
        split=split,
    )


def _rounds(items: Sequence[Item], rng: random.Random) -> Iterator[Item]:
    """Each item once per round, in a new order each round, without end.

    Raises: ValueError: there are no items.
    """
    if not items:
        raise ValueError("no case can be made: this split of the world has no entity that fits; enlarge the world")
    while True:
        yield from rng.sample(items, len(items))


def _distinct(n: int, cases: Iterator[Item], name: str) -> list[Item]:
    """The first `n` different cases. Gives up when it has drawn `_PATIENCE` times as many as it found."""
    found: dict[Item, None] = {}
    for drawn, case in enumerate(cases):
        found.setdefault(case)
        if len(found) == n:
            return list(found)
        if drawn > _PATIENCE * (len(found) + 10):
            break
    raise ValueError(f"{n} different {name} cases asked for, the world gives about {len(found)}: ask for fewer")
