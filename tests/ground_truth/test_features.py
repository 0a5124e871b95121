from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from ray_explain import records
from ray_explain.ground_truth import features, target
from ray_explain.ground_truth.dictionaries import trained
from ray_explain.ground_truth.features import FeatureStage, layers_table, split_features
from ray_explain.interventions.hooks import capturing
from ray_explain.stages import Result
from ray_explain.world.concepts import aspects_of, concept_matrix, concepts_of, pearson
from ray_explain.world.corpus import documents
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer
from tests.ground_truth.conftest import random_model, saved

SIZES = {"persons": 12, "strangers": 8, "cities": 6, "companies": 6, "countries": 6}
WORLD = World(seed=3, **SIZES)
SETTINGS = {
    "world": {"seed": 3, **SIZES},
    "documents": 240,
    "d_sae": 48,
    "k": 4,
    "steps": 40,
    "min_correlation": 0.35,
    "seed": 0,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tokenizer = world_tokenizer(WORLD)
    return saved(random_model(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("world target")) | SETTINGS


@pytest.fixture(scope="module")
def stage(config: dict[str, Any]) -> FeatureStage:
    return FeatureStage(config)


@pytest.fixture(scope="module")
def made(stage: FeatureStage) -> Iterator[Result]:
    yield stage(layers_table([0, 2]))


def test_every_feature_is_a_row_or_dropped_with_a_reason(made: Result) -> None:
    assert made.table.num_rows > 4
    assert made.table.num_rows + len(made.dropped) == 2 * SETTINGS["d_sae"]
    assert {reason for _, reason in made.dropped} <= {features.NEVER_ACTIVE, features.NO_CONCEPT}
    ids = [*made.table["case_id"].to_pylist(), *(case_id for case_id, _ in made.dropped)]
    assert len(set(ids)) == len(ids)


def test_features_and_descriptions_have_their_schemas_and_belong_together(made: Result) -> None:
    table, descriptions = split_features(made.table)
    assert table.schema == records.features(32)
    assert descriptions.schema == records.DESCRIPTIONS
    n_concepts = len(concepts_of(WORLD))
    assert descriptions.num_rows == table.num_rows * n_concepts
    owners = descriptions["case_id"].to_pylist()
    assert owners[::n_concepts] == table["case_id"].to_pylist()
    gold = descriptions.filter(descriptions["gold"])
    assert gold["case_id"].to_pylist() == table["case_id"].to_pylist()
    assert set(gold["origin"].to_pylist()) == {"world"}
    directions = np.concatenate(records.vectors_of(table["vectors"]))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, atol=1e-5)


def test_scores_are_correlations_with_the_activations_on_the_odd_documents(stage: FeatureStage, made: Result) -> None:
    """Worked out anew from the words: the layer's SAE is recovered from the stage, concepts are asked one by one."""
    texts = list(islice(documents(WORLD, "features 0", 1), SETTINGS["documents"]))
    stream = stage._stream(2)
    sae = trained(stream, 2, stage._config)
    active = sae.encode(stream).numpy()
    odd = np.concatenate([[i % 2 == 1] * len(text.words) for i, text in enumerate(texts)])
    table, descriptions = split_features(made.table)
    rows = [row for row in table.to_pylist() if row["layer"] == 2]
    np.testing.assert_allclose(rows[0]["vectors"][0], sae.directions[rows[0]["feature_id"]], atol=1e-6)
    concepts = {concept.description: concept for concept in concepts_of(WORLD)}
    told = descriptions.to_pylist()
    for row in rows[:3]:
        own = [one for one in told if one["case_id"] == row["case_id"]]
        for one in [own[5], *(other for other in own if other["gold"])]:
            concept = concepts[one["description"]]
            holds = np.array(
                [
                    aspects_of(WORLD, text, at).get(concept.aspect) == concept.value
                    for text in texts
                    for at in range(len(text.words))
                ]
            )
            expected = np.corrcoef(active[odd, row["feature_id"]], holds[odd])[0, 1] if holds[odd].any() else 0.0
            assert one["score"] == pytest.approx(expected, abs=1e-4)


def test_the_stream_is_that_of_the_words_without_the_begin_of_text(stage: FeatureStage) -> None:
    texts = list(islice(documents(WORLD, "features 0", 1), SETTINGS["documents"]))
    stream, at = stage._stream(1), 0
    for text in texts[:5]:
        ids = torch.tensor([stage._target.tokenizer(text.text)["input_ids"]])
        with capturing(stage._target.model, [1]) as read, torch.no_grad():
            stage._target.model(ids)
        np.testing.assert_allclose(stream[at : at + len(text.words)], read[1][0, 1:], atol=1e-4)
        at += len(text.words)


def test_gold_is_the_concept_that_fits_best_on_the_even_documents_and_above_the_bar(
    stage: FeatureStage, made: Result
) -> None:
    texts = list(islice(documents(WORLD, "features 0", 1), SETTINGS["documents"]))
    even = np.concatenate([[i % 2 == 0] * len(text.words) for i, text in enumerate(texts)])
    stream = stage._stream(0)
    active = trained(stream, 0, stage._config).encode(stream)[even]
    holds = concept_matrix(WORLD, texts, concepts_of(WORLD))[even]
    fit = pearson(active, holds.float())
    fit[:, holds.sum(0) < 8] = -1  # too rare to be chosen
    rows = [row for row in made.table.to_pylist() if row["layer"] == 0]
    expected = [i for i in range(SETTINGS["d_sae"]) if fit[i].max() > SETTINGS["min_correlation"]]
    assert [row["feature_id"] for row in rows] == expected
    for row in rows:
        gold = [i for i, one in enumerate(row["descriptions"]) if one["gold"]]
        assert gold == [int(fit[row["feature_id"]].argmax())]


def test_a_layer_does_not_depend_on_the_others_of_its_table(stage: FeatureStage, made: Result) -> None:
    alone = stage(layers_table([2])).table
    both = made.table.filter(np.array(made.table["layer"]) == 2)
    assert alone["case_id"].equals(both["case_id"])
    assert alone["descriptions"].combine_chunks().flatten().equals(both["descriptions"].combine_chunks().flatten())


def test_all_features_of_a_layer_that_is_not_there_are_dropped(stage: FeatureStage) -> None:
    made = stage(layers_table([3]))
    assert made.table.num_rows == 0
    assert [reason for _, reason in made.dropped] == [target.NO_SUCH_LAYER] * SETTINGS["d_sae"]


def test_a_target_with_another_tokenizer_is_refused(
    config: dict[str, Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = saved(random_model(len(tokenizer)), tokenizer, tmp_path_factory.mktemp("other"))
    with pytest.raises(ValueError, match="a target with the world's tokenizer"):
        FeatureStage(SETTINGS | other)(layers_table([0]))
