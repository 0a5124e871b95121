"""The loss: of answer tokens only, whatever the padding, the batches or the order."""

import numpy as np
import pytest
import torch

from ray_explain.explainer.batches import answer_tokens, collate
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.projection import Projection


def many(new_example, n: int = 8):
    rng = np.random.default_rng(5)
    return [
        new_example(rng, int(rng.integers(0, 3)), int(rng.integers(2, 9)), int(rng.integers(1, 6))) for _ in range(n)
    ]


def gradient_vector(explainer) -> torch.Tensor:
    vector = torch.cat([parameter.grad.flatten() for parameter in explainer.parameters()])
    explainer.zero_grad()
    return vector


def test_answer_logits_are_those_of_a_full_pass_at_the_positions_before_the_answer(family, new_explainer, examples):
    explainer, batch = new_explainer(family), collate(examples, 0)
    with torch.no_grad(), explainer.reading(batch):
        full = explainer.model(
            batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    expected = [full[row, at - 1] for row, at in batch.answer.nonzero().tolist()]
    with torch.no_grad():
        logits = explainer.answer_logits(batch)
    assert logits.shape[0] == sum(example.n_answer for example in examples)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_the_loss_does_not_depend_on_padding(family, new_explainer, examples, new_example):
    explainer = new_explainer(family)
    alone = [explainer(collate([example], 0)) for example in examples]
    together = explainer(collate(examples, 0))
    n_tokens = sum(outcome.n_tokens for outcome in alone)
    assert together.nll.item() == pytest.approx(sum(outcome.nll.item() for outcome in alone), rel=1e-5)
    assert together.loss.item() == pytest.approx((together.nll / n_tokens).item(), rel=1e-5)
    assert together.n_right == sum(outcome.n_right for outcome in alone)
    long = new_example(np.random.default_rng(1), 0, 40, 2)  # pads the others by 30 positions and more
    padded = explainer(collate([*examples, long], 0))
    assert (padded.nll - explainer(collate([long], 0)).nll).item() == pytest.approx(together.nll.item(), rel=1e-4)


@pytest.mark.parametrize("parts", [[8], [1] * 8, [5, 3]], ids=str)
def test_micro_batches_add_up_to_the_gradient_of_one_batch(new_explainer, new_example, parts):
    explainer, examples = new_explainer(), many(new_example)
    explainer(collate(examples, 0)).loss.backward()
    expected, start, loss = gradient_vector(explainer), 0, 0.0
    for size in parts:
        outcome = explainer(collate(examples[start : start + size], 0), n_answer_tokens=answer_tokens(examples))
        outcome.loss.backward()
        start, loss = start + size, loss + outcome.loss.item()
    torch.testing.assert_close(gradient_vector(explainer), expected, rtol=1e-3, atol=1e-5)
    assert loss == pytest.approx(explainer(collate(examples, 0)).loss.item(), rel=1e-5)


def test_the_weight_of_an_example_is_that_of_its_tokens(new_explainer, examples):
    explainer = new_explainer()
    weighted = [example._replace(weight=weight) for example, weight in zip(examples, (1.0, 0.0, 2.0, 0.5), strict=True)]
    nll = [explainer(collate([example], 0)).nll.item() for example in examples]
    expected = (nll[0] + 2 * nll[2] + 0.5 * nll[3]) / (4 + 2 * 6 + 0.5 * 3)
    assert explainer(collate(weighted, 0)).loss.item() == pytest.approx(expected, rel=1e-5)


def test_right_answer_tokens_are_counted(new_explainer, examples):
    explainer = new_explainer()
    one = [example._replace(input_ids=example.input_ids[: example.n_prompt + 1]) for example in examples]
    batch = collate(one, 0)
    best = explainer.answer_logits(batch).argmax(-1)
    for n_right in range(len(one) + 1):
        batch.input_ids[batch.answer] = torch.where(torch.arange(len(one)) < n_right, best, (best + 1) % 50)
        outcome = explainer(batch)
        assert (outcome.n_right, outcome.n_tokens) == (n_right, len(one))


def test_every_weight_takes_part_even_without_vectors(new_explainer, new_example):
    explainer = new_explainer(projection=Projection("linear", 32, 32, [0, 1, 2]))
    explainer(collate([new_example(np.random.default_rng(0), 0, 4, 3)], 0)).loss.backward()
    assert [name for name, parameter in explainer.named_parameters() if parameter.grad is None] == []
    assert not explainer.projection.weight.grad.any()


def test_a_batch_moves_whole(examples):
    batch = collate(examples, 0).to("meta")
    assert {part.device.type for part in vars(batch).values() if isinstance(part, torch.Tensor)} == {"meta"}
    assert batch.layers == collate(examples, 0).layers


def test_a_projection_to_another_width_is_refused(new_model, markers):
    with pytest.raises(ValueError, match="width 16"):
        Explainer(new_model("llama"), markers, Projection("linear", 32, 16, [0]))


def test_the_mean_embedding_norm_is_that_of_the_start_unless_given(new_model, markers):
    injection = InjectionConfig(scale="mean_embedding")
    model, projection = new_model("llama"), Projection("identity", 32, 32)
    measured = Explainer(model, markers, projection, injection).embedding_norm
    assert measured == pytest.approx(model.get_input_embeddings().weight.norm(dim=-1).mean().item(), rel=1e-5)
    assert Explainer(model, markers, projection, injection, embedding_norm=3.0).embedding_norm == 3.0
    assert Explainer(model, markers, projection).embedding_norm is None
