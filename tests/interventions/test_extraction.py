import pytest
import torch

from ray_explain.interventions.extraction import BlockRequest, block_means, residuals
from ray_explain.interventions.hooks import capturing
from ray_explain.interventions.layout import SITES, layout_of
from ray_explain.interventions.walk import row_bytes

PROMPTS = [[3, 14, 15, 92, 65, 35, 89], [26], [43, 38, 32, 79, 50, 28, 84], [93, 75, 10]]


@pytest.mark.parametrize("site", SITES)
def test_what_is_read_is_what_passes_by_in_the_models_own_forward_pass(model, site):
    assert_same_as_hooks(model, site)


@pytest.mark.parametrize("site", SITES)
def test_a_family_that_cannot_be_walked_is_read_by_hooks(fallback_model, site):
    assert_same_as_hooks(fallback_model, site)


def assert_same_as_hooks(model, site):
    layers, wanted = [2, 0], [[6, 1, 1], [0], [], [2]]
    some, every = residuals(model, PROMPTS, layers, wanted, site), residuals(model, PROMPTS, layers, site=site)
    for ids, at, few, all_of_them in zip(PROMPTS, wanted, some, every, strict=True):
        with capturing(model, layers, site) as seen:
            model(torch.tensor([ids]))
        expected = torch.stack([seen[2][0], seen[0][0]])
        torch.testing.assert_close(all_of_them, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(few, expected[:, at], atol=1e-5, rtol=0)


def test_blocks_above_the_deepest_layer_do_not_run(model, fallback_model):
    for one in (model, fallback_model):
        assert modules_run(one, [1], "resid_post") == modules_run(one, [1], "attn_out") == [0, 1]
    assert modules_run(model, [1], "resid_pre") == [0]


def modules_run(model, layers, site):
    ran, layout = [], layout_of(model)
    handles = [b.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(layout.blocks)]
    handles.append(layout.unembedding.register_forward_pre_hook(lambda *_: ran.append("logits")))
    residuals(model, PROMPTS[:1], layers, site=site)
    for handle in handles:
        handle.remove()
    return ran


def test_a_prompts_vectors_do_not_depend_on_its_batch(model):
    budget = 2 * row_bytes(layout_of(model))(7)
    for one, other in zip(
        residuals(model, PROMPTS, [1]), residuals(model, PROMPTS, [1], memory_budget=budget), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_block_means_are_the_mean_over_the_layers_of_the_block(tiny_target):
    requests = [
        BlockRequest(prompt=2, positions=(6, 0), first_layer=0, last_layer=2),
        BlockRequest(prompt=0, positions=(3,), first_layer=1, last_layer=1),
        BlockRequest(prompt=2, positions=(5,), first_layer=1, last_layer=2),
    ]
    every = residuals(tiny_target, PROMPTS, range(3))
    means = block_means(tiny_target, PROMPTS, requests)
    assert [m.shape for m in means] == [(2, 32), (1, 32), (1, 32)]
    torch.testing.assert_close(means[0], every[2].mean(0)[[6, 0]], atol=1e-5, rtol=0)
    torch.testing.assert_close(means[1], every[0][1, [3]], atol=1e-5, rtol=0)
    torch.testing.assert_close(means[2], every[2][1:, 5:6].mean(0), atol=1e-5, rtol=0)


def test_each_source_runs_once_whatever_is_asked_of_it(tiny_target):
    tokens = []
    handle = tiny_target.model.layers[0].mlp.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[1]))
    requests = [BlockRequest(prompt=0, positions=(p,), first_layer=0, last_layer=i) for p in range(7) for i in range(3)]
    block_means(tiny_target, PROMPTS, requests)
    handle.remove()
    assert sum(tokens) == len(PROMPTS[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"layers": []}, "no layers to read"),
        ({"layers": [3]}, "layer 3 of a llama model"),
        ({"layers": [0], "positions": [[0]]}, "positions for 1 prompts, but there are 4"),
        ({"layers": [0], "positions": [[0], [1], [0], [0]]}, r"prompt 1 at positions \[1\]: it has 1"),
    ],
)
def test_what_is_not_there_cannot_be_read(tiny_target, call, message):
    with pytest.raises(ValueError, match=message):
        residuals(tiny_target, PROMPTS, **call)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (BlockRequest(prompt=4, positions=(0,), first_layer=0, last_layer=0), "request 0 is about prompt 4"),
        (BlockRequest(prompt=0, positions=(0,), first_layer=1, last_layer=0), "layers 1 to 0: first after last"),
    ],
)
def test_a_request_that_makes_no_sense_is_an_error(tiny_target, request_, message):
    with pytest.raises(ValueError, match=message):
        block_means(tiny_target, PROMPTS, [request_])


def test_nothing_asked_gives_nothing(tiny_target):
    assert residuals(tiny_target, [], [0]) == []
    assert block_means(tiny_target, PROMPTS, []) == []
