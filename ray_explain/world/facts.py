"""What is true in the synthetic world: entities, relations, facts, and who is held out from explainers."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

from ray_explain.world.wordings import DESCRIPTIONS, DOCUMENT_KINDS, FRAMES, PARTS, QUESTION_WORDINGS, words_of

Item = TypeVar("Item")

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
TEST_SHARE, VALIDATION_SHARE = 0.25, 0.10
WITHHELD_SHARE = 0.15
"""Share of the facts about persons that no text ever tells."""
LAYER_NUMBERS = 64
"""The numbers 0 to 63 are words of the vocabulary: they name layers and positions in questions."""

MAX_ENTITIES = 600

SUBJECT = "{subject}"


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One attribute of one kind of entity. Each wording is a sentence that lacks only its last word, the value.
    The last wording is held out: targets are trained on it, explainers see it in test questions only."""

    name: str
    subject_kind: str
    value_kind: str
    wordings: tuple[str, ...]

    def statement(self, wording: int, subject: str) -> str:
        """The sentence up to, and without, the value."""
        return self.wordings[wording].replace(SUBJECT, subject)

    def wordings_of(self, split: Split) -> range:
        """The wordings that cases of `split` may use: all in test, all but the held-out one elsewhere."""
        return range(len(self.wordings) if split == "test" else len(self.wordings) - 1)


@dataclass(frozen=True)
class Fact:
    """`told` is false for withheld facts: true in the world, in no text."""

    subject: str
    relation: str
    value: str
    told: bool


def _relation(name: str, subject_kind: str, value_kind: str, *wordings: str) -> Relation:
    return Relation(name=name, subject_kind=subject_kind, value_kind=value_kind, wordings=wordings)


RELATIONS: dict[str, Relation] = {
    relation.name: relation
    for relation in (
        _relation(
            "birthplace", "person", "city",
            "{subject} was born in", "{subject} comes from the town of", "the birthplace of {subject} is",
            "the family of {subject} lives in",
        ),
        _relation(
            "employer", "person", "company",
            "{subject} works for", "{subject} earns money at the firm", "the employer of {subject} is",
            "{subject} signed a contract with",
        ),
        _relation(
            "profession", "person", "job",
            "{subject} works as a", "by trade {subject} became a", "the profession of {subject} is",
            "{subject} was trained as a",
        ),
        _relation(
            "pet", "person", "animal",
            "{subject} owns a", "at home {subject} keeps a", "the pet of {subject} is a",
            "every day {subject} feeds a",
        ),
        _relation(
            "instrument", "person", "instrument",
            "{subject} plays the", "on stage {subject} performs on the", "the instrument of {subject} is the",
            "{subject} practises the",
        ),
        _relation(
            "drink", "person", "drink",
            "{subject} likes to drink", "in the morning {subject} drinks", "the favourite drink of {subject} is",
            "{subject} ordered a cup of",
        ),
        _relation(
            "country", "city", "country",
            "{subject} is a city in", "{subject} lies in the land of", "the country of {subject} is",
            "to visit {subject} one travels to",
        ),
        _relation(
            "dish", "city", "food",
            "{subject} is famous for its", "cooks in {subject} make", "the dish of {subject} is",
            "guests of {subject} taste",
        ),
        _relation(
            "product", "company", "good",
            "{subject} makes", "the firm {subject} builds", "the product of {subject} is",
            "customers of {subject} buy",
        ),
        _relation(
            "headquarters", "company", "city",
            "{subject} has its office in", "the firm {subject} is based in", "the headquarters of {subject} are in",
            "managers of {subject} meet in",
        ),
        _relation(
            "export", "country", "material",
            "{subject} exports", "ships from {subject} carry", "the export of {subject} is",
            "traders in {subject} sell",
        ),
    )
}  # fmt: skip

VALUES: dict[str, tuple[str, ...]] = {
    kind: tuple(words.split())
    for kind, words in {
        "job": "baker doctor pilot teacher farmer painter lawyer sailor singer nurse judge writer",
        "animal": "cat dog horse parrot rabbit turtle goat hamster pony lizard donkey ferret",
        "instrument": "piano violin flute drum harp guitar cello trumpet organ banjo clarinet lute",
        "drink": "tea coffee milk water juice cider wine beer cocoa lemonade soda punch",
        "food": "soup bread cheese stew pie noodles dumplings pancakes sausages salad pudding curry",
        "good": "bicycles lamps shoes clocks boats chairs carpets phones toys paper glass tractors",
        "material": "copper wool salt timber cotton silver rice amber",
    }.items()
}

ENTITY_KINDS = ("person", "stranger", "city", "company", "country")
PLURALS = {"person": "people", "city": "cities", "company": "companies", "country": "countries"}
_NAME_ENDINGS = {
    "person": ("a", "o", "an", "is", "en", "ia", "el", "us"),
    "stranger": ("a", "o", "an", "is", "en", "ia", "el", "us"),
    "city": ("ton", "burg", "ville", "mouth", "ford", "haven"),
    "company": ("tek", "corp", "soft", "works"),
    "country": ("land", "stan", "mark", "esia"),
}
_ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "z")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("d", "l", "m", "n", "r", "s", "v", "rn", "ld", "nd")


def _new_name(rng: random.Random, kind: str, taken: set[str]) -> str:
    while True:
        stem = rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS)
        name = stem + rng.choice(_NAME_ENDINGS[kind])
        if name not in taken and stem not in taken:
            taken.update((name, stem))  # stems too: no two names that a reader takes for one
            return name


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything follows from the seed and the sizes; equal worlds are equal on every machine.

    Strangers are persons about whom nothing is ever told as a fact: texts give them another value each time.
    Every entity belongs to one split (`split_of`), within every kind by the same shares. A small target of half a
    million parameters learns the facts about 100 persons to 98 % and more; with 120 it stays below 97 %.
    """

    seed: int = 0
    persons: int = 100
    strangers: int = 50
    cities: int = 24
    companies: int = 16
    countries: int = 8

    def __post_init__(self) -> None:
        for kind, size in self._sizes.items():
            if size < 4:
                raise ValueError(f"world of {size} {kind} entities: each kind needs 4, so that every split has some")
        total = sum(self._sizes.values())
        if total > MAX_ENTITIES:
            raise ValueError(f"world of {total} entities: there are distinct names for {MAX_ENTITIES}, make it smaller")

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(
            zip(ENTITY_KINDS, (self.persons, self.strangers, self.cities, self.companies, self.countries), strict=True)
        )

    @cached_property
    def entities(self) -> dict[str, tuple[str, ...]]:
        """Names by kind; each name is one lower-case word and belongs to one kind."""
        rng = random.Random(f"names {self.seed}")
        taken = {word for words in VALUES.values() for word in words} | set(self._plain_words)
        return {
            kind: tuple(sorted(_new_name(rng, kind, taken) for _ in range(size))) for kind, size in self._sizes.items()
        }

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Every fact, told or withheld, ordered by relation and subject."""
        return tuple(
            Fact(subject, relation.name, value, told=(subject, relation.name) not in self._withheld)
            for relation in RELATIONS.values()
            for subject, value in self._value_table(relation).items()
        )

    @cached_property
    def told_facts(self) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.told)

    def fact(self, subject: str, relation: str) -> Fact:
        """Raises: ValueError: there is no such fact (strangers have none)."""
        if (subject, relation) not in self._fact_index:
            known = ", ".join(relation for name, relation in self._fact_index if name == subject)
            hint = f"its relations are {known}" if known else "it is not the subject of any fact"
            raise ValueError(f"no fact about {subject!r} and {relation!r}: {hint}")
        return self._fact_index[subject, relation]

    def told_about(self, subject: str) -> tuple[Fact, ...]:
        return self._told_index.get(subject, ())

    def values(self, relation: str) -> tuple[str, ...]:
        """All words that can be the value of `relation`."""
        kind = RELATIONS[relation].value_kind
        return VALUES[kind] if kind in VALUES else self.entities[kind]

    def relations_of(self, kind: str) -> tuple[Relation, ...]:
        """The relations of a kind of entity; strangers have those of persons."""
        subject_kind = "person" if kind == "stranger" else kind
        return tuple(relation for relation in RELATIONS.values() if relation.subject_kind == subject_kind)

    def kind_of(self, word: str) -> str | None:
        """The kind of entity or value that a word names; None for all other words."""
        return self._kinds.get(word)

    def split_of(self, entity: str) -> Split:
        """Raises: ValueError: not an entity of this world."""
        if entity not in self._splits:
            raise ValueError(
                f"{entity!r} has no split: only the {', '.join(ENTITY_KINDS)} names of this world have one"
            )
        return self._splits[entity]

    def entities_of(self, kind: str, split: Split) -> tuple[str, ...]:
        return tuple(name for name in self.entities[kind] if self.split_of(name) == split)

    def vocabulary(self, extra_texts: Iterable[str] = ()) -> list[str]:
        """Every word of the world, its texts, the numbers 0 to 63 and the question wordings, in a fixed order;
        then the words of `extra_texts` that are not among them."""
        own = [*self._plain_words, *self._kinds]
        return list(dict.fromkeys([*own, *(word for text in extra_texts for word in words_of(text))]))

    @cached_property
    def _plain_words(self) -> list[str]:
        """Words that name nothing: of wordings, quizzes, descriptions and questions, and numbers."""
        wordings = [wording.replace(SUBJECT, "") for relation in RELATIONS.values() for wording in relation.wordings]
        names = [*RELATIONS, *ENTITY_KINDS, *VALUES, *PLURALS.values()]
        numbers = [str(number) for number in range(LAYER_NUMBERS)]
        spoken = [*FRAMES, *DESCRIPTIONS.values(), *DOCUMENT_KINDS.values(), *PARTS.values(), *QUESTION_WORDINGS]
        texts = [*wordings, *names, *spoken, *numbers]
        return list(dict.fromkeys(word for text in texts for word in words_of(text)))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {word: kind for table in (self.entities, VALUES) for kind, words in table.items() for word in words}

    @cached_property
    def _splits(self) -> dict[str, Split]:
        return {
            name: split
            for kind, names in self.entities.items()
            for name, split in zip(
                _shuffled(f"split {self.seed} {kind}", names), _split_column(len(names)), strict=True
            )
        }

    @cached_property
    def _fact_index(self) -> dict[tuple[str, str], Fact]:
        return {(fact.subject, fact.relation): fact for fact in self.facts}

    @cached_property
    def _told_index(self) -> dict[str, tuple[Fact, ...]]:
        return {
            fact.subject: tuple(f for f in self.told_facts if f.subject == fact.subject) for fact in self.told_facts
        }

    def _value_table(self, relation: Relation) -> dict[str, str]:
        """Values of a relation are equally frequent, as far as the numbers allow: a majority answer says little."""
        subjects = self.entities[relation.subject_kind]
        values = self.values(relation.name)
        repeated = [values[i % len(values)] for i in range(len(subjects))]
        return dict(zip(subjects, _shuffled(f"values {self.seed} {relation.name}", repeated), strict=True))

    @cached_property
    def _withheld(self) -> frozenset[tuple[str, str]]:
        """The same share in each split."""
        withheld: list[tuple[str, str]] = []
        for split in SPLITS:
            persons = self.entities_of("person", split)
            pairs = [(person, relation.name) for person in persons for relation in self.relations_of("person")]
            shuffled = _shuffled(f"withheld {self.seed} {split}", pairs)
            withheld += shuffled[: round(WITHHELD_SHARE * len(pairs))]
        return frozenset(withheld)


def _shuffled(seed: str, items: Sequence[Item]) -> list[Item]:
    return random.Random(seed).sample(items, len(items))


def _split_column(size: int) -> list[Split]:
    """At least one of each split; the rest of the rounding goes to train."""
    n_test, n_validation = max(1, round(TEST_SHARE * size)), max(1, round(VALIDATION_SHARE * size))
    sizes: dict[Split, int] = {"test": n_test, "validation": n_validation, "train": size - n_test - n_validation}
    return [split for split, count in sizes.items() for _ in range(count)]
