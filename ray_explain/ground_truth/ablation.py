"""What removing a span of a prompt does: cases in, the target's answers with and without the span out."""

from typing import Any, ClassVar

import pyarrow as pa

from ray_explain import records
from ray_explain.ground_truth.outcomes import NOT_FINITE, Outcome, outcome_columns, outcomes, rows_with
from ray_explain.ground_truth.positions import PromptTokens, checked_span, usable_rows
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.ablation import ablated_logits, pair_bytes
from ray_explain.stages import Result


class AblationStage:
    """Answers the prompts of records.ABLATION_CASES with and without their span.

    The config is that of `Target`.
    """

    schema_in: ClassVar[pa.Schema] = records.ABLATION_CASES

    def __init__(self, config: dict[str, Any]) -> None:
        self._target = Target(config)
        self._bytes = pair_bytes(self._target.layout)

    @property
    def schema_out(self) -> pa.Schema:
        return records.ABLATION_EFFECTS

    def __call__(self, table: pa.Table) -> Result:
        cases = table.to_pylist()
        tokens_of = self._target.read(prompt for case in cases for prompt in (case["prompt"], _without_span(case)))

        def pair(case: dict[str, Any]) -> tuple[PromptTokens, PromptTokens]:
            full = tokens_of(case["prompt"])
            checked_span(case["prompt"], (case["span_start"], case["span_end"]))
            ablated = tokens_of(_without_span(case))
            self._target.check_fits(self._bytes(full.ids, ablated.ids))
            return full, ablated

        pairs, dropped = usable_rows(cases, pair)
        found = [(row, outcome) for (row, _), outcome in zip(pairs, self._run([both for _, both in pairs]))]
        dropped += [(cases[row]["case_id"], NOT_FINITE) for row, outcome in found if outcome is None]
        kept = [(row, outcome) for row, outcome in found if outcome is not None]
        columns = outcome_columns([outcome for _, outcome in kept], "full", "ablated")
        return Result(rows_with(table, [row for row, _ in kept], columns, self.schema_out), dropped)

    def _run(self, pairs: list[tuple[PromptTokens, PromptTokens]]) -> list[Outcome | None]:
        if not pairs:
            return []
        prompts = [a.ids for a, _ in pairs], [b.ids for _, b in pairs]
        full, ablated = ablated_logits(self._target.model, *prompts, memory_budget=self._target.memory_budget)
        return outcomes(self._target.tokenizer, full, ablated)


def _without_span(case: dict[str, Any]) -> str:
    return case["prompt"][: case["span_start"]] + case["prompt"][case["span_end"] :]
