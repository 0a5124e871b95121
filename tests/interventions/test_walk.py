import pytest
import torch

from ray_explain.interventions.layout import layout_of
from ray_explain.interventions.walk import Packing, Row, budgeted, obstacle, walk, whole

IDS = [5, 6, 7, 8, 9]


def unchanged(site, layer, activations):
    return activations


def test_the_attention_of_the_model_is_back_afterwards_also_after_an_error(model):
    layout = layout_of(model)
    packing = Packing([whole(IDS, 0)], 3, layout.device)
    before = model.config._attn_implementation

    def broken(site, layer, activations):
        raise RuntimeError("the visitor's")

    walk(layout, packing, unchanged)
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="the visitor's"):
        walk(layout, packing, broken)
    assert model.config._attn_implementation == before
    assert torch.isfinite(model(torch.tensor([IDS])).logits).all()


def test_every_site_is_visited_in_the_order_of_the_computation(tiny_target):
    layout, seen = layout_of(tiny_target), []

    def visit(site, layer, activations):
        seen.append((site, layer, len(activations)))
        return activations

    rows = [whole(IDS, 0), Row(length=5, start=3, origin=0, join=1)]
    walk(layout, Packing(rows, 3, layout.device), visit, inside=[("mlp_out", 0), ("attn_out", 0)], until=1)
    first = [("resid_pre", 0, 5), ("attn_out", 0, 5), ("mlp_out", 0, 5)]
    assert seen == [*first, ("resid_post", 0, 7), ("resid_pre", 1, 7)]


def test_a_row_left_alone_is_its_origin_wherever_it_joins(model):
    layout = layout_of(model)
    rows = [whole(IDS, 0)] + [Row(length=5, start=s, origin=0, join=j) for j in range(4) for s in range(5)]
    packing = Packing(rows, 3, layout.device)
    every = walk(layout, packing, unchanged)
    last = every[packing.last_tokens]
    torch.testing.assert_close(walk(layout, packing, unchanged, only_ends=True)[packing.last_tokens], last)
    torch.testing.assert_close(last, last[:1].expand_as(last), atol=1e-5, rtol=0)


def test_rows_that_carry_less_cost_less(tiny_target):
    layout, counted = layout_of(tiny_target), []
    handle = layout.module(2, "mlp_out").register_forward_hook(
        lambda module, args, out: counted.append(args[0].shape[1])
    )
    rows = [whole(IDS, 0), Row(length=5, start=3, origin=0, join=1), Row(length=5, start=0, origin=0, join=3)]
    walk(layout, Packing(rows, 3, layout.device), unchanged)
    walk(layout, Packing(rows, 3, layout.device), unchanged, only_ends=True)
    handle.remove()
    assert counted == [7, 2]


def test_known_families_can_be_walked_and_others_cannot(model, fallback_model):
    assert obstacle(layout_of(model), 64) is None
    assert obstacle(layout_of(fallback_model), 64) is not None


def test_items_are_taken_while_they_fit_and_what_they_share_counts_once():
    items = [("a", 2), ("a", 2), ("a", 2), ("b", 2), ("b", 5)]
    chunks = budgeted(items, lambda item: item[1], 7, lambda item: (item[0], 1))
    assert list(chunks) == [items[:3], items[3:4], items[4:]]


def test_chunks_are_no_larger_than_is_best_but_one_item_may_be():
    items = [2, 2, 2, 5, 2]
    assert list(budgeted(items, int, 7, best=4)) == [[2, 2], [2], [5], [2]]
    with pytest.raises(ValueError, match="a memory budget of 4 bytes"):
        list(budgeted(items, int, 4, best=2))
