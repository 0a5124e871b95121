"""What a token of a document mechanically stands for, and which of that explains a feature best."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ray_explain.world.documents import Document
from ray_explain.world.facts import ENTITY_KINDS, RELATIONS, VALUES, World
from ray_explain.world.wordings import DESCRIPTIONS, DOCUMENT_KINDS, PARTS, words_of

_COLUMNS_AT_A_TIME = 128


class Concept(NamedTuple):
    """Holds for a token if the token's `aspect` (a key of `wordings.DESCRIPTIONS`) has this `value`."""

    aspect: str
    value: str
    description: str


class DescribedFeature(NamedTuple):
    """`concept` indexes the concepts. Both correlations are Pearson, over tokens, of the feature's activation and the
    concept: `fit` on the documents that chose the concept, `score` on the others. A feature or concept that is
    constant on a half has correlation 0 there."""

    concept: int
    fit: float
    score: float


def aspects_of(world: World, document: Document, position: int) -> dict[str, str]:
    """Aspect -> value of the word at `position`; the aspects that do not apply are left out."""
    word = document.words[position]
    aspects = _named_aspects(world, word.text, ("word", "sign", "name"), ("name_of", "word_for"))
    if position:
        previous = document.words[position - 1].text
        aspects |= _named_aspects(world, previous, ("after",) * 3, ("after_name_of", "after_word_for"))
    rest = {"about": word.subject, "telling": word.relation, "part": word.part, "document": document.kind}
    return aspects | {aspect: value for aspect, value in rest.items() if value}


def _named_aspects(world: World, text: str, of_word: tuple[str, str, str], of_class: tuple[str, str]) -> dict[str, str]:
    kind = world.kind_of(text)
    if kind is None:
        return {of_word[0] if text.isalnum() else of_word[1]: text}
    entity = kind in ENTITY_KINDS
    return {of_word[2] if entity else of_word[0]: text, of_class[0] if entity else of_class[1]: kind}


@cache
def concepts_of(world: World) -> tuple[Concept, ...]:
    """All concepts of a world, in a fixed order."""
    common = [word for relation in RELATIONS.values() for wording in relation.wordings for word in words_of(wording)]
    common += words_of("question options answer hint")
    signs = [",", ".", ":", "?"]
    names = [name for kind in ENTITY_KINDS for name in world.entities[kind]]
    values = [word for words in VALUES.values() for word in words]
    table = {
        "word": [*common, *values],
        "sign": signs,
        "name": names,
        "name_of": ENTITY_KINDS,
        "word_for": VALUES,
        "after": [*common, *values, *signs, *names],
        "after_name_of": ENTITY_KINDS,
        "after_word_for": VALUES,
        "about": names,
        "telling": RELATIONS,
        "part": PARTS,
        "document": DOCUMENT_KINDS,
    }
    return tuple(_concept(aspect, value) for aspect, column in table.items() for value in dict.fromkeys(column))


def _concept(aspect: str, value: str) -> Concept:
    said = PARTS[value] if aspect == "part" else DOCUMENT_KINDS[value] if aspect == "document" else value
    return Concept(aspect, value, DESCRIPTIONS[aspect].format(value=said))


def concept_matrix(
    world: World, documents: Sequence[Document], concepts: Sequence[Concept]
) -> Bool[Tensor, "tokens concepts"]:
    """Which concepts hold for which words. Rows are the words of all documents in order, without the begin-of-text
    token that the tokenizer puts before each document."""
    columns = {(concept.aspect, concept.value): i for i, concept in enumerate(concepts)}
    rows = [aspects_of(world, document, i) for document in documents for i in range(len(document.words))]
    pairs = [(i, columns[item]) for i, row in enumerate(rows) for item in row.items() if item in columns]
    matrix = torch.zeros(len(rows), len(concepts), dtype=torch.bool)
    if pairs:
        matrix[tuple(torch.tensor(pairs).T)] = True
    return matrix


def document_of_tokens(documents: Sequence[Document]) -> Int[Tensor, " tokens"]:
    """The index of the document that each row of a concept matrix is from."""
    return torch.repeat_interleave(torch.tensor([len(document.words) for document in documents]))


def describe_features(
    activations: Float[Tensor, "tokens features"],
    holds: Bool[Tensor, "tokens concepts"],
    document: Int[Tensor, " tokens"],
    min_tokens: int = 8,
) -> list[DescribedFeature]:
    """The concept that correlates best with each feature on even documents, scored on odd ones.

    Only concepts that hold for at least `min_tokens` tokens of the even documents can be chosen.
    Raises: ValueError: the three do not have one row per token, or one half has no token.
    """
    if not len(activations) == len(holds) == len(document):
        raise ValueError(
            f"rows differ: {len(activations)} activations, {len(holds)} concepts, {len(document)} documents"
        )
    even = document % 2 == 0
    if even.all() or not even.any():
        raise ValueError("concepts are chosen on even documents and scored on odd ones: both are needed")
    fit = pearson(activations[even], holds[even])
    fit[:, holds[even].sum(0) < min_tokens] = -1.0
    best = fit.argmax(1)
    scores = pearson(activations[~even], holds[~even])
    return [
        DescribedFeature(int(concept), float(fit[i, concept]), float(scores[i, concept]))
        for i, concept in enumerate(best)
    ]


def pearson(x: Float[Tensor, "tokens a"], y: Tensor) -> Float[Tensor, "a b"]:
    """Correlation of each column of x with each of y [tokens, b], numbers or truth values; 0 where one of them is
    constant. Some columns of y at a time."""
    x = _standardised(x)
    parts = [x.T @ _standardised(some.float()) for some in y.split(_COLUMNS_AT_A_TIME, dim=1)]
    return (torch.cat(parts, dim=1) / len(x)).clamp(-1.0, 1.0)  # float32 sums overshoot


def _standardised(columns: Float[Tensor, "tokens n"]) -> Float[Tensor, "tokens n"]:
    centred = columns - columns.mean(0, dtype=torch.double).to(columns.dtype)
    deviation = centred.square().mean(0, dtype=torch.double).sqrt()
    constant = deviation <= 1e-6 * columns.abs().amax(0).clamp(min=1e-30)
    return torch.where(constant, 0.0, centred / deviation.where(~constant, 1.0).to(columns.dtype))
