"""Directions that no dictionary names: whole residual vectors of any text, and differences of pairs of prompts.

The paper's out-of-distribution vectors (Li et al. 2025, 2.1): activations on web text, and the residual differences of
CounterFact pairs.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth.outcomes import NOT_FINITE, rows_with
from ray_explain.ground_truth.positions import PromptTokens, Unusable, reading, usable, usable_rows
from ray_explain.ground_truth.splits import split_of
from ray_explain.ground_truth.target import NO_SUCH_POSITION, Target
from ray_explain.interventions.extraction import residuals
from ray_explain.stages import Result

UNMATCHED = "a difference of one prompt only"
FIRST_ALONE = "a text of one token, the first of all"

ACTIVATION_CASES = pa.schema(
    [
        *(records.PATCHING_CASES.field(name) for name in ("case_id", "group", "split")),
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # activation | difference
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),  # token of the unpadded prompt
        pa.field("minus_prompt", pa.string()),  # what a difference takes away; null for an activation
        pa.field("minus_position", pa.int32()),
    ]
)


def text_cases(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, layers: Sequence[int], per_text: int = 1, seed: int = 0
) -> Result:
    """The residual vectors of each text at `layers`, at `per_text` of its tokens drawn at random (fewer if it is
    shorter; never a special token, nor the first of all, whose norm is often a hundred times the rest). A group is a
    text.

    Texts without such a token, or with an unknown one, are dropped.
    """
    texts = list(dict.fromkeys(texts))
    tokens_of = reading(tokenizer, texts)

    def cases_of(text: str) -> list[dict[str, Any]]:
        group, tokens = records.content_id("text", text), tokens_of(text)
        own = [at for at in range(1, len(tokens.ids)) if tokens.is_text(at)]
        if not own:
            raise Unusable(FIRST_ALONE)
        drawn = random.Random(f"{seed} {text}").sample(own, min(per_text, len(own)))
        return [_case(group, split_of(group), layer, (text, at)) for at in sorted(drawn) for layer in layers]

    made, dropped = usable(((records.content_id("text", text), text) for text in texts), cases_of)
    return Result(records.rows_table((row for rows in made for row in rows), ACTIVATION_CASES), dropped)


def difference_cases(pairs: pa.Table) -> pa.Table:
    """For each of records.PATCHING_CASES that patches one position: the source's residual vector minus the base's, at
    the last layer of its block."""
    rows = [
        _case(
            row["group"],
            row["split"],
            row["last_layer"],
            (row["source_prompt"], row["source_positions"][0]),
            (row["base_prompt"], row["base_positions"][0]),
        )
        for row in pairs.to_pylist()
        if len(row["base_positions"]) == len(row["source_positions"]) == 1
    ]
    unique = {row["case_id"]: row for row in rows}
    return records.rows_table(unique.values(), ACTIVATION_CASES)


def _case(
    group: str, split: str, layer: int, place: tuple[str, int], minus: tuple[str | None, int | None] = (None, None)
) -> dict[str, Any]:
    source = "activation" if minus[0] is None else "difference"
    return {
        "case_id": records.content_id(source, layer, place, minus),
        "group": group,
        "split": split,
        "layer": layer,
        "source": source,
        "prompt": place[0],
        "position": place[1],
        "minus_prompt": minus[0],
        "minus_position": minus[1],
    }


class ActivationStage:
    """The residual vectors of ACTIVATION_CASES, as records.features whose number is the token's position.

    The config is that of `Target`.
    """

    schema_in: ClassVar[pa.Schema] = ACTIVATION_CASES

    def __init__(self, config: dict[str, Any]) -> None:
        self._target = Target(config)

    @property
    def schema_out(self) -> pa.Schema:
        return records.features(self._target.layout.d_model)

    def __call__(self, table: pa.Table) -> Result:
        cases = table.to_pylist()
        names = ("prompt", "minus_prompt")
        tokens_of = self._target.read(case[name] for case in cases for name in names if case[name] is not None)
        made, dropped = usable_rows(cases, lambda case: self._places(case, tokens_of))
        read = self._read(sorted({place for _, places in made for place in places}))
        vectors = [(row, read[at[0]] - read[at[1]] if len(at) > 1 else read[at[0]]) for row, at in made]
        dropped += [(cases[row]["case_id"], NOT_FINITE) for row, own in vectors if not np.isfinite(own).all()]
        kept = [(row, vector[None]) for row, vector in vectors if np.isfinite(vector).all()]
        return Result(self._features(table, kept), dropped)

    def _places(
        self, case: dict[str, Any], tokens_of: Callable[[str], PromptTokens]
    ) -> list[tuple[tuple[int, ...], int, int]]:
        """(prompt, layer, position) of the activation, and of the one taken from it if there is one."""
        self._target.check_layers(case["layer"], case["layer"])
        if (case["minus_prompt"] is None) != (case["minus_position"] is None):
            raise Unusable(UNMATCHED)
        wanted = [(case["prompt"], case["position"]), (case["minus_prompt"], case["minus_position"])]
        places = []
        for prompt, position in wanted[: 1 if case["minus_prompt"] is None else 2]:
            ids = tokens_of(prompt).ids
            if not 0 <= position < len(ids):
                raise Unusable(NO_SUCH_POSITION)
            places.append((ids, case["layer"], position))
        return places

    def _read(self, places: Sequence[tuple[tuple[int, ...], int, int]]) -> dict[tuple, np.ndarray]:
        """The vector at each place, float32. Each prompt runs once, up to the deepest layer of them all."""
        if not places:
            return {}
        wanted: dict[tuple[int, ...], list[int]] = {}
        for ids, at in sorted({(ids, position) for ids, _, position in places}):
            wanted.setdefault(ids, []).append(at)
        layers, budget = sorted({layer for _, layer, _ in places}), self._target.memory_budget
        read = residuals(self._target.model, list(wanted), layers, list(wanted.values()), memory_budget=budget)
        by_prompt = dict(zip(wanted, (own.float().cpu().numpy() for own in read), strict=True))
        return {
            (ids, layer, at): by_prompt[ids][layers.index(layer), wanted[ids].index(at)] for ids, layer, at in places
        }

    def _features(self, table: pa.Table, kept: Sequence[tuple[int, np.ndarray]]) -> pa.Table:
        places = [row for row, _ in kept]
        columns = {
            "feature_id": table["position"].combine_chunks().take(pa.array(places, type=pa.int64())),
            "vectors": records.vectors_array([vector for _, vector in kept], self._target.layout.d_model),
        }
        own = table.select(["case_id", "group", "split", "layer", "source"])
        return rows_with(own, places, columns, self.schema_out)
