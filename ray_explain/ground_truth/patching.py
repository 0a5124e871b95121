"""What patches do: cases in, the vectors written and the target's answers with and without them out."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ray_explain import records
from ray_explain.ground_truth.outcomes import NOT_FINITE, Outcome, outcome_columns, outcomes, rows_with
from ray_explain.ground_truth.positions import PromptTokens, Unusable, usable_rows
from ray_explain.ground_truth.target import NO_SUCH_POSITION, Target
from ray_explain.interventions.extraction import BlockRequest, block_means
from ray_explain.interventions.hooks import KINDS
from ray_explain.interventions.layout import SITES
from ray_explain.interventions.patching import Intervention, paired_sweep, sweep_bytes
from ray_explain.stages import Result

NO_SUCH_CHANGE = "an unknown site or kind"
UNMATCHED = "positions of base and source do not match"


class _Planned(NamedTuple):
    """A case that can be run: its prompts' tokens and the case itself."""

    base: tuple[int, ...]
    source: tuple[int, ...]
    case: dict[str, Any]

    @property
    def writes_vectors(self) -> bool:
        return self.case["kind"] in ("replace", "add")

    def request(self, prompt: int) -> BlockRequest:
        """What it needs of its source run, which is number `prompt`."""
        layers = {name: self.case[name] for name in ("first_layer", "last_layer")}
        return BlockRequest(prompt=prompt, positions=tuple(self.case["source_positions"]), **layers)


class PatchingStage:
    """Runs the interventions of records.PATCHING_CASES.

    `replace` and `add` write the mean, over the layers of the case's block, of the source run's activations at the
    source positions (Li et al. 2025, 2.3); those are the row's `vectors`. `zero` and `mean` take nothing from the
    source run and have no vectors.

    The config is that of `Target`.
    """

    schema_in: ClassVar[pa.Schema] = records.PATCHING_CASES

    def __init__(self, config: dict[str, Any]) -> None:
        self._target = Target(config)
        self._bytes = sweep_bytes(self._target.layout)

    @property
    def schema_out(self) -> pa.Schema:
        return records.patching_effects(self._target.layout.d_model)

    def __call__(self, table: pa.Table) -> Result:
        cases = table.to_pylist()
        tokens_of = self._target.read(case[name] for case in cases for name in ("base_prompt", "source_prompt"))
        planned, dropped = usable_rows(cases, lambda case: self._planned(case, tokens_of))
        vectors = self._source_vectors([plan for _, plan in planned])
        finite = [bool(np.isfinite(own).all()) for own in vectors]
        dropped += [(plan.case["case_id"], NOT_FINITE) for (_, plan), fine in zip(planned, finite) if not fine]
        planned, vectors = _where(finite, planned), _where(finite, vectors)
        found = self._run([plan for _, plan in planned], vectors)
        dropped += [(plan.case["case_id"], NOT_FINITE) for (_, plan), outcome in zip(planned, found) if outcome is None]
        kept = [(row, own, outcome) for (row, _), own, outcome in zip(planned, vectors, found) if outcome is not None]
        columns = {
            "vectors": records.vectors_array([own for _, own, _ in kept], self._target.layout.d_model),
            **outcome_columns([outcome for *_, outcome in kept], "base", "patched"),
        }
        return Result(rows_with(table, [row for row, *_ in kept], columns, self.schema_out), dropped)

    def _planned(self, case: dict[str, Any], tokens_of: Callable[[str], PromptTokens]) -> _Planned:
        self._target.check_layers(case["first_layer"], case["last_layer"])
        if case["site"] not in SITES or case["kind"] not in KINDS:
            raise Unusable(NO_SUCH_CHANGE)
        base = tokens_of(case["base_prompt"]).ids
        source = tokens_of(case["source_prompt"]).ids
        _check_positions(case["base_positions"], len(base))
        _check_positions(case["source_positions"], len(source))
        if len(case["base_positions"]) != len(case["source_positions"]):
            raise Unusable(UNMATCHED)
        self._target.check_fits(self._bytes(len(base), min(case["base_positions"])))
        return _Planned(base, source, case)

    def _source_vectors(self, plans: Sequence[_Planned]) -> list[np.ndarray]:
        """What each case writes, float32 [n_positions, d_model]; [0, d_model] where it writes no vector."""
        prompts, numbers = _numbered([plan.source for plan in plans])
        vectors = [np.empty((0, self._target.layout.d_model), np.float32)] * len(plans)
        for site in SITES:
            here = [row for row, plan in enumerate(plans) if plan.case["site"] == site and plan.writes_vectors]
            requests = [plans[row].request(numbers[row]) for row in here]
            means = block_means(self._target.model, prompts, requests, site, memory_budget=self._target.memory_budget)
            for row, mean in zip(here, means):
                vectors[row] = mean.cpu().numpy()
        return vectors

    def _run(self, plans: Sequence[_Planned], vectors: Sequence[np.ndarray]) -> list[Outcome | None]:
        bases, numbers = _numbered([plan.base for plan in plans])
        changes = [
            Intervention(
                base=number,
                positions=tuple(plan.case["base_positions"]),
                first_layer=plan.case["first_layer"],
                last_layer=plan.case["last_layer"],
                site=plan.case["site"],
                kind=plan.case["kind"],
                vectors=torch.from_numpy(own) if len(own) else None,
            )
            for plan, number, own in zip(plans, numbers, vectors)
        ]
        found: list[Outcome | None] = [None] * len(plans)
        for chunk in paired_sweep(self._target.model, bases, changes, memory_budget=self._target.memory_budget):
            for row, outcome in zip(chunk.indices, outcomes(self._target.tokenizer, chunk.clean, chunk.patched)):
                found[row] = outcome
        return found


def _check_positions(positions: Sequence[int], length: int) -> None:
    if not positions or len(set(positions)) < len(positions):
        raise Unusable(UNMATCHED)
    if min(positions) < 0 or max(positions) >= length:
        raise Unusable(NO_SUCH_POSITION)


def _numbered(prompts: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different prompts, and the number of each prompt among them."""
    numbers: dict[tuple[int, ...], int] = {}
    of_each = [numbers.setdefault(prompt, len(numbers)) for prompt in prompts]
    return list(numbers), of_each


def _where(keep: Sequence[bool], items: Sequence[Any]) -> list[Any]:
    return [item for item, kept in zip(items, keep) if kept]
