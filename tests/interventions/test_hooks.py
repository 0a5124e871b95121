import pytest
import torch

from ray_explain.interventions.hooks import Kind, Patch, capturing, replacing, writing

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])
AT = torch.tensor([1, 3])
ROWS = torch.arange(2)


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_layer_i_is_the_hidden_state_after_block_i(model):
    with capturing(model, range(3)) as after, capturing(model, range(3), "resid_pre") as before:
        out = model(IDS, output_hidden_states=True)
    for layer in range(3):
        torch.testing.assert_close(before[layer], out.hidden_states[layer])
    for layer in range(2):
        torch.testing.assert_close(after[layer], out.hidden_states[layer + 1])


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_each_kind_does_to_the_activation_what_it_says_and_nothing_elsewhere(model, site):
    values = torch.randn(2, 32)
    with capturing(model, [1], site) as clean:
        model(IDS)
    expected: dict[Kind, torch.Tensor] = {
        "replace": values,
        "add": clean[1][ROWS, AT] + values,
        "zero": torch.zeros(2, 32),
        "mean": clean[1].mean(1),
    }
    for kind, at_positions in expected.items():
        given = values if kind in ("replace", "add") else None
        patch = Patch(layer=1, positions=AT, values=given, site=site, kind=kind)
        with writing(model, patch), capturing(model, [1], site) as seen:
            model(IDS)
        changed = clean[1].clone()
        changed[ROWS, AT] = at_positions
        torch.testing.assert_close(seen[1], changed)


def test_patches_are_written_in_order(tiny_target):
    patches = [
        Patch(layer=0, positions=AT, values=torch.ones(2, 32)),
        Patch(layer=0, positions=AT, values=torch.ones(2, 32), kind="add"),
    ]
    with writing(tiny_target, *patches), capturing(tiny_target, [0]) as seen:
        tiny_target(IDS)
    assert (seen[0][ROWS, AT] == 2).all()


def test_hooks_are_gone_afterwards_also_after_an_error(model):
    before, clean = n_hooks(model), model(IDS).logits
    patch = Patch(layer=1, positions=AT, values=torch.randn(2, 32))
    with pytest.raises(RuntimeError, match="the user's"), writing(model, patch), capturing(model, [0], "attn_out"):
        assert n_hooks(model) == before + 2
        raise RuntimeError("the user's")
    assert n_hooks(model) == before
    assert torch.equal(model(IDS).logits, clean)


def test_a_layer_that_is_not_there_leaves_no_hook_behind(tiny_target):
    before = n_hooks(tiny_target)
    with pytest.raises(ValueError, match="layer 7"), capturing(tiny_target, [0, 7]):
        pass
    assert n_hooks(tiny_target) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"site": "middle"}, "site 'middle': it is one of resid_pre"),
        ({"kind": "swap"}, "kind 'swap': it is one of replace"),
        ({"kind": "zero"}, "kind 'zero' takes no vectors"),
        ({"values": None}, "kind 'replace' needs vectors"),
        ({"values": torch.ones(3, 32)}, "3 vectors for 2 positions"),
    ],
)
def test_a_patch_that_makes_no_sense_is_an_error(wrong, message):
    with pytest.raises(ValueError, match=message):
        Patch(**({"layer": 0, "positions": AT, "values": torch.ones(2, 32)} | wrong))


def test_replacing_takes_only_patches_that_overwrite(tiny_target):
    with pytest.raises(ValueError, match="'add': use writing"):
        replacing(tiny_target, Patch(layer=0, positions=AT, values=torch.ones(2, 32), kind="add"))
