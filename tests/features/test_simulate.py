import math
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ray_explain.features import simulate
from ray_explain.features.simulate import (
    Simulator,
    carried_over,
    detection_score,
    expected_activations,
    prompt,
    simulator_score,
)

RANDOM = np.random.default_rng(0)


def windows(n=30, noise=0.0, slope=1.0):
    true = [np.clip(RANDOM.normal(-1, 2, size=12), 0, None) for _ in range(n)]
    return [slope * window + noise * RANDOM.normal(size=12) for window in true], true


# The correlation


def test_it_is_pearson_over_all_tokens_of_all_windows():
    simulated, true = windows(noise=1.5)
    expected = np.corrcoef(np.concatenate(simulated), np.concatenate(true))[0, 1]
    assert simulator_score(simulated, true).value == pytest.approx(expected)
    assert simulator_score(simulated, true).n == 30


def test_it_is_not_the_mean_over_windows():
    # Right within each window, wrong in which window is the active one.
    true = [np.array([0.0, 1.0]), np.array([10.0, 11.0])]
    simulated = [np.array([10.0, 11.0]), np.array([0.0, 1.0])]
    assert simulator_score(simulated, true).value < -0.9


def test_an_opposite_description_scores_below_zero():
    simulated, true = windows(noise=0.5, slope=-1.0)
    assert simulator_score(simulated, true).high < -0.5


def test_scale_and_offset_of_the_simulator_do_not_matter():
    simulated, true = windows(noise=1.0)
    moved = [3 * window + 1e4 for window in simulated]
    assert simulator_score(moved, true).value == pytest.approx(simulator_score(simulated, true).value)


def test_true_activations_are_clipped_at_zero():
    simulated, true = windows(noise=0.5)
    below = [np.where(window == 0, -5.0, window) for window in true]
    assert simulator_score(simulated, below) == simulator_score(simulated, true)


@pytest.mark.parametrize("constant", ["simulated", "true"])
def test_a_constant_is_unscored_not_zero(constant):
    simulated, true = windows()
    flat = [np.full(12, 0.1, dtype=np.float32)] * 30
    score = simulator_score(flat, true) if constant == "simulated" else simulator_score(simulated, flat)
    assert math.isnan(score.value)
    assert math.isnan(score.low)
    assert score.n == 30


def test_no_windows_are_unscored():
    assert math.isnan(simulator_score([], []).value)


def test_negatives_bring_out_a_description_that_is_too_broad():
    # It says "active" in any window; within the top windows it has the right tokens.
    _, true = windows(20)
    top = true
    random = [np.zeros(12) for _ in range(20)]
    broad = [window.copy() for window in top] + [np.full(12, 2.5) for _ in range(20)]
    narrow = [window.copy() for window in top] + random
    kinds = ["top"] * 20 + ["random"] * 20
    assert simulator_score(broad[:20], top).value == pytest.approx(1)
    assert simulator_score(broad, top + random, kinds).value < 0.6
    assert simulator_score(narrow, top + random, kinds).value == pytest.approx(1)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # x = y + noise over many features: the correlation of all windows there could be is known.
    covered, true_value = 0, 1 / math.sqrt(1 + 1.0**2)
    for trial in range(200):
        generator = np.random.default_rng(trial)
        true = [np.abs(generator.normal(size=10)) for _ in range(25)]
        spread = np.sqrt(1 - 2 / np.pi)  # of |normal|
        simulated = [window + spread * generator.normal(size=10) for window in true]
        score = simulator_score(simulated, true, seed=trial)
        covered += score.low <= true_value <= score.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_narrows_with_more_windows_and_holds_the_value():
    few, many = (simulator_score(*windows(n, noise=1.5)) for n in (10, 400))
    assert few.low < few.value < few.high
    assert many.high - many.low < 0.5 * (few.high - few.low)


def test_resampling_keeps_the_number_of_each_kind():
    # Windows of a kind are all alike, so resampling within kinds changes nothing; mixing kinds would.
    top, other = (np.array([0.0, 9.0]), np.array([0.0, 8.0])), (np.array([3.0, 1.0]), np.array([0.0, 0.5]))
    simulated, true = zip(*[top] * 4, *[other] * 20, strict=True)
    apart = simulator_score(simulated, true, ["top"] * 4 + ["random"] * 20)
    assert apart.low == pytest.approx(apart.value)
    assert apart.high == pytest.approx(apart.value)
    together = simulator_score(simulated, true)
    assert together.value == pytest.approx(apart.value)
    assert together.high - together.low > 0.05


def test_the_same_seed_gives_the_same_interval():
    simulated, true = windows(noise=1.0)
    assert simulator_score(simulated, true, seed=3) == simulator_score(simulated, true, seed=3)
    assert simulator_score(simulated, true, seed=3).low != simulator_score(simulated, true, seed=4).low


@pytest.mark.parametrize(
    ("simulated", "kinds", "words"),
    [
        ([np.zeros(3)], None, "alike in number and length"),
        ([np.zeros(3), np.zeros(4)], None, "alike in number and length"),
        ([np.ones(3), np.array([0, np.nan, 1])], None, "window 1 are not finite"),
        ([np.ones(3), np.ones(3)], ["top"], "1 kinds of 2 windows"),
    ],
)
def test_what_does_not_fit_is_refused(simulated, kinds, words):
    with pytest.raises(ValueError, match=words):
        simulator_score(simulated, [np.ones(3), np.zeros(3)], kinds)


# Detection


def test_detection_by_hand():
    active = [True] * 4 + [False] * 10
    said = [True, True, True, False] + [False] * 9 + [True]
    score = detection_score(said, active)
    assert score.value == pytest.approx((3 / 4 + 9 / 10) / 2)
    assert score.n == 14
    assert score.low < score.value < score.high


@pytest.mark.parametrize("answer", [True, False])
def test_always_saying_the_same_is_chance(answer):
    score = detection_score([answer] * 50, [True] * 40 + [False] * 10)
    assert score.value == 0.5


def test_a_perfect_score_on_few_windows_is_not_certain():
    active = [True] * 3 + [False] * 3
    few, many = detection_score(active, active), detection_score(active * 20, active * 20)
    assert few.value == few.high == many.value == 1
    assert few.low < 0.75 < many.low


def test_detection_without_one_of_the_classes_is_unscored():
    assert math.isnan(detection_score([True, False], [True, True]).value)


def test_one_verdict_for_each_window():
    with pytest.raises(ValueError, match="3 verdicts on 2"):
        detection_score([True] * 3, [True] * 2)


# The simulator's format


@pytest.fixture(scope="module")
def tokenizer():
    words = [
        "<pad>",
        "[UNK]",
        *(f"w{i}" for i in range(20)),
        "Neuron",
        "Description",
        "Input",
        "#",
        ":",
        "cats",
        "and",
        "s",
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="[UNK]")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=4, max_position_embeddings=128, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that the values differ visibly
    return model.eval()


def test_the_prompt_is_the_papers():
    assert prompt("cats") == "## Neuron Description: cats\n\n ## Input: "


def test_expected_activations_by_hand():
    logits = torch.full((2, 40), -torch.inf)
    logits[0, 7] = 0.0
    logits[1, [2, 4]] = 1.5
    logits[1, 30] = 99.0  # not one of the levels
    assert expected_activations(logits).tolist() == [7.0, 3.0]


def test_a_value_is_read_at_the_token_itself(model, tokenizer):
    window = [5, 9, 3, 17]
    ids = tokenizer(prompt("cats and w3"))["input_ids"]
    logits = model(torch.tensor([ids + window])).logits[0, len(ids) :]
    expected = expected_activations(logits).detach().numpy()
    (values,) = Simulator(model, tokenizer).of_ids("cats and w3", [window])
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert values.std() > 0.1


@pytest.fixture(scope="module")
def model_with_learned_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    with torch.no_grad():
        model.transformer.wte.weight.mul_(20)
        model.transformer.wpe.weight.mul_(20)
    return model.eval()


@pytest.mark.parametrize("family", ["model", "model_with_learned_positions"])
def test_a_window_does_not_depend_on_its_batch(family, request, tokenizer):
    model = request.getfixturevalue(family)
    several = [[5, 9, 3, 17, 2, 4], [8], [3, 3, 12]]
    together = Simulator(model, tokenizer, batch_windows=2).of_ids("cats", several)
    for window, values in zip(several, together, strict=True):
        np.testing.assert_allclose(values, Simulator(model, tokenizer).of_ids("cats", [window])[0], rtol=1e-4)


def test_the_description_matters(model, tokenizer):
    simulator = Simulator(model, tokenizer)
    one, other = (simulator.of_ids(description, [[5, 9, 3]])[0] for description in ("cats", "w7 and w8"))
    assert np.abs(one - other).max() > 1e-3


def test_no_end_of_text_stands_between_description_and_window(model, tokenizer):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="$A w9", special_tokens=[("w9", core.token_to_id("w9"))])
    ending = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="[UNK]")
    assert ending("cats")["input_ids"] == [*tokenizer("cats")["input_ids"], core.token_to_id("w9")]
    own, others = (Simulator(model, one).of_ids("cats and w9", [[5, 9, 3]])[0] for one in (ending, tokenizer))
    np.testing.assert_allclose(own, others, rtol=1e-4)


def test_another_tokenizers_pieces_get_the_values_of_their_characters(model, tokenizer):
    simulator = Simulator(model, tokenizer)
    ids = tokenizer("w3 w15 and w7", add_special_tokens=False)["input_ids"]
    (own,) = simulator.of_ids("cats", [ids])
    (other,) = simulator.of_texts("cats", [["w3 ", "w1", "5 a", "nd w7"]])
    np.testing.assert_allclose(other, [own[0], own[1], max(own[1], own[2]), max(own[2], own[3])], rtol=1e-4)


def test_the_released_simulators_special_tokens_are_mapped(model, tokenizer, monkeypatch):
    monkeypatch.setattr(simulate, "RELEASED_VOCABULARY", 40)
    monkeypatch.setattr(simulate, "RELEASED_PAD", 1)
    monkeypatch.setattr(simulate, "RELEASED_SPECIAL", {39: 21})
    released = Simulator(model, tokenizer).of_ids("cats", [[39, 4], [5, 6, 7]])
    monkeypatch.undo()
    plain = Simulator(model, tokenizer).of_ids("cats", [[21, 4], [39, 4]])
    np.testing.assert_allclose(released[0], plain[0], rtol=1e-4)
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_carrying_over_by_hand():
    values = np.array([1.0, 5.0, 2.0])
    assert carried_over(values, [(0, 2), (2, 4), (5, 7)], ["a", "bcd", " ", "ef", ""]).tolist() == [1, 5, 0, 2, 0]
