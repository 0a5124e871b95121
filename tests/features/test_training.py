import math
from typing import Any

import pytest
import torch
from torch.nn import functional

from ray_explain.features.doctor import examine
from ray_explain.features.training import train_sae

K = 3
SMALL: dict[str, Any] = {"d_sae": 64, "k": K, "batch_tokens": 512}


def best_cosines(planted, sae):
    return (planted.directions @ functional.normalize(sae.directions, dim=1).T).max(dim=1).values


def test_planted_directions_are_found(planted, trained):
    cosines = best_cosines(planted, trained)
    assert float(cosines.mean()) > 0.95
    assert float((cosines > 0.9).float().mean()) > 0.9


def test_found_features_are_on_where_their_directions_are(planted, trained):
    cosines = planted.directions @ trained.directions.T
    encoded = trained.encode(planted.residual)
    for feature in cosines.max(dim=1).values.topk(20).indices.tolist():
        match = int(cosines[feature].argmax())
        pair = torch.stack([planted.activations[:, feature], encoded[:, match]])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_directions_are_of_unit_norm_and_figures_declared(planted, trained):
    torch.testing.assert_close(trained.directions.norm(dim=1), torch.ones(64))
    figures = examine(trained, planted.residual)
    assert trained.declared["fvu"] == pytest.approx(figures.fvu, abs=0.02)
    assert figures.fvu < 0.1
    assert figures.l0 == pytest.approx(K, abs=0.1)
    assert trained.layer == 1


def test_it_does_as_well_on_tokens_it_was_not_trained_on(planting):
    whole = planting(seed=4, tokens=12_000)
    sae = train_sae(whole.residual[:8000], steps=300, seed=0, **SMALL)
    assert examine(sae, whole.residual[8000:]).fvu < sae.declared["fvu"] + 0.02


def test_the_seed_decides_everything(planted):
    one, same, other = (train_sae(planted.residual, steps=20, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(one.directions, same.directions)
    assert torch.equal(one.encoder, same.encoder)
    assert not torch.equal(one.directions, other.directions)


def test_the_global_random_state_is_left_alone(planted):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_sae(planted.residual, steps=3, seed=1, **SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_units_of_the_activations_do_not_matter(planted):
    near, far = (train_sae(planted.residual * unit, steps=40, seed=0, **SMALL) for unit in (1.0, 256.0))
    torch.testing.assert_close(near.directions, far.directions, atol=1e-4, rtol=0)
    assert far.scale == pytest.approx(near.scale / 256)


def test_dead_features_are_revived(planted, monkeypatch):
    from ray_explain.features import training

    class HalfDead(training._Learner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            with torch.no_grad():
                self.encoder_bias[:32] = -100

    monkeypatch.setattr(training, "_Learner", HalfDead)
    revived = train_sae(planted.residual, steps=200, seed=0, **SMALL)
    monkeypatch.setattr(training, "REVIVE_EVERY_STEPS", 1000)
    left = train_sae(planted.residual, steps=200, seed=0, **SMALL)
    assert left.declared["dead_fraction"] >= 0.5
    assert revived.declared["dead_fraction"] < 0.1
    assert revived.declared["fvu"] < 0.7 * left.declared["fvu"]


def test_progress_is_told_at_every_step(planted):
    told = []
    train_sae(planted.residual, steps=60, seed=0, on_step=lambda step, fvu: told.append((step, fvu)), **SMALL)
    assert [step for step, _ in told] == list(range(1, 61))
    assert told[-1][1] < 0.7 * told[0][1]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x[:100], "at least one batch of 512"),
        (lambda x: x.index_fill(0, torch.tensor([7]), math.inf), "1 of 8000"),
        (lambda x: torch.ones_like(x), "nothing to learn"),
    ],
)
def test_activations_of_no_use_are_refused(planted, spoil, words):
    with pytest.raises(ValueError, match=words):
        train_sae(spoil(planted.residual.clone()), steps=5, seed=0, **SMALL)


def test_more_active_features_than_there_are_is_refused(planted):
    with pytest.raises(ValueError, match="k=65"):
        train_sae(planted.residual, d_sae=64, k=65, steps=5, batch_tokens=512, seed=0)
