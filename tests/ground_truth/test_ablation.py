from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import outcomes, positions, target
from ray_explain.ground_truth.ablation import AblationStage
from ray_explain.ground_truth.outcomes import answer_text
from ray_explain.ground_truth.positions import prompt_tokens
from ray_explain.interventions.ablation import pair_bytes
from ray_explain.interventions.layout import layout_of
from tests.ground_truth.conftest import CONTEXT, random_model, saved

PROMPTS = [
    ("Rome lies in Italy.\nHint: B\nAnswer:", "\nHint: B"),
    ("Hint: B. Paris lies in", "Hint: B. "),
    ("Emilio Lussu speaks Italian and", " Italian"),
    ("Lily had a red ball. Tom had a blue", " Tom had a blue"),
    ("Paris lies in", " in"),
]


def row_of(prompt: str, start: int, end: int) -> dict[str, Any]:
    return {
        "case_id": records.content_id(prompt, start, end),
        "group": prompt,
        "split": "test",
        "prompt": prompt,
        "span_start": start,
        "span_end": end,
        "kind": "hint",
        "stratum": "all",
        "truth": None,
    }


ROWS = [row_of(prompt, prompt.index(span), prompt.index(span) + len(span)) for prompt, span in PROMPTS]


@pytest.fixture(scope="module")
def stage(config: dict[str, Any]) -> AblationStage:
    return AblationStage(config)


def table_of(rows: list[dict[str, Any]]) -> Any:
    return records.rows_table(rows, records.ABLATION_CASES)


def test_effects_are_what_the_model_says_with_and_without_the_span(
    stage: AblationStage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = stage(table_of(ROWS))
    assert made.dropped == []
    for row, (prompt, span) in zip(made.table.to_pylist(), PROMPTS, strict=True):
        texts = prompt, prompt.replace(span, "")
        with torch.no_grad():
            runs = [model(torch.tensor([prompt_tokens(tokenizer, text).ids])).logits[0, -1] for text in texts]
        answers = [answer_text(tokenizer, int(run.argmax())) for run in runs]
        assert [row["full_answer"], row["ablated_answer"]] == answers
        assert row["changed"] == (answers[0] != answers[1])
        first, second = (run.log_softmax(-1) for run in runs)
        assert row["full_logprob"] == pytest.approx(float(first.max()), abs=1e-4)
        assert row["ablated_logprob"] == pytest.approx(float(second.max()), abs=1e-4)
        assert row["kl"] == pytest.approx(float((first.exp() * (first - second)).sum()), rel=1e-3)


def test_a_row_does_not_depend_on_its_table(stage: AblationStage) -> None:
    together = stage(table_of(ROWS[::-1])).table.to_pylist()[::-1]
    for row, other in zip(ROWS, together):
        (alone,) = stage(table_of([row])).table.to_pylist()
        numbers = {name: value for name, value in other.items() if isinstance(value, float)}
        assert {name: alone[name] for name in numbers} == pytest.approx(numbers, abs=1e-4)
        assert {k: v for k, v in alone.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }


def test_poison_rows_are_dropped_with_their_reason_and_the_others_stay(stage: AblationStage) -> None:
    prompt = PROMPTS[0][0]
    bad = [
        (row_of("", 0, 0), positions.EMPTY_PROMPT),
        (row_of(prompt, 5, len(prompt) + 1), positions.OUTSIDE),
        (row_of(prompt, 5, 5), positions.OUTSIDE),
        (row_of(prompt, 7, 3), positions.OUTSIDE),
        (row_of(prompt, 0, len(prompt)), positions.EMPTY_PROMPT),  # nothing is left
        (row_of("Rome lies in " * CONTEXT, 0, 4), target.TOO_LONG),
    ]
    made = stage(table_of([row for row, _ in bad[:3]] + ROWS + [row for row, _ in bad[3:]]))
    assert made.dropped == [(row["case_id"], reason) for row, reason in bad]
    assert made.table["case_id"].to_pylist() == [row["case_id"] for row in ROWS]
    assert made.table["full_answer"].equals(stage(table_of(ROWS)).table["full_answer"])


def test_a_nan_of_the_model_drops_only_the_rows_that_meet_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = random_model(len(tokenizer))
    (bad,) = tokenizer(" Italian", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
        model.get_output_embeddings().weight[bad] = 0.0
    made = AblationStage(saved(model, tokenizer, tmp_path))(table_of(ROWS))
    assert made.dropped == [(ROWS[2]["case_id"], outcomes.NOT_FINITE)]
    assert made.table.num_rows == len(ROWS) - 1


def test_a_pair_that_alone_is_over_the_memory_budget_is_dropped(
    config: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stage: AblationStage
) -> None:
    text = "Rome lies in Italy. Paris lies in"
    large, small = row_of(text * 2, 0, 5), row_of(text, 0, 5)
    ids = [prompt_tokens(tokenizer, prompt).ids for prompt in (text * 2, (text * 2)[5:])]
    needed = pair_bytes(layout_of(model))(*ids)
    made = AblationStage(config | {"memory_budget": needed - 1})(table_of([large, small]))
    assert made.dropped == [(large["case_id"], target.TOO_LARGE)]
    assert made.table["full_answer"].equals(stage(table_of([small])).table["full_answer"])
    assert AblationStage(config | {"memory_budget": needed})(table_of([large, small])).dropped == []


def test_an_empty_table_gives_an_empty_one(stage: AblationStage) -> None:
    made = stage(table_of([]))
    assert (made.table.num_rows, made.dropped) == (0, [])
    assert made.table.schema == records.ABLATION_EFFECTS
