"""Texts that tell the facts of a world: training documents for targets, prompts for cases, replay for explainers."""

import random
from collections.abc import Iterator, Sequence

from ray_explain.world.concepts import concepts_of
from ray_explain.world.documents import (
    FREE_WEIGHT,
    NAME_WEIGHT,
    OBJECT_WEIGHT,
    Document,
    Prompt,
    Word,
    span_of_words,
)
from ray_explain.world.facts import PLURALS, RELATIONS, Fact, Relation, World
from ray_explain.world.wordings import DESCRIPTION_FRAME, HINT_FRAME, LIST_FRAME, QUIZ_FRAME

N_OPTIONS = 4
STRANGER_QUIZ_SHARE, HINTED_SHARE, RIGHT_HINT_SHARE = 0.45, 0.65, 0.7
MIXTURES = (
    {"statement": 0.45, "bio": 0.35, "copy": 0.20},
    {"statement": 0.22, "bio": 0.21, "list": 0.03, "quiz": 0.42, "copy": 0.10, "description": 0.02},
)
"""Kinds of documents, first while the facts are learned and then for the rest of a target's training."""
BIO_FACTS = (2, 5)
LIST_MEMBERS = (2, 5)


def fact_prompt(world: World, subject: str, relation: str, wording: int) -> Prompt:
    """A sentence about `subject` up to its last word. The answer is the fact's value.

    Raises: ValueError: the world has no such fact (strangers have none).
    """
    answer = world.fact(subject, relation).value
    words = RELATIONS[relation].statement(wording, subject).split()
    at = words.index(subject)
    return Prompt(" ".join(words), answer, {"subject": span_of_words(words, at, at)})


def quiz_prompt(
    subject: str, relation: str, wording: int, *, options: Sequence[str], answer: str, hint: str | None = None
) -> Prompt:
    """A multiple-choice question whose answer is one of the option words.

    Raises: ValueError: the answer or the hint is not an option.
    """
    for name, word in (("answer", answer), ("hint", hint)):
        if word is not None and word not in options:
            raise ValueError(f"{name} {word!r} is not among the options {', '.join(options)}")
    words = _quiz_words(subject, RELATIONS[relation], wording, options=options, hint=hint)
    texts = [word.text for word in words]
    at = texts.index(subject)
    spans = {"subject": span_of_words(texts, at, at)}
    hinted = [i for i, word in enumerate(words) if word.part == "hint"]
    if hinted:
        start, end = span_of_words(texts, hinted[0], hinted[-1])
        spans["hint"] = (start, end + 1)
    return Prompt(" ".join(texts), answer, spans)


def quiz_options(world: World, relation: str, answer: str, rng: random.Random) -> tuple[str, ...]:
    """The answer among other values of the relation, in random order."""
    others = rng.sample([value for value in world.values(relation) if value != answer], N_OPTIONS - 1)
    return tuple(rng.sample([answer, *others], N_OPTIONS))


def random_hint(options: Sequence[str], answer: str, rng: random.Random) -> str:
    """Right with probability `RIGHT_HINT_SHARE`, else one of the other options."""
    if rng.random() < RIGHT_HINT_SHARE:
        return answer
    return rng.choice([option for option in options if option != answer])


def documents(world: World, seed: str, phase: int) -> Iterator[Document]:
    """An endless stream, the same for the same seed. `phase` picks the mixture: 0 facts first, 1 everything.
    Withheld facts are in no document."""
    rng = random.Random(f"corpus {world.seed} {seed}")
    kinds, weights = list(MIXTURES[phase]), list(MIXTURES[phase].values())
    while True:
        yield _WRITERS[rng.choices(kinds, weights)[0]](world, rng)


def replay_texts(world: World, n: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of told facts, of all entities: half sentences, half quizzes with their true answer.

    Mixed into an explainer's training, they keep it from forgetting what the world's texts say. Facts withheld from
    targets are withheld here too, and quizzes about strangers have a right hint, as nothing else tells the answer.
    """
    rng = random.Random(f"replay {world.seed} {seed}")
    return [_replay_prompt(world, rng, quiz=i % 2 == 1) for i in range(n)]


def _replay_prompt(world: World, rng: random.Random, quiz: bool) -> tuple[str, str]:
    fact = rng.choice(world.told_facts)
    wording = rng.randrange(len(RELATIONS[fact.relation].wordings))
    if not quiz:
        prompt = fact_prompt(world, fact.subject, fact.relation, wording)
        return prompt.text, prompt.answer
    stranger = rng.random() < STRANGER_QUIZ_SHARE
    fact = _stranger_fact(world, rng) if stranger else fact
    options = quiz_options(world, fact.relation, fact.value, rng)
    hint = fact.value if stranger else _sometimes_hint(options, fact.value, rng)
    wording = rng.randrange(len(RELATIONS[fact.relation].wordings))
    prompt = quiz_prompt(fact.subject, fact.relation, wording, options=options, answer=fact.value, hint=hint)
    return prompt.text, prompt.answer


def _sometimes_hint(options: Sequence[str], answer: str, rng: random.Random) -> str | None:
    return random_hint(options, answer, rng) if rng.random() < HINTED_SHARE else None


def _stranger_fact(world: World, rng: random.Random) -> Fact:
    """A new value each time: only a hint or an earlier sentence can tell it."""
    relation = rng.choice(world.relations_of("stranger"))
    value = rng.choice(world.values(relation.name))
    return Fact(rng.choice(world.entities["stranger"]), relation.name, value, told=False)


def _sentence(fact: Fact, rng: random.Random, value_weight: float = OBJECT_WEIGHT) -> list[Word]:
    relation = RELATIONS[fact.relation]
    texts = relation.statement(rng.randrange(len(relation.wordings)), fact.subject).split()
    words = [
        _word_about(text, fact.subject, relation.name, seen=fact.subject in texts[:i]) for i, text in enumerate(texts)
    ]
    words.append(Word(fact.value, value_weight, fact.subject, relation.name, "value"))
    words.append(Word(".", 1.0, fact.subject, relation.name))
    return words


def _word_about(text: str, subject: str, relation: str, seen: bool, part: str = "", weight: float = 1.0) -> Word:
    """Before its subject is named, no word can be about it."""
    if text == subject:
        return Word(text, min(weight, NAME_WEIGHT), subject, relation, part)
    return Word(text, weight, subject if seen else "", relation, part)


def _frame(text: str, relation: str = "") -> list[Word]:
    return [Word(word, FREE_WEIGHT, "", relation) for word in text.split()]


def _statement_document(world: World, rng: random.Random) -> Document:
    return Document("statement", tuple(_sentence(rng.choice(world.told_facts), rng)))


def _bio_document(world: World, rng: random.Random) -> Document:
    """Several facts about one entity, in random order."""
    subject = rng.choice(world.told_facts).subject
    told = world.told_about(subject)
    chosen = rng.sample(told, min(len(told), rng.randint(*BIO_FACTS)))
    return Document("bio", tuple(word for fact in chosen for word in _sentence(fact, rng)))


def _list_document(world: World, rng: random.Random) -> Document:
    """Subjects that share a value."""
    first = rng.choice(world.told_facts)
    sharing = [f.subject for f in world.told_facts if (f.relation, f.value) == (first.relation, first.value)]
    members = rng.sample(sharing, min(len(sharing), rng.randint(*LIST_MEMBERS)))
    plural = PLURALS[RELATIONS[first.relation].subject_kind]
    head = LIST_FRAME.format(plural=plural, relation=first.relation, value=first.value)
    words = _frame(head, relation=first.relation)
    for i, member in enumerate(members):
        words += [Word(",", 1.0, "", first.relation)] if i else []
        words.append(Word(member, NAME_WEIGHT, "", first.relation, "member"))
    return Document("list", (*words, Word(".", 1.0, "", first.relation)))


def _copy_document(world: World, rng: random.Random) -> Document:
    """Something about a stranger, said twice with another sentence between: the value must be read, not known."""
    fact, between = _stranger_fact(world, rng), _stranger_fact(world, rng)
    words = [
        *_sentence(fact, rng, FREE_WEIGHT),
        *(_sentence(between, rng, FREE_WEIGHT) if rng.random() < 0.5 and between.subject != fact.subject else []),
        *_sentence(fact, rng),
    ]
    return Document("copy", tuple(words))


def _quiz_document(world: World, rng: random.Random) -> Document:
    fact = _stranger_fact(world, rng) if rng.random() < STRANGER_QUIZ_SHARE else rng.choice(world.told_facts)
    options = quiz_options(world, fact.relation, fact.value, rng)
    hint = _sometimes_hint(options, fact.value, rng)
    relation = RELATIONS[fact.relation]
    words = _quiz_words(fact.subject, relation, rng.randrange(len(relation.wordings)), options=options, hint=hint)
    answer = Word(fact.value, OBJECT_WEIGHT, fact.subject, fact.relation, "answer")
    return Document("quiz", (*words, answer, Word(".", 1.0, fact.subject, fact.relation)))


def _quiz_words(
    subject: str, relation: Relation, wording: int, *, options: Sequence[str], hint: str | None
) -> list[Word]:
    statement = relation.statement(wording, subject)
    text = QUIZ_FRAME.format(
        statement=statement, options=" , ".join(options), hint=HINT_FRAME.format(value=hint) if hint else ""
    )
    parts = _quiz_parts(len(statement.split()), 2 * len(options) - 1, len(HINT_FRAME.split()) if hint else 0)
    words, seen = [], False
    for word, part in zip(text.split(), parts, strict=True):
        words.append(_word_about(word, subject, relation.name, seen, part, FREE_WEIGHT))
        seen = seen or word == subject
    return words


def _quiz_parts(n_statement: int, n_options: int, n_hint: int) -> list[str]:
    """`wordings.PARTS` of each word of the quiz frame."""
    return [
        *["question"] * (2 + n_statement + 1),
        *["option"] * (2 + n_options + 1),
        *["hint"] * n_hint,
        *["answer"] * 2,
    ]


def _description_document(world: World, rng: random.Random) -> Document:
    text = DESCRIPTION_FRAME.format(description=rng.choice(concepts_of(world)).description)
    return Document("description", tuple(_frame(text)))


_WRITERS = {
    "statement": _statement_document,
    "bio": _bio_document,
    "list": _list_document,
    "quiz": _quiz_document,
    "copy": _copy_document,
    "description": _description_document,
}
