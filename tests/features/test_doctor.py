import math
from dataclasses import replace

import pytest
import torch

from ray_explain.features import doctor
from ray_explain.features.doctor import UnfitSAE, examine, refuse
from ray_explain.features.sae import SAE
from ray_explain.features.training import train_sae


@pytest.fixture(scope="module")
def layers(planting):
    """The residual stream after three layers, each adding to the one before, as in a transformer."""
    adding = [planting(seed=seed, norm=norm).residual for seed, norm in ((11, 12.0), (12, 16.0), (13, 20.0))]
    return {layer: sum(adding[: layer + 1]) for layer in range(3)}


@pytest.fixture(scope="module")
def of_layer_1(layers):
    return train_sae(layers[1], d_sae=128, k=6, steps=300, batch_tokens=512, seed=0, layer=1)


def test_figures_by_hand():
    sae = SAE(
        encoder=torch.eye(2),
        encoder_bias=torch.zeros(2),
        directions=torch.tensor([[1.0, 0.0], [0.0, 0.5]]),
        decoder_bias=torch.zeros(2),
    )
    figures = examine(sae, torch.tensor([[3.0, 2.0], [1.0, 0.0], [2.0, -2.0], [2.0, 0.0]]))
    assert figures.l0 == 5 / 4
    assert figures.dead_fraction == 0
    assert figures.dense_fraction == 1
    # Errors: 1 (half of 2 is missing) and 2 (negative); variance about the mean (2, 0): 1 + 4, 1, 4, 0.
    assert figures.fvu == pytest.approx((1 + 4) / 10)
    assert figures.n_tokens == 4


def test_a_perfect_sae_leaves_nothing_and_a_silent_one_leaves_all():
    x = torch.randn(500, 4)
    mirror = torch.cat([torch.eye(4), -torch.eye(4)])
    perfect = SAE(encoder=mirror, encoder_bias=torch.zeros(8), directions=mirror, decoder_bias=torch.zeros(4))
    assert examine(perfect, x).fvu == pytest.approx(0, abs=1e-10)
    silent = replace(perfect, encoder_bias=torch.full((8,), -100.0), decoder_bias=x.mean(dim=0))
    assert examine(silent, x).fvu == pytest.approx(1)
    assert examine(silent, x).dead_fraction == 1


def test_figures_do_not_depend_on_the_size_of_the_parts(trained, planted, monkeypatch):
    whole = examine(trained, planted.residual)
    monkeypatch.setattr(doctor, "NUMBERS_AT_A_TIME", 64 * 100)
    parts = examine(trained, planted.residual)
    assert parts.fvu == pytest.approx(whole.fvu, rel=1e-5)
    assert parts.l0 == pytest.approx(whole.l0, rel=1e-5)


def test_an_sae_that_fits_is_let_through(of_layer_1, layers):
    figures = refuse(of_layer_1, layers[1], elsewhere={0: layers[0], 2: layers[2]})
    assert figures.fvu == pytest.approx(of_layer_1.declared["fvu"], abs=0.02)


@pytest.mark.parametrize("given", [0, 2])
def test_a_wrong_layer_is_named(of_layer_1, layers, given):
    mislabelled = replace(of_layer_1, layer=given)
    others = {layer: x for layer, x in layers.items() if layer != given}
    with pytest.raises(UnfitSAE, match=r"wrong layer. On layer 1 it leaves"):
        refuse(mislabelled, layers[given], elsewhere=others)


@pytest.mark.parametrize("given", [0, 2])
def test_a_wrong_layer_is_the_cause_left_over_where_no_other_is_given(of_layer_1, layers, given):
    with pytest.raises(UnfitSAE, match="another layer, site or target"):
        refuse(of_layer_1, layers[given])


def test_a_wrong_layer_is_told_even_if_nothing_is_declared(of_layer_1, layers):
    silent = replace(of_layer_1, declared={})
    with pytest.raises(UnfitSAE, match=r"wrong layer"):
        refuse(silent, layers[2], elsewhere={1: layers[1]})


def test_a_missing_normalisation_is_named(of_layer_1, layers):
    lost = replace(of_layer_1, normalisation="none", scale=1.0)
    with pytest.raises(UnfitSAE, match=r"missing or wrong normalisation. Inputs want scaled to a mean norm of sqrt"):
        refuse(lost, layers[1] * 40)


def test_a_normalisation_too_many_is_named(planting):
    data = planting(seed=3, norm=40.0).residual
    sae = train_sae(data, d_sae=64, k=3, steps=200, batch_tokens=512, seed=0)
    folded = replace(
        sae,
        encoder=sae.encoder * sae.scale,
        directions=sae.directions / sae.scale,
        normalisation="none",
        scale=1.0,
        decoder_bias=sae.decoder_bias / sae.scale,
    )
    assert examine(folded, data).fvu == pytest.approx(sae.declared["fvu"], abs=0.02)
    twice = replace(folded, normalisation="token_norm", scale=math.sqrt(32))
    with pytest.raises(UnfitSAE, match=r"wrong normalisation. Inputs want none"):
        refuse(twice, data)


def test_a_wrong_activation_function_is_named(of_layer_1, layers):
    as_relu = replace(of_layer_1, activation="relu", k=0)
    with pytest.raises(
        UnfitSAE, match=r"features on per token, 6\.0 are declared.*wrong activation function. Top-6 fits"
    ):
        refuse(as_relu, layers[1])


def test_a_threshold_too_many_is_named():
    x = torch.rand(2000, 8)
    sae = SAE(encoder=torch.eye(8), encoder_bias=torch.zeros(8), directions=torch.eye(8), decoder_bias=torch.zeros(8))
    spoilt = replace(sae, activation="jumprelu", threshold=torch.full((8,), 0.9))
    with pytest.raises(UnfitSAE, match=r"wrong activation function. ReLU fits; it is read as jumprelu"):
        refuse(spoilt, x)


def test_a_bias_not_subtracted_is_named(planting):
    data = planting(seed=5).residual + 30
    sae = train_sae(data, d_sae=64, k=3, steps=200, batch_tokens=512, seed=0)
    with pytest.raises(UnfitSAE, match=r"wrong centring. The decoder bias should be subtracted"):
        refuse(replace(sae, centre_inputs=False), data)


def test_outlier_tokens_are_named(of_layer_1, layers):
    spoilt = layers[1].clone()
    spoilt[::64, 0] += 5000
    with pytest.raises(UnfitSAE, match=r"first or other outlier tokens, .* leave them out"):
        refuse(of_layer_1, spoilt)


def test_the_message_says_which_sae_and_what_was_found(of_layer_1, layers):
    with pytest.raises(
        UnfitSAE, match=r"SAE trained of layer 1 .* unexplained \d\.\d\d, 0\.\d\d is declared .*8000 tokens"
    ):
        refuse(of_layer_1, layers[2])


def test_without_declared_figures_only_a_gross_misfit_is_refused(of_layer_1, layers):
    undeclared = replace(of_layer_1, declared={})
    assert refuse(undeclared, layers[1]).fvu < 0.5
    with pytest.raises(UnfitSAE, match=r"at most 0\.50 is expected"):
        refuse(replace(undeclared, directions=-undeclared.directions), layers[1])


def test_one_token_is_not_enough(trained, planted):
    with pytest.raises(ValueError, match="1 tokens"):
        examine(trained, planted.residual[:1])
