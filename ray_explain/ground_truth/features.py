"""Features of a target trained on the synthetic world: a small SAE on each layer, described by what the world knows."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.features.sae import SAE
from ray_explain.ground_truth.dictionaries import LAYERS, trained
from ray_explain.ground_truth.outcomes import NOT_FINITE
from ray_explain.ground_truth.positions import PromptTokens, Unusable
from ray_explain.ground_truth.splits import split_of
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.extraction import residuals
from ray_explain.stages import Result
from ray_explain.world.concepts import (
    DescribedFeature,
    concept_matrix,
    concepts_of,
    describe_features,
    document_of_tokens,
    pearson,
)
from ray_explain.world.corpus import documents
from ray_explain.world.documents import Document
from ray_explain.world.facts import World

NEVER_ACTIVE = "the feature is never active"
NO_CONCEPT = "no concept correlates with the feature"
ORIGIN = "world"
_WRONG_TARGET = (
    "features of the world need a target with the world's tokenizer; for others, give `ground_truth.features` a "
    "`describer` and a `corpus`"
)

_DESCRIPTIONS = pa.list_(
    pa.struct([records.DESCRIPTIONS.field(name) for name in ("description", "origin", "score", "gold")])
)


def layers_table(layers: Iterable[int]) -> pa.Table:
    """The input of `FeatureStage`."""
    return records.rows_table([{"layer": layer} for layer in layers], LAYERS)


def split_features(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Features (records.features) and descriptions (records.DESCRIPTIONS) from what `FeatureStage` made."""
    told = table["descriptions"].combine_chunks()
    owners = np.repeat(np.arange(table.num_rows), told.value_lengths().to_numpy(zero_copy_only=False))
    columns = {name: told.flatten().field(name) for name in ("description", "origin", "score", "gold")}
    descriptions = pa.table({"case_id": table["case_id"].combine_chunks().take(pa.array(owners)), **columns})
    return table.drop_columns(["descriptions"]), records.conform(descriptions, records.DESCRIPTIONS)


def joined(features: pa.Table, descriptions: pa.Table) -> pa.Table:
    """What `split_features` took apart; descriptions stand in the order of their features."""
    own = Counter(descriptions["case_id"].to_pylist())
    ends = np.cumsum([0, *(own[case] for case in features["case_id"].to_pylist())], dtype=np.int32)
    told = descriptions.drop_columns(["case_id"]).to_struct_array().combine_chunks().cast(_DESCRIPTIONS.value_type)
    column = pa.ListArray.from_arrays(pa.array(ends), told)
    return features.append_column(pa.field("descriptions", _DESCRIPTIONS, nullable=False), column.cast(_DESCRIPTIONS))


class FeatureStage:
    """Trains a top-k SAE on the residual stream after each layer, on texts of the world; makes a row of each feature
    that a concept of the world explains, with its correlation with every concept.

    The gold description is the concept that correlates best on one half of the texts, if by more than
    `min_correlation`; all `score`s are correlations on the other half, 0 where a concept does not occur there.
    A layer's rows and its dropped features are together `d_sae`.

    Config: that of `Target`, and `world` (arguments of World), `documents`, `d_sae`, `k`, `steps`,
    `min_correlation`, `seed`.
    """

    schema_in: ClassVar[pa.Schema] = LAYERS

    def __init__(self, config: dict[str, Any]) -> None:
        self._target = Target(config)
        self._config = config
        self._world = World(**config["world"])
        stream = documents(self._world, f"features {config['seed']}", 1)
        self._documents: list[Document] = list(islice(stream, config["documents"]))
        self._concepts = concepts_of(self._world)
        self._holds = concept_matrix(self._world, self._documents, self._concepts)

    @property
    def schema_out(self) -> pa.Schema:
        own = records.features(self._target.layout.d_model)
        return pa.schema([*own, pa.field("descriptions", _DESCRIPTIONS, nullable=False)])

    def __call__(self, table: pa.Table) -> Result:
        parts, dropped = [self.schema_out.empty_table()], list[tuple[str, str]]()
        for layer in table["layer"].to_pylist():
            try:
                made = self._of_layer(layer)
            except Unusable as reason:
                made = Result(parts[0], [(self._case_id(layer, i), str(reason)) for i in range(self._config["d_sae"])])
            parts.append(made.table)
            dropped += made.dropped
        return Result(pa.concat_tables(parts), dropped)

    def _of_layer(self, layer: int) -> Result:
        self._target.check_layers(layer, layer)
        activations = self._stream(layer)
        if not torch.isfinite(activations).all():
            raise Unusable(NOT_FINITE)
        sae = trained(activations, layer, self._config)
        active = sae.encode(activations)
        document = document_of_tokens(self._documents)
        described = describe_features(active, self._holds, document)
        alive = (active > 0).any(0).tolist()
        kept = [i for i in range(sae.d_sae) if alive[i] and described[i].fit > self._config["min_correlation"]]
        odd = document % 2 == 1
        scores = pearson(active[odd][:, kept], self._holds[odd])
        dropped = [
            (self._case_id(layer, i), NO_CONCEPT if alive[i] else NEVER_ACTIVE)
            for i in sorted(set(range(sae.d_sae)) - set(kept))
        ]
        return Result(self._rows(sae, layer, kept, described, scores), dropped)

    def _stream(self, layer: int) -> Float[Tensor, "tokens d_model"]:
        """The residual stream after `layer` at every word of the documents; their begin-of-text tokens left out."""
        tokens_of = self._target.read(document.text for document in self._documents)
        prompts = [_words(document, tokens_of) for document in self._documents]
        read = residuals(self._target.model, prompts, [layer], memory_budget=self._target.memory_budget)
        return torch.cat([own[0, 1:] for own in read]).float().cpu()

    def _case_id(self, layer: int, feature: int) -> str:
        names = ("world", "documents", "d_sae", "k", "steps", "seed")
        return records.content_id("feature", {name: self._config[name] for name in names}, layer, feature)

    def _rows(
        self,
        sae: SAE,
        layer: int,
        kept: Sequence[int],
        described: Sequence[DescribedFeature],
        scores: Float[Tensor, "kept concepts"],
    ) -> pa.Table:
        groups = [f"layer {layer} feature {i}" for i in kept]
        directions = sae.directions[list(kept)].float().numpy()
        columns = {
            "case_id": [self._case_id(layer, i) for i in kept],
            "group": groups,
            "split": [split_of(group, salt=str(self._config["seed"])) for group in groups],
            "layer": [layer] * len(kept),
            "source": ["sae"] * len(kept),
            "feature_id": list(kept),
            "vectors": records.vectors_array([direction[None] for direction in directions], sae.d_model),
            "descriptions": self._descriptions([described[i].concept for i in kept], scores),
        }
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, type=field.type)
            for field, column in zip(self.schema_out, columns.values(), strict=True)
        ]
        return pa.table(arrays, schema=self.schema_out)

    def _descriptions(self, best: Sequence[int], scores: Float[Tensor, "kept concepts"]) -> pa.Array:
        """Every concept with every feature."""
        n_kept, n_concepts = len(best), len(self._concepts)
        texts = pa.array([concept.description for concept in self._concepts])
        gold = np.zeros((n_kept, n_concepts), dtype=bool)
        gold[np.arange(n_kept), list(best)] = True
        told = pa.StructArray.from_arrays(
            [
                texts.take(pa.array(np.tile(np.arange(n_concepts), n_kept))),
                pa.array([ORIGIN]).take(pa.array(np.zeros(n_kept * n_concepts, dtype=np.int32))),
                pa.array(scores.float().numpy().reshape(-1)),
                pa.array(gold.reshape(-1)),
            ],
            fields=list(_DESCRIPTIONS.value_type),
        )
        return pa.ListArray.from_arrays(pa.array(np.arange(n_kept + 1, dtype=np.int32) * n_concepts), told)


def _words(document: Document, tokens_of: Callable[[str], PromptTokens]) -> tuple[int, ...]:
    """The tokens of a document: a begin-of-text token, and one for each of its words.

    Raises:
        BadInput: the target reads other tokens.
    """
    try:
        ids = tokens_of(document.text).ids
    except Unusable as reason:
        raise BadInput(f"{document.text!r} cannot be read, {reason}: {_WRONG_TARGET}") from reason
    if len(ids) != len(document.words) + 1:
        raise BadInput(f"{document.text!r}, {len(document.words)} words, is {len(ids)} tokens: {_WRONG_TARGET}")
    return ids
