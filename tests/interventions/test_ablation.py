import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_explain.interventions.ablation import ablated_logits
from ray_explain.interventions.layout import layout_of
from ray_explain.interventions.walk import row_bytes

FULL = [[3, 14, 15, 92, 65, 35, 89], [26, 5], [43, 38, 32, 79, 50, 28, 84]]
ABLATED = [[3, 14, 65, 35, 89], [26], [50, 28, 84]]


def own_logits(model, prompts):
    return torch.cat([model(torch.tensor([ids])).logits[:, -1] for ids in prompts])


def assert_same_logits(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert torch.equal(one.argmax(-1), other.argmax(-1))


@settings(max_examples=20)
@given(data=st.data())
def test_both_prompts_give_what_they_give_alone(model, data):
    token = st.integers(0, 100)
    full = data.draw(st.lists(st.lists(token, min_size=2, max_size=12), min_size=1, max_size=4))
    ablated = []
    for ids in full:
        start = data.draw(st.integers(0, len(ids) - 1))
        stop = data.draw(st.integers(start, len(ids) - (start == 0)))
        ablated.append(ids[:start] + ids[stop:])
    with_span, without = ablated_logits(model, full, ablated)
    assert_same_logits(with_span, own_logits(model, full))
    assert_same_logits(without, own_logits(model, ablated))


def test_removing_nothing_changes_nothing(model):
    one, other = ablated_logits(model, FULL, FULL)
    assert_same_logits(one, other)


def test_a_family_that_cannot_be_walked_gives_the_same(fallback_model):
    with_span, without = ablated_logits(fallback_model, FULL, ABLATED)
    assert_same_logits(with_span, own_logits(fallback_model, FULL))
    assert_same_logits(without, own_logits(fallback_model, ABLATED))


def test_the_common_beginning_runs_once(tiny_target):
    tokens = []
    handle = tiny_target.model.layers[0].mlp.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[1]))
    ablated_logits(tiny_target, FULL[:1], ABLATED[:1])
    handle.remove()
    assert sum(tokens) == 7 + 3


def test_pairs_are_split_when_memory_is_short(model):
    budget = 2 * row_bytes(layout_of(model))(7)
    for one, other in zip(
        ablated_logits(model, FULL, ABLATED),
        ablated_logits(model, FULL, ABLATED, memory_budget=budget),
        strict=True,
    ):
        assert_same_logits(one, other)


def test_each_full_prompt_needs_its_ablated_one(tiny_target):
    with pytest.raises(ValueError, match="3 full prompts, but 1 ablated ones"):
        ablated_logits(tiny_target, FULL, ABLATED[:1])


def test_no_prompts_give_no_logits(tiny_target):
    assert [logits.shape for logits in ablated_logits(tiny_target, [], [])] == [(0, 101), (0, 101)]
