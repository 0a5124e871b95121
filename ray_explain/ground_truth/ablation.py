"""What removing a span of a prompt does: cases in, the target's answers with and without the span out."""

from typing import Any, ClassVar

import pyarrow as pa

from ray_explain import records
from ray_explain.ground_truth.outcomes import NOT_FINITE, Outcome, outcomes, rows_with
from ray_explain.ground_truth.positions import PromptTokens, Unusable, checked_span
from ray_explain.ground_truth.target import Target
from ray_explain.interventions.ablation import ablated_logits
from ray_explain.stages import Result


class AblationStage:
    """Answers the prompts of records.ABLATION_CASES with and without their span.

    The config is that of `Target`.
    """

    schema_in: ClassVar[pa.Schema] = records.ABLATION_CASES

    def __init__(self, config: dict[str, Any]) -> None:
        self._target = Target(config)

    @property
    def schema_out(self) -> pa.Schema:
        return records.ABLATION_EFFECTS

    def __call__(self, table: pa.Table) -> Result:
        cases = table.to_pylist()
        tokens_of = self._target.read(prompt for case in cases for prompt in (case["prompt"], _without_span(case)))
        rows, pairs, dropped = [], [], []
        for row, case in enumerate(cases):
            try:
                full = tokens_of(case["prompt"])
                checked_span(case["prompt"], (case["span_start"], case["span_end"]))
                pairs.append((full, tokens_of(_without_span(case))))
                rows.append(row)
            except Unusable as reason:
                dropped.append((case["case_id"], str(reason)))
        found = self._run(pairs)
        dropped += [(cases[row]["case_id"], NOT_FINITE) for row, outcome in zip(rows, found) if outcome is None]
        return Result(_effects(table, [(row, one) for row, one in zip(rows, found) if one is not None]), dropped)

    def _run(self, pairs: list[tuple[PromptTokens, PromptTokens]]) -> list[Outcome | None]:
        if not pairs:
            return []
        prompts = [a.ids for a, _ in pairs], [b.ids for _, b in pairs]
        full, ablated = ablated_logits(self._target.model, *prompts, memory_budget=self._target.memory_budget)
        return outcomes(self._target.tokenizer, full, ablated)


def _without_span(case: dict[str, Any]) -> str:
    return case["prompt"][: case["span_start"]] + case["prompt"][case["span_end"] :]


def _effects(table: pa.Table, kept: list[tuple[int, Outcome]]) -> pa.Table:
    columns = {
        "full_answer": [outcome.before for _, outcome in kept],
        "ablated_answer": [outcome.after for _, outcome in kept],
        "changed": [outcome.changed for _, outcome in kept],
        "full_logprob": [outcome.before_logprob for _, outcome in kept],
        "ablated_logprob": [outcome.after_logprob for _, outcome in kept],
        "kl": [outcome.kl for _, outcome in kept],
    }
    return rows_with(table, [row for row, _ in kept], columns, records.ABLATION_EFFECTS)
