import json
import math
from dataclasses import replace

import pytest
import torch

from ray_explain.features.sae import SAE

KINDS = [
    {"activation": "relu"},
    {"activation": "jumprelu", "weigh_by_norm": True},
    {"activation": "topk", "k": 3},
    {"activation": "topk", "k": 3, "weigh_by_norm": True, "normalisation": "scale", "scale": 0.3},
    {"activation": "relu", "normalisation": "token_norm", "scale": math.sqrt(6), "centre_inputs": True},
    {"activation": "relu", "normalisation": "layer_norm"},
]


@pytest.mark.parametrize("settings", KINDS)
def test_a_tokens_features_do_not_depend_on_the_other_tokens(settings, random_sae):
    sae, x = random_sae(**settings), torch.randn(9, 6) * 3
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(sae.encode(x), alone)
    assert bool((alone > 0).any())
    assert bool((alone >= 0).all())


def test_relu_by_hand(random_sae):
    sae, x = random_sae(centre_inputs=True), torch.randn(4, 6)
    by_hand = ((x - sae.decoder_bias) @ sae.encoder.T + sae.encoder_bias).clamp_min(0)
    torch.testing.assert_close(sae.encode(x), by_hand)
    torch.testing.assert_close(sae.decode(by_hand), by_hand @ sae.directions + sae.decoder_bias)


def test_topk_keeps_the_largest_and_leaves_their_values(random_sae):
    sae, x = random_sae(activation="topk", k=2), torch.randn(50, 6)
    full = random_sae().encode(x)
    kept = sae.encode(x)
    for row, before in zip(kept, full, strict=True):
        largest = before.topk(2).indices
        torch.testing.assert_close(row[largest], before[largest])
        assert int((row > 0).sum()) == min(2, int((before > 0).sum()))


def test_jumprelu_is_off_at_the_threshold_and_whole_above_it():
    sae = SAE(
        encoder=torch.eye(3),
        encoder_bias=torch.zeros(3),
        directions=torch.diag(torch.tensor([1.0, 1.0, 4.0])),
        decoder_bias=torch.zeros(3),
        threshold=torch.full((3,), 2.0),
        activation="jumprelu",
    )
    x = torch.tensor([[2.0, 2.5, 1.0]])
    assert sae.encode(x).tolist() == [[0.0, 2.5, 0.0]]
    assert replace(sae, weigh_by_norm=True).encode(x).tolist() == [[0.0, 2.5, 1.0]]


def test_scaled_inputs_are_brought_back_by_decode(trained, planted):
    assert trained.normalisation == "scale"
    assert trained.scale == pytest.approx(
        32**0.5 / float((planted.residual - planted.residual.mean(0)).norm(dim=1).mean())
    )
    x = planted.residual[:100]
    decoded = trained.decode(trained.encode(x))
    assert float((x - decoded).norm() / x.norm()) < 0.3


@pytest.mark.parametrize(("normalisation", "scale"), [("token_norm", 2.0), ("layer_norm", 1.0)])
def test_what_each_token_is_normalised_by_is_undone(normalisation, scale, random_sae):
    sae, x = random_sae(normalisation=normalisation, scale=scale), torch.randn(5, 6) * 7 + 1
    normal, restore = sae.normalise(x)
    spread = normal.norm(dim=1) if normalisation == "token_norm" else normal.std(dim=1)
    torch.testing.assert_close(spread, torch.full((5,), scale))
    torch.testing.assert_close(normal / restore.factor + restore.shift, x)
    nothing = sae.decode(torch.zeros(5, 12), like=x)
    torch.testing.assert_close(nothing, sae.decoder_bias / restore.factor + restore.shift)
    with pytest.raises(ValueError, match="needs `like`"):
        sae.decode(torch.zeros(5, 12))


def test_half_precision_and_transposed_weights_encode_alike(random_sae):
    sae, x = random_sae(d_sae=12), torch.randn(4, 6)
    rounded = sae.encoder.to(torch.bfloat16)
    narrow = replace(sae, encoder=rounded.T.contiguous().T)
    torch.testing.assert_close(narrow.encode(x), replace(sae, encoder=rounded.float()).encode(x))


@pytest.mark.parametrize("settings", KINDS)
def test_a_saved_sae_is_read_back_whole(tmp_path, settings, random_sae):
    sae, x = replace(random_sae(**settings), layer=5, declared={"l0": 3.5}, origin="here"), torch.randn(7, 6)
    sae.save(tmp_path)
    back = SAE.load(tmp_path)
    assert torch.equal(back.encode(x), sae.encode(x))
    assert torch.equal(back.directions, sae.directions)
    assert (back.layer, back.declared, back.origin) == (5, {"l0": 3.5}, "here")


def test_a_saved_sae_with_unknown_settings_is_refused(tmp_path, random_sae):
    random_sae().save(tmp_path)
    settings = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps({**settings, "gate": True}))
    with pytest.raises(ValueError, match="gate"):
        SAE.load(tmp_path)


def test_rows_that_are_not_finite_are_named(random_sae):
    sae, x = random_sae(), torch.randn(4, 6)
    x[2, 3] = math.nan
    with pytest.raises(ValueError, match=r"1 of 4 .* row 2"):
        sae.encode(x)


def test_another_width_is_refused(random_sae):
    with pytest.raises(ValueError, match=r"\[4, 7\] for an SAE of width 6"):
        random_sae().encode(torch.randn(4, 7))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"directions": torch.zeros(6, 12)}, r"directions .* is \[6, 12\]"),
        ({"activation": "gelu"}, "gelu"),
        ({"activation": "topk", "k": 13}, "k=13"),
        ({"activation": "jumprelu"}, "thresholds belong"),
        ({"normalisation": "rms"}, "rms"),
        ({"scale": 0.0}, "scale=0.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, words, random_sae):
    with pytest.raises(ValueError, match=words):
        replace(random_sae(), **change)
