from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import outcomes, patching, positions, target
from ray_explain.ground_truth.outcomes import answer_text
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.positions import prompt_tokens
from ray_explain.interventions.layout import layout_of
from ray_explain.interventions.patching import sweep_bytes
from ray_explain.interventions.walk import row_bytes
from tests.ground_truth.conftest import CONTEXT, make_case, patching_table, random_model, saved

ROME, PARIS = "Rome lies in Italy. The capital of", "Paris lies in France. The capital of"


@pytest.fixture(scope="module")
def stage(config: dict[str, Any]) -> PatchingStage:
    return PatchingStage(config)


@pytest.fixture(scope="module")
def cases(tokenizer: PreTrainedTokenizerFast) -> list[dict[str, Any]]:
    """Patches of every block at several positions of prompts of several lengths, of both kinds and of two sites."""
    prompts = [ROME, PARIS, "Emilio Lussu speaks", "Berlin lies in", "Lily had a red ball. Tom had a"]
    lengths = [len(prompt_tokens(tokenizer, prompt).ids) for prompt in prompts]
    rows = []
    for i, base in enumerate(prompts):
        source = (i + 1) % len(prompts)
        for block in [(0, 0), (1, 2), (0, 2)]:
            for back in (1, 2, 3):
                kind, site = ("add", "resid_post") if back == 2 else ("replace", ("resid_post", "mlp_out")[back == 3])
                positions = lengths[i] - back, lengths[source] - back
                rows.append(make_case(base, prompts[source], *positions, block=block, kind=kind, site=site))
    return rows


def by_hooks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, case: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The vector, and clean and patched logits, of a case: plain hooks on the model's own forward pass."""
    layers = range(case["first_layer"], case["last_layer"] + 1)
    modules = [model.model.layers[i].mlp if case["site"] == "mlp_out" else model.model.layers[i] for i in layers]
    ids = [torch.tensor([prompt_tokens(tokenizer, case[name]).ids]) for name in ("base_prompt", "source_prompt")]
    read: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda _, __, out: read.append(out[0, case["source_positions"][0]])) for m in modules
    ]
    with torch.no_grad():
        model(ids[1])
    for hook in hooks:
        hook.remove()
    vector = torch.stack(read).mean(0)

    def write(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        own = out[0, case["base_positions"][0]]
        out[0, case["base_positions"][0]] = vector if case["kind"] == "replace" else own + vector
        return out

    with torch.no_grad():
        clean = model(ids[0]).logits[0, -1]
        hooks = [m.register_forward_hook(write) for m in modules]
        patched = model(ids[0]).logits[0, -1]
    for hook in hooks:
        hook.remove()
    return vector, clean, patched


def test_effects_are_those_of_hooks_on_the_models_own_forward_pass(
    stage: PatchingStage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, cases: list[dict[str, Any]]
) -> None:
    made = stage(patching_table(cases))
    assert made.dropped == []
    vectors = records.vectors_of(made.table["vectors"])
    rows = {row["case_id"]: (row, own) for row, own in zip(made.table.drop_columns(["vectors"]).to_pylist(), vectors)}
    assert len(rows) == len(cases)
    for case in cases:
        row, own = rows[case["case_id"]]
        vector, clean, patched = by_hooks(model, tokenizer, case)
        np.testing.assert_allclose(own, vector[None], atol=1e-4)
        before, after = clean.log_softmax(-1), patched.log_softmax(-1)
        assert row["base_answer"] == answer_text(tokenizer, int(clean.argmax()))
        assert row["patched_answer"] == answer_text(tokenizer, int(patched.argmax()))
        assert row["changed"] == (row["base_answer"] != row["patched_answer"])
        assert row["base_logprob"] == pytest.approx(float(before.max()), abs=1e-4)
        assert row["patched_logprob"] == pytest.approx(float(after.max()), abs=1e-4)
        assert row["kl"] == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-3, abs=1e-4)
    assert 0.2 < np.mean(made.table["changed"].to_numpy()) < 1.0


def test_its_own_vector_changes_nothing(stage: PatchingStage, tokenizer: PreTrainedTokenizerFast) -> None:
    length = len(prompt_tokens(tokenizer, ROME).ids)
    rows = [make_case(ROME, ROME, at, at, block=(layer, layer)) for at in range(length) for layer in range(3)]
    made = stage(patching_table(rows)).table
    assert made.num_rows == 3 * length
    assert not any(made["changed"].to_pylist())
    assert max(made["kl"].to_pylist()) < 1e-5


def test_the_last_layer_at_the_last_token_brings_the_sources_answer(
    stage: PatchingStage, tokenizer: PreTrainedTokenizerFast
) -> None:
    ends = [len(prompt_tokens(tokenizer, prompt).ids) - 1 for prompt in (ROME, PARIS)]
    there = make_case(ROME, PARIS, *ends, block=(2, 2))
    back = make_case(PARIS, ROME, *ends[::-1], block=(2, 2))
    first, second = stage(patching_table([there, back])).table.to_pylist()
    assert first["patched_answer"] == second["base_answer"]
    assert second["patched_answer"] == first["base_answer"]
    assert first["patched_logprob"] == pytest.approx(second["base_logprob"], abs=1e-4)


def assert_same(row: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in row.items():
        if name == "vectors":
            np.testing.assert_allclose(value, other[name], atol=1e-5)
        elif isinstance(value, float):
            assert value == pytest.approx(other[name], abs=1e-4), name
        else:
            assert value == other[name], name


def test_a_row_does_not_depend_on_its_table(stage: PatchingStage, cases: list[dict[str, Any]]) -> None:
    together = {row["case_id"]: row for row in stage(patching_table(cases)).table.to_pylist()}
    backwards = stage(patching_table(cases[::-1])).table.to_pylist()
    assert [row["case_id"] for row in backwards] == [case["case_id"] for case in cases[::-1]]
    for row in backwards:
        assert_same(row, together[row["case_id"]])
    for case in cases[::7]:
        (alone,) = stage(patching_table([case])).table.to_pylist()
        assert_same(alone, together[case["case_id"]])


def poison() -> list[tuple[dict[str, Any], str]]:
    long = "Rome lies in Italy. " * CONTEXT
    return [
        (make_case("", PARIS, 0, 1), positions.EMPTY_PROMPT),
        (make_case(ROME, " ", 1, 1), positions.EMPTY_PROMPT),
        (make_case(long, PARIS, 1, 1), target.TOO_LONG),
        (make_case(ROME, long, 1, 1), target.TOO_LONG),
        (make_case(ROME, PARIS, 1000, 1), target.NO_SUCH_POSITION),
        (make_case(ROME, PARIS, 1, -1), target.NO_SUCH_POSITION),
        (make_case(ROME, PARIS, 1, 1, base_positions=[]), patching.UNMATCHED),
        (make_case(ROME, PARIS, 1, 1, base_positions=[1, 2]), patching.UNMATCHED),
        (make_case(ROME, PARIS, 1, 1, base_positions=[1, 1], source_positions=[1, 2]), patching.UNMATCHED),
        (make_case(ROME, PARIS, 1, 1, block=(0, 3)), target.NO_SUCH_LAYER),
        (make_case(ROME, PARIS, 1, 1, block=(2, 1)), target.NO_SUCH_LAYER),
        (make_case(ROME, PARIS, 1, 1, site="keys"), patching.NO_SUCH_CHANGE),
        (make_case(ROME, PARIS, 1, 1, kind="steer"), patching.NO_SUCH_CHANGE),
    ]


def test_poison_rows_are_dropped_with_their_reason_and_the_others_stay_as_they_are(
    stage: PatchingStage, cases: list[dict[str, Any]]
) -> None:
    bad = poison()
    mixed = [row for pair in zip([row for row, _ in bad], cases) for row in pair] + cases[len(bad) :]
    made = stage(patching_table(mixed))
    assert made.dropped == [(row["case_id"], reason) for row, reason in bad]
    assert made.table.num_rows + len(made.dropped) == len(mixed)
    for row, clean in zip(made.table.to_pylist(), stage(patching_table(cases)).table.to_pylist(), strict=True):
        assert_same(row, clean)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_nan_of_the_model_drops_only_the_rows_that_meet_it(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, family: str
) -> None:
    model = random_model(len(tokenizer), family)
    (bad,) = tokenizer(" red", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = float("nan")
        model.get_output_embeddings().weight[bad] = 0.0
    stage = PatchingStage(saved(model, tokenizer, tmp_path))
    good = [make_case(ROME, PARIS, at, at, block=(layer, layer)) for at in (1, 3, 4) for layer in range(3)]
    rows = [
        make_case("Lily had a red ball", ROME, 1, 1),
        *good,
        make_case(PARIS, "Lily had a red ball", 5, 5),
        make_case(PARIS, "Lily had a red ball", 2, 5, block=(2, 2)),  # reaches no answer, but is a vector of NaN
    ]
    made = stage(patching_table(rows))
    kept = made.table["case_id"].to_pylist()
    assert kept == [row["case_id"] for row in good]
    assert sorted(made.dropped) == sorted((rows[i]["case_id"], outcomes.NOT_FINITE) for i in (0, -2, -1))
    for row, clean in zip(made.table.to_pylist(), stage(patching_table(good)).table.to_pylist(), strict=True):
        assert_same(row, clean)


def test_ablations_of_an_activation_take_nothing_from_the_source(stage: PatchingStage) -> None:
    rows = [
        make_case(ROME, source, 7, 3, block=(0, 2), kind=kind) for kind in ("zero", "mean") for source in (ROME, PARIS)
    ]
    made = stage(patching_table(rows)).table.to_pylist()
    assert [row["vectors"] for row in made] == [[]] * 4
    for one, other in (made[:2], made[2:]):
        assert one["patched_logprob"] == pytest.approx(other["patched_logprob"], abs=1e-5)
    assert made[0]["kl"] != pytest.approx(made[2]["kl"], abs=1e-4)


def test_a_span_is_patched_with_a_vector_for_each_position(
    stage: PatchingStage, tokenizer: PreTrainedTokenizerFast
) -> None:
    ends = [len(prompt_tokens(tokenizer, prompt).ids) - 1 for prompt in (ROME, PARIS)]
    # at the last token of the last layer the source's answer is brought, whatever the order of the positions
    both = [
        make_case(ROME, PARIS, 1, 1, block=(2, 2), base_positions=base, source_positions=source)
        for base, source in [([1, ends[0]], [3, ends[1]]), ([ends[0], 1], [ends[1], 3])]
    ]
    single = [make_case(ROME, PARIS, 1, 3, block=(2, 2)), make_case(ROME, PARIS, *ends, block=(2, 2))]
    made = stage(patching_table([*both, *single])).table.to_pylist()
    np.testing.assert_allclose(made[0]["vectors"], [row["vectors"][0] for row in made[2:]], atol=1e-6)
    np.testing.assert_allclose(made[1]["vectors"], made[0]["vectors"][::-1], atol=1e-6)
    for row in made[:2]:
        assert row["patched_answer"] == made[3]["patched_answer"] != made[2]["patched_answer"]
        assert row["patched_logprob"] == pytest.approx(made[3]["patched_logprob"], abs=1e-4)


@pytest.mark.parametrize("rows", [[], [make_case("", "", 0, 0)]])
def test_a_table_that_gives_no_row_gives_an_empty_one(stage: PatchingStage, rows: list[dict[str, Any]]) -> None:
    made = stage(patching_table(rows))
    assert (made.table.num_rows, len(made.dropped)) == (0, len(rows))
    assert made.table.schema == stage.schema_out


def test_a_row_that_alone_is_over_the_memory_budget_is_dropped_and_the_others_stay_as_they_are(
    config: dict[str, Any], stage: PatchingStage, model: PreTrainedModel, cases: list[dict[str, Any]]
) -> None:
    long = " ".join([ROME] * 3)
    large = [make_case(long, PARIS, 1, 1), make_case(PARIS, long, 1, 1), make_case(long, PARIS, 20, 1)]
    length, short = len(stage._target.tokenizer(long)["input_ids"]), len(stage._target.tokenizer(ROME)["input_ids"])
    layout = layout_of(model)
    needed = [sweep_bytes(layout)(length, 1), row_bytes(layout, logits=False)(length), sweep_bytes(layout)(length, 20)]
    fits = max(sweep_bytes(layout)(short, 1), row_bytes(layout)(short))
    assert fits < min(needed) - 1
    small = PatchingStage(config | {"memory_budget": min(needed) - 1})
    made = small(patching_table([large[0], *cases, *large[1:]]))
    assert made.dropped == [(row["case_id"], target.TOO_LARGE) for row in large]
    for row, other in zip(made.table.to_pylist(), stage(patching_table(cases)).table.to_pylist(), strict=True):
        assert_same(row, other)
    enough = PatchingStage(config | {"memory_budget": max(needed)})
    assert enough(patching_table(large)).dropped == []


def test_a_memory_budget_changes_nothing(
    config: dict[str, Any], stage: PatchingStage, cases: list[dict[str, Any]], case: Callable
) -> None:
    small = PatchingStage(config | {"memory_budget": 2**20})
    for row, other in zip(
        small(patching_table(cases)).table.to_pylist(), stage(patching_table(cases)).table.to_pylist(), strict=True
    ):
        assert_same(row, other)
