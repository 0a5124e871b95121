import copy
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth.outcomes import answer_text, outcomes, special_answers
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer


def logits_of(probabilities: list[list[float]], vocabulary: int) -> torch.Tensor:
    full = torch.full((len(probabilities), vocabulary), -math.inf)
    for row, own in enumerate(probabilities):
        full[row, 10 : 10 + len(own)] = torch.tensor(own).log()
    return full.clamp(min=-1e9)


def test_answers_logprobs_and_divergence_are_those_worked_out_by_hand() -> None:
    tokenizer = world_tokenizer(World())
    before = logits_of([[0.5, 0.25, 0.25], [0.2, 0.8, 0.0]], len(tokenizer))
    after = logits_of([[0.25, 0.5, 0.25], [0.1, 0.9, 0.0]], len(tokenizer)) + 3.0  # any shift of logits is the same
    first, second = outcomes(tokenizer, before, after)
    assert first is not None and second is not None
    assert (first.before, first.after) == (tokenizer.decode([10]), tokenizer.decode([11]))
    assert (first.changed, second.changed) == (True, False)
    assert first.before_logprob == pytest.approx(math.log(0.5))
    assert second.after_logprob == pytest.approx(math.log(0.9), abs=1e-6)
    assert first.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), abs=1e-6)
    assert second.kl == pytest.approx(0.2 * math.log(2) + 0.8 * math.log(8 / 9), abs=1e-6)


def test_only_the_row_with_a_nan_has_no_outcome() -> None:
    tokenizer = world_tokenizer(World())
    before = torch.zeros(3, len(tokenizer))
    after = before.clone()
    before[0, 5], after[2, 7] = math.nan, math.inf
    found = outcomes(tokenizer, before, after)
    assert [one is None for one in found] == [True, False, True]


def test_the_divergence_of_equal_runs_is_never_negative() -> None:
    tokenizer = world_tokenizer(World())
    logits = torch.randn(64, len(tokenizer), generator=torch.Generator().manual_seed(0))
    assert all(one is not None and one.kl >= 0 for one in outcomes(tokenizer, logits, logits + 3.7))


def test_tokens_that_read_the_same_are_the_same_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("in", " in"))
    assert plain != spaced
    logits = torch.zeros(2, len(tokenizer))
    logits[0, plain], logits[1, spaced] = 5.0, 5.0
    (found,) = outcomes(tokenizer, logits[:1], logits[1:])
    assert found is not None and (found.before, found.after, found.changed) == ("in", "in", False)


def test_an_answer_is_never_empty(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [answer_text(tokenizer, token) for token in range(len(tokenizer))]
    assert all(text and text == text.strip() for text in texts)
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, line_break) == "Ċ"
    assert answer_text(tokenizer, len(tokenizer) + 7) == f"<{len(tokenizer) + 7}>"


def test_special_answers_are_those_that_decoding_leaves_out(tokenizer: PreTrainedTokenizerFast) -> None:
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.add_special_tokens(["<|eot_id|>"])
    other.add_tokens(["<think>"])
    left_out = [token for token in range(len(other)) if not other.decode([token], skip_special_tokens=True)]
    assert special_answers(other) == {answer_text(other, token) for token in left_out}
    assert special_answers(other) == {"<|begin|>", "<|end|>", "<|eot_id|>"}
