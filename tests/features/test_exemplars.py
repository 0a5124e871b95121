import random
from typing import Any

import numpy as np
import pytest
import torch

from ray_explain.features import exemplars
from ray_explain.features.exemplars import TopWindows, Windows, projecting, search

POSITIONS, D_MODEL, D_SAE = 7, 6, 12
SIZES: dict[str, Any] = {"top": 3, "random": 4, "near": 2}


@pytest.fixture
def sae(random_sae):
    return random_sae(d_sae=D_SAE, d_model=D_MODEL, activation="topk", k=2)


@pytest.fixture
def corpus():
    generator = torch.Generator().manual_seed(8)
    n = 60
    ids = torch.randperm(1000, generator=generator)[:n]
    present = torch.arange(POSITIONS) < torch.randint(2, POSITIONS + 1, (n, 1), generator=generator)
    return Windows(ids, torch.randn(n, POSITIONS, D_MODEL, generator=generator) * 2, present)


def part(corpus, rows):
    return Windows(*(column[rows] for column in corpus))


def found_in(sae, corpus, rows=None, **settings):
    found = TopWindows(sae.d_sae, POSITIONS, **{**SIZES, **settings})
    batch = corpus if rows is None else part(corpus, rows)
    return search(sae, [batch], found)


def as_lists(found):
    return {
        feature: [(e.kind, e.rank, e.window, e.activations.tolist()) for e in windows] for feature, windows in found
    }


def by_hand(sae, corpus):
    """Pre-activations and activations of the whole corpus, zero where nothing is."""
    x = corpus.residual.reshape(-1, D_MODEL)
    pre = sae.pre_activations(x).view(-1, POSITIONS, D_SAE).masked_fill(~corpus.present[..., None], -torch.inf)
    return pre, sae.encode(x).view(-1, POSITIONS, D_SAE) * corpus.present[..., None]


def test_top_windows_are_those_of_the_whole_matrix(sae, corpus):
    _, activations = by_hand(sae, corpus)
    found = found_in(sae, corpus)
    for feature in range(D_SAE):
        score = activations[..., feature].amax(dim=1)
        best = [i for i in score.argsort(descending=True).tolist() if score[i] > 0][: SIZES["top"]]
        top = [exemplar for exemplar in found.exemplars(feature) if exemplar.kind == "top"]
        assert [exemplar.window for exemplar in top] == corpus.ids[best].tolist()
        for exemplar, i in zip(top, best, strict=True):
            np.testing.assert_allclose(exemplar.activations, activations[i][:, feature].numpy(), rtol=1e-6)
            assert not exemplar.activations[~corpus.present[i].numpy()].any()


def test_random_windows_are_those_in_which_the_feature_is_off(sae, corpus):
    _, activations = by_hand(sae, corpus)
    off = {feature: set(corpus.ids[activations[..., feature].amax(dim=1) == 0].tolist()) for feature in range(D_SAE)}
    for feature, windows in found_in(sae, corpus):
        drawn = [exemplar for exemplar in windows if exemplar.kind == "random"]
        assert len(drawn) == min(SIZES["random"], len(off[feature]))
        assert {exemplar.window for exemplar in drawn} <= off[feature]
        assert len({exemplar.window for exemplar in drawn}) == len(drawn)
        assert all((exemplar.activations == 0).all() for exemplar in drawn)


def test_near_misses_are_off_and_closest_to_being_on(sae, corpus):
    pre, activations = by_hand(sae, corpus)
    found = found_in(sae, corpus)
    for feature in range(D_SAE):
        off = activations[..., feature].amax(dim=1) == 0
        closeness = pre[..., feature].amax(dim=1).masked_fill(~off, -torch.inf)
        expected = [i for i in closeness.argsort(descending=True).tolist() if off[i]][: SIZES["near"]]
        near = [exemplar.window for exemplar in found.exemplars(feature) if exemplar.kind == "near"]
        assert near == corpus.ids[expected].tolist()


def test_negative_closeness_sorts_the_right_way_round():
    scores = torch.tensor([[-3.0], [2.0], [-0.5], [0.0], [-1e-30], [1e-30]])
    keys = exemplars._keys(scores, torch.arange(6))
    assert keys[:, 0].argsort(descending=True).tolist() == [1, 5, 3, 4, 2, 0]


def test_equal_scores_go_to_the_lower_window_number():
    keys = exemplars._keys(torch.tensor([[0.0], [-0.0], [0.0]]), torch.tensor([9, 3, 2**32 - 1]))
    assert keys[:, 0].argsort(descending=True).tolist() == [1, 0, 2]


@pytest.mark.parametrize("actors", [2, 4])
def test_four_actors_find_what_one_finds(sae, corpus, actors):
    alone = as_lists(found_in(sae, corpus))
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(actors))
    parts = [found_in(sae, corpus, some) for some in rows.chunk(actors)]
    random.Random(0).shuffle(parts)
    merged = parts[0]
    for other in parts[1:]:
        merged = merged.merge(other)
    assert as_lists(merged) == alone
    assert torch.equal(merged.fired, found_in(sae, corpus).fired)


def test_a_merge_can_be_nested_in_any_way(sae, corpus):
    def some(i):
        return found_in(sae, corpus, torch.arange(60).chunk(3)[i])

    assert as_lists(some(0).merge(some(1)).merge(some(2))) == as_lists(some(2).merge(some(1).merge(some(0))))


def test_batches_and_parts_of_batches_do_not_matter(sae, corpus, monkeypatch):
    whole = as_lists(found_in(sae, corpus))
    monkeypatch.setattr(exemplars, "NUMBERS_AT_A_TIME", 5 * POSITIONS * D_SAE)
    batches = (part(corpus, rows) for rows in torch.arange(60).split(13))
    in_parts = as_lists(search(sae, batches, TopWindows(D_SAE, POSITIONS, **SIZES)))
    for feature, windows in whole.items():
        assert [w[:3] for w in in_parts[feature]] == [w[:3] for w in windows]
        for (*_, some), (*_, all_) in zip(in_parts[feature], windows, strict=True):
            np.testing.assert_allclose(some, all_, rtol=1e-5)


def test_windows_taken_in_twice_are_kept_once(sae, corpus):
    again = found_in(sae, corpus).merge(found_in(sae, corpus))
    assert as_lists(again) == as_lists(found_in(sae, corpus))


def test_the_seed_decides_the_random_windows_and_features_have_their_own(sae, corpus):
    def drawn(seed):
        return {
            feature: {e.window for e in windows if e.kind == "random"}
            for feature, windows in found_in(sae, corpus, seed=seed)
        }

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert len({frozenset(windows) for windows in drawn(1).values()}) > D_SAE / 2


def test_random_windows_are_drawn_evenly():
    n = 400
    found = TopWindows(500, 1, top=0, random=5, near=0)
    for ids in torch.arange(n).split(50):
        found.add(ids, torch.zeros(len(ids), 1, 500))
    windows = np.array([exemplar.window for _, exemplars_ in found for exemplar in exemplars_])
    counts = np.bincount(windows // 50, minlength=8)
    assert counts.sum() == 2500
    assert abs(counts - 2500 / 8).max() < 5 * np.sqrt(2500 / 8)


def test_padding_has_no_part_in_anything(sae, corpus):
    spoilt = corpus.residual.clone()
    spoilt[~corpus.present] = torch.nan
    assert as_lists(found_in(sae, corpus._replace(residual=spoilt))) == as_lists(found_in(sae, corpus))


def test_padding_does_not_bring_a_window_near():
    sae = projecting(torch.ones(1, 1), layer=0)
    residual = torch.tensor([[[-5.0], [0.0]], [[-1.0], [-2.0]]])
    present = torch.tensor([[True, False], [True, True]])
    corpus = Windows(torch.tensor([4, 5]), residual, present)
    found = search(sae, [corpus], TopWindows(1, 2, top=1, random=0, near=1))
    assert [exemplar.window for exemplar in found.exemplars(0)] == [5]


def test_a_feature_that_is_never_off_has_no_negatives():
    found = TopWindows(1, 2, **SIZES)
    found.add(torch.arange(5), torch.ones(5, 2, 1), torch.ones(5, 1))
    assert [exemplar.kind for exemplar in found.exemplars(0)] == ["top"] * 3
    assert found.fired.tolist() == [found.n_windows]


def test_a_feature_that_is_never_on_has_no_top():
    found = TopWindows(1, 2, **SIZES)
    found.add(torch.arange(9), torch.zeros(9, 2, 1), torch.rand(9, 1) - 1)
    assert [exemplar.kind for exemplar in found.exemplars(0)] == ["random"] * 4 + ["near"] * 2
    assert [exemplar.rank for exemplar in found.exemplars(0)] == [0, 1, 2, 3, 0, 1]


def test_raw_vectors_are_on_by_their_dot_product(corpus):
    vectors = torch.randn(4, D_MODEL, generator=torch.Generator().manual_seed(1))
    found = found_in(projecting(vectors, layer=3), corpus)
    dot = (corpus.residual @ vectors.T).clamp_min(0) * corpus.present[..., None]
    for vector in range(4):
        first = found.exemplars(vector)[0]
        i = corpus.ids.tolist().index(first.window)
        assert first.window == int(corpus.ids[dot[..., vector].amax(dim=1).argmax()])
        np.testing.assert_allclose(first.activations, dot[i, :, vector].numpy(), rtol=1e-5)


def test_only_alike_ones_are_merged(sae, corpus):
    with pytest.raises(ValueError, match="only alike ones can be merged"):
        found_in(sae, corpus).merge(found_in(sae, corpus, seed=1))


@pytest.mark.parametrize(
    ("ids", "shape", "words"),
    [([0, 1], (2, 3, 2), "windows of 2 positions"), ([0, 2**32], (2, 2, 2), "4294967296"), ([-1, 1], (2, 2, 2), "-1")],
)
def test_windows_that_do_not_fit_are_refused(ids, shape, words):
    found = TopWindows(2, 2)
    with pytest.raises(ValueError, match=words):
        found.add(torch.tensor(ids), torch.zeros(shape))
