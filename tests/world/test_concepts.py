from itertools import islice

import numpy as np
import pytest
import torch

from ray_explain.world.concepts import (
    aspects_of,
    concept_matrix,
    concepts_of,
    describe_features,
    document_of_tokens,
    pearson,
)
from ray_explain.world.corpus import documents


@pytest.fixture(scope="module")
def texts(world):
    return list(islice(documents(world, "concepts", 1), 400))


@pytest.fixture(scope="module")
def holds(world, texts):
    return concept_matrix(world, texts, concepts_of(world))


def column(world, aspect, value):
    return next(i for i, c in enumerate(concepts_of(world)) if (c.aspect, c.value) == (aspect, value))


def test_a_word_has_the_aspects_that_its_text_and_place_give_it(world, texts):
    document = next(d for d in texts if d.kind == "statement" and d.words[0].relation == "birthplace")
    at = next(i for i, word in enumerate(document.words) if word.part == "value")
    subject, city, before = document.words[at].subject, document.words[at].text, document.words[at - 1].text
    assert aspects_of(world, document, at) == {
        "name": city,
        "name_of": "city",
        "after": before,
        "about": subject,
        "telling": "birthplace",
        "part": "value",
        "document": "statement",
    }
    end = aspects_of(world, document, at + 1)
    assert (end["sign"], end["after"], end["after_name_of"]) == (".", city, "city")


def test_the_first_word_comes_after_nothing(world, texts):
    assert not any(aspect.startswith("after") for aspect in aspects_of(world, texts[0], 0))


def test_the_matrix_holds_exactly_where_the_aspects_say(world, texts, holds):
    places = [(document, i) for document in texts for i in range(len(document.words))]
    assert holds.shape == (len(places), len(concepts_of(world)))
    for row, (document, i) in zip(holds[:600], places[:600], strict=True):
        said = {(concepts_of(world)[j].aspect, concepts_of(world)[j].value) for j in row.nonzero().flatten().tolist()}
        assert said == set(aspects_of(world, document, i).items()) & {c[:2] for c in concepts_of(world)}
    assert document_of_tokens(texts).tolist() == [k for k, document in enumerate(texts) for _ in document.words]


def test_every_description_is_its_own_and_made_of_the_vocabulary(world, tokenizer):
    descriptions = [concept.description for concept in concepts_of(world)]
    assert len(set(descriptions)) == len(descriptions)
    assert not any(tokenizer.unk_token_id in ids for ids in tokenizer(descriptions).input_ids)


def test_most_concepts_occur_and_every_word_has_one(holds):
    assert holds.any(0).float().mean() > 0.8
    assert holds.any(1).all()


def test_a_feature_made_from_a_concept_is_described_by_it(world, texts, holds):
    planted = [column(world, "name_of", "city"), column(world, "sign", ","), column(world, "telling", "pet")]
    noise = torch.randn(len(holds), len(planted), generator=torch.Generator().manual_seed(0))
    features = describe_features(holds[:, planted] + 0.1 * noise, holds, document_of_tokens(texts))
    assert [feature.concept for feature in features] == planted
    assert all(feature.fit > 0.85 and feature.score > 0.85 for feature in features)


def test_the_score_comes_from_documents_that_did_not_choose_the_concept(world, texts, holds):
    planted = column(world, "name_of", "city")
    even = document_of_tokens(texts) % 2 == 0
    noise = torch.randn(len(holds), generator=torch.Generator().manual_seed(0))
    activation = torch.where(even, holds[:, planted].float(), noise)[:, None]
    (feature,) = describe_features(activation, holds, document_of_tokens(texts))
    assert feature.concept == planted and feature.fit == pytest.approx(1, abs=1e-4) and abs(feature.score) < 0.2


def test_a_feature_that_is_suppressed_by_a_concept_is_not_described_by_it(world, texts, holds):
    planted = column(world, "document", "quiz")
    (feature,) = describe_features(-holds[:, [planted]].float(), holds, document_of_tokens(texts))
    assert feature.concept != planted and feature.fit > 0


def test_a_concept_too_rare_to_fit_is_not_chosen(world, texts, holds):
    even = document_of_tokens(texts) % 2 == 0
    counts = holds[even].sum(0)
    rare = int(((counts > 0) & (counts < 8)).nonzero()[0])
    (feature,) = describe_features(holds[:, [rare]].float(), holds, document_of_tokens(texts))
    assert feature.concept != rare
    (feature,) = describe_features(holds[:, [rare]].float(), holds, document_of_tokens(texts), min_tokens=1)
    assert feature.fit == pytest.approx(1, abs=1e-4)


def test_a_constant_feature_correlates_with_nothing(texts, holds):
    (feature,) = describe_features(torch.full((len(holds), 1), 0.3), holds, document_of_tokens(texts))
    assert (feature.fit, feature.score) == (0, 0)


def test_correlations_are_those_of_numpy_even_far_from_zero():
    x, y = torch.randn(50, 3) + 1000, torch.rand(50, 2)
    expected = np.corrcoef(x.double().T, y.double().T)[:3, 3:]
    assert pearson(x, y).numpy() == pytest.approx(expected, abs=1e-4)


def test_rows_that_do_not_match_are_refused(holds, texts):
    with pytest.raises(ValueError, match="rows differ"):
        describe_features(torch.zeros(3, 1), holds, document_of_tokens(texts))
    with pytest.raises(ValueError, match="both are needed"):
        describe_features(torch.zeros(len(holds), 1), holds, torch.zeros(len(holds), dtype=torch.long))
