from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import activations, positions, target
from ray_explain.ground_truth.activations import ACTIVATION_CASES, ActivationStage, difference_cases, text_cases
from ray_explain.ground_truth.positions import prompt_tokens
from tests.ground_truth.conftest import make_case, patching_table

TEXTS = ["Rome lies in Italy. The capital of", "Emilio Lussu speaks", "Lily had a red ball. Tom had a blue boat"]


@pytest.fixture(scope="module")
def stage(config: dict[str, Any]) -> ActivationStage:
    return ActivationStage(config)


def stream(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, layer: int) -> torch.Tensor:
    """The residual stream after a layer, by a plain hook: transformers' own last hidden state is after the norm."""
    read: list[torch.Tensor] = []
    hook = model.model.layers[layer].register_forward_hook(lambda _, __, out: read.append(out[0]))
    with torch.no_grad():
        model(torch.tensor([prompt_tokens(tokenizer, text).ids]))
    hook.remove()
    return read[0]


def test_activations_are_the_residual_stream_of_the_text(
    stage: ActivationStage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    cases = text_cases(TEXTS, tokenizer, layers=[0, 2], per_text=3)
    made = stage(cases.table)
    assert (cases.dropped, made.dropped, made.table.num_rows) == ([], [], 18)
    assert made.table.schema == stage.schema_out
    vectors = records.vectors_of(made.table["vectors"])
    for case, row, own in zip(cases.table.to_pylist(), made.table.to_pylist(), vectors, strict=True):
        assert (row["case_id"], row["layer"], row["source"]) == (case["case_id"], case["layer"], "activation")
        assert row["feature_id"] == case["position"] > 0  # never the begin-of-text token
        expected = stream(model, tokenizer, case["prompt"], case["layer"])[case["position"]]
        np.testing.assert_allclose(own, expected[None], atol=1e-4)


def test_a_difference_is_the_source_minus_the_base(
    stage: ActivationStage, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = [make_case(TEXTS[0], TEXTS[1], 3, 2, block=(0, 1)), make_case(TEXTS[1], TEXTS[2], 1, 4, block=(2, 2))]
    pairs.append(make_case(TEXTS[0], TEXTS[1], 3, 2, base_positions=[1, 2], source_positions=[1, 2]))  # no one vector
    cases = difference_cases(patching_table(pairs))
    made = stage(cases).table
    assert made["source"].to_pylist() == ["difference"] * 2
    assert made["layer"].to_pylist() == [1, 2]
    for pair, own in zip(pairs, records.vectors_of(made["vectors"])):
        layer = pair["last_layer"]
        source = stream(model, tokenizer, pair["source_prompt"], layer)[pair["source_positions"][0]]
        base = stream(model, tokenizer, pair["base_prompt"], layer)[pair["base_positions"][0]]
        np.testing.assert_allclose(own, (source - base)[None], atol=1e-4)


def test_every_prompt_runs_once_however_many_layers_are_read(
    stage: ActivationStage, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = []
    read = activations.residuals

    def counted(model: PreTrainedModel, prompts: list, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        hooks = [
            block.register_forward_pre_hook(lambda _, given: tokens.append(given[0].shape[1]))
            for block in model.model.layers
        ]
        try:
            return read(model, prompts, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    monkeypatch.setattr(activations, "residuals", counted)
    assert stage(text_cases(TEXTS, tokenizer, layers=[0, 1], per_text=2).table).table.num_rows == 12
    assert sum(tokens) == 2 * sum(len(prompt_tokens(tokenizer, text).ids) for text in TEXTS)  # two blocks of three


def test_equal_texts_give_one_case_and_ids_do_not_depend_on_the_other_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    alone = text_cases(TEXTS[1:2], tokenizer, layers=[1]).table.to_pylist()
    among = text_cases([*TEXTS, TEXTS[1]], tokenizer, layers=[1]).table.to_pylist()
    assert len(among) == 3
    assert alone[0] in among


def test_the_first_token_of_all_is_never_drawn(
    tokenizer: PreTrainedTokenizerFast, plain_tokenizer: PreTrainedTokenizerFast
) -> None:
    for own in (tokenizer, plain_tokenizer):
        drawn = text_cases(TEXTS[1:2], own, layers=[1], per_text=99).table["position"].to_pylist()
        assert drawn == list(range(1, len(prompt_tokens(own, TEXTS[1]).ids)))
    assert text_cases(["R"], tokenizer, layers=[1]).table.num_rows == 1
    assert [reason for _, reason in text_cases(["R"], plain_tokenizer, layers=[1]).dropped] == [activations.FIRST_ALONE]


def test_poison_is_dropped_with_its_reason(stage: ActivationStage, tokenizer: PreTrainedTokenizerFast) -> None:
    cases = text_cases(["", *TEXTS], tokenizer, layers=[1])
    assert [reason for _, reason in cases.dropped] == [positions.EMPTY_PROMPT]
    good = cases.table.to_pylist()
    changes = [
        ({"position": 900}, target.NO_SUCH_POSITION),
        ({"layer": 3}, target.NO_SUCH_LAYER),
        ({"prompt": "Rome lies in " * 99}, target.TOO_LONG),
        ({"minus_prompt": "Rome lies in", "minus_position": 50}, target.NO_SUCH_POSITION),
        ({"minus_prompt": "Rome lies in"}, activations.UNMATCHED),
    ]
    bad = [good[0] | change | {"case_id": f"bad {i}"} for i, (change, _) in enumerate(changes)]
    made = stage(records.rows_table([*bad[:2], *good, *bad[2:]], ACTIVATION_CASES))
    assert made.dropped == [(f"bad {i}", reason) for i, (_, reason) in enumerate(changes)]
    assert made.table.equals(stage(cases.table).table)
