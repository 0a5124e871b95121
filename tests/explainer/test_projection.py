import pytest
import torch

from ray_explain.explainer.projection import Projection, RidgeSums


def test_an_identity_gives_back_what_it_gets():
    vectors = torch.randn(3, 8)
    projection = Projection("identity", 8, 8)
    assert projection(vectors, [(0,), (1,), (7,)]) is vectors
    assert not list(projection.parameters())


def test_a_linear_projection_between_equal_widths_starts_as_the_identity():
    vectors = torch.randn(3, 8)
    projection = Projection("linear", 8, 8, [0, 2])
    torch.testing.assert_close(projection(vectors, [(0,), (2,), (0, 2)]), vectors)


@pytest.mark.parametrize(("d_target", "d_explainer"), [(8, 12), (12, 8)])
def test_between_other_widths_it_starts_with_orthonormal_rows_or_columns_and_the_same_every_time(d_target, d_explainer):
    weight = Projection("linear", d_target, d_explainer, [0, 1]).weight
    w = weight[0] if d_explainer < d_target else weight[0].T
    torch.testing.assert_close(w @ w.T, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(weight[0], weight[1])
    torch.testing.assert_close(weight, Projection("linear", d_target, d_explainer, [0, 1]).weight)
    assert not torch.equal(weight, Projection("linear", d_target, d_explainer, [0, 1], seed=1).weight)


def test_each_layer_has_its_own_map_and_a_block_the_mean_of_its_layers():
    projection = Projection("linear", 4, 6, [2, 5, 7])
    maps = {layer: torch.randn(6, 4) for layer in (2, 5, 7)}
    projection.set_weights(maps)
    vectors = torch.randn(4, 4)
    expected = [
        maps[5] @ vectors[0],
        maps[2] @ vectors[1],
        (maps[2] + maps[7]) / 2 @ vectors[2],
        (maps[2] + maps[5] + maps[7]) / 3 @ vectors[3],
    ]
    torch.testing.assert_close(projection(vectors, [(5,), (2,), (2, 7), (2, 5, 7)]), torch.stack(expected))


def test_a_map_is_trained_by_the_vectors_of_its_layer_only():
    projection = Projection("linear", 4, 6, [0, 1])
    projection(torch.ones(2, 4), [(1,), (1,)]).sum().backward()
    assert not projection.weight.grad[0].any()
    torch.testing.assert_close(projection.weight.grad[1], torch.full((6, 4), 2.0))


def test_no_vectors_are_no_vectors():
    assert Projection("linear", 4, 6, [0])(torch.empty(0, 4), []).shape == (0, 6)


def sums_of(x, y):
    sums = RidgeSums(x.shape[1], y.shape[1])
    sums.add(x, y)
    return sums


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_ridge_recovers_a_known_map(noise):
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(6, 4, generator=generator)
    x = torch.randn(5000, 4, generator=generator) @ torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0]))
    y = x @ true.T + noise * torch.randn(5000, 6, generator=generator)
    torch.testing.assert_close(sums_of(x, y).map(1e-6), true, atol=1e-3 + 0.1 * noise, rtol=0)


def test_ridge_is_the_minimum_of_what_it_says_it_minimises():
    x, y, penalty = torch.randn(50, 4).double(), torch.randn(50, 3).double(), 0.3
    weight = sums_of(x, y).map(penalty).double().requires_grad_()
    loss = ((x @ weight.T - y) ** 2).sum() + penalty * (x * x).sum() / 4 * (weight**2).sum()
    loss.backward()
    assert weight.grad.abs().max() < 1e-4 * (x.T @ y).abs().max()


def test_sums_over_parts_are_those_over_all_and_tell_the_share_explained():
    x, y = torch.randn(60, 5), torch.randn(60, 3)
    sums = RidgeSums(5, 3)
    for part in range(0, 60, 13):
        sums.add(x[part : part + 13], y[part : part + 13])
    weight = sums.map(1e-3)
    torch.testing.assert_close(weight, sums_of(x, y).map(1e-3))
    expected = 1 - ((x @ weight.T - y) ** 2).sum() / (y**2).sum()
    assert sums.explained(weight) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("layers", "message"), [([(0,), (3,)], "knows layers 0, 1"), ([(0,), ()], r"layers \[\]"), ([(0,), (0, 9)], "9")]
)
def test_a_vector_of_an_unknown_layer_is_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Projection("linear", 4, 6, [0, 1])(torch.ones(2, 4), layers)


def test_what_cannot_be_a_projection_is_refused():
    with pytest.raises(ValueError, match="use a linear projection"):
        Projection("identity", 4, 6)
    with pytest.raises(ValueError, match="of no layer"):
        Projection("linear", 4, 6)
    with pytest.raises(ValueError, match="width 5"):
        Projection("linear", 4, 6, [0])(torch.ones(1, 5), [(0,)])
    with pytest.raises(ValueError, match=r"maps of layers \[1\]"):
        Projection("linear", 4, 6, [0]).set_weights({1: torch.ones(6, 4)})


def test_an_explainer_whose_questions_have_no_vectors_may_have_any_width():
    """Ablation alone, asked of a model that is wider or narrower than the target."""
    projection = Projection("none", 4, 6)
    assert projection(torch.empty(0, 4), []).shape == (0, 6) and not list(projection.parameters())
    with pytest.raises(ValueError, match="trained on questions without vectors"):
        projection(torch.ones(1, 4), [(0,)])
