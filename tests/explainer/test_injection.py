"""Vectors in a prompt: what the model computes must be what it computes from embeddings written by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ray_explain.explainer.batches import ExplainerBatch, collate
from ray_explain.explainer.examples import Example
from ray_explain.explainer.injection import InjectionConfig, injecting, mean_embedding_norm, rescaled
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.interventions.hooks import Patch, capturing, writing
from ray_explain.interventions.layout import layout_of

ADD = InjectionConfig(mode="add", layer=1)


def by_hand(explainer: Explainer, examples: list[Example], vectors: Tensor) -> Tensor:
    """Mean NLL of the answer tokens, each example alone, its embeddings written row by row, logits everywhere."""
    layout = layout_of(explainer.model)
    multiplier = getattr(explainer.language_model.config, "embedding_multiplier", 1.0)
    losses, used = [], 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        rows = list(layout.embedding(ids)[0])
        for at, token in enumerate(example.input_ids):
            if token in explainer.markers.ids and explainer.marker_embeddings is not None:
                rows[at] = explainer.marker_embeddings[explainer.markers.ids.index(token)]
            if token == explainer.markers.slot_id:
                rows[at] = vectors[used] / multiplier
                used += 1
        logits = explainer.model(inputs_embeds=torch.stack(rows)[None]).logits[0].float()
        for at in range(example.n_prompt, len(example.input_ids)):
            losses.append(-logits[at - 1].log_softmax(-1)[example.input_ids[at]])
    return torch.stack(losses).mean()


def gradients(explainer: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in explainer.named_parameters() if p.grad is not None}
    explainer.zero_grad()
    return found


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: name + m)
    assert any(gradient.abs().max() > 1e-3 for gradient in one.values())


def linear(explainer_width: int = 32, target_width: int = 32) -> Projection:
    projection = Projection("linear", target_width, explainer_width, [0, 1, 2])
    with torch.no_grad():
        projection.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return projection


def test_loss_and_gradients_equal_those_of_embeddings_written_by_hand(family, new_explainer, examples):
    explainer = new_explainer(family, projection=linear())
    batch = collate(examples, 0)
    outcome = explainer(batch)
    outcome.loss.backward()
    own = gradients(explainer)
    expected = by_hand(explainer, examples, batch.vectors @ explainer.projection.weight[1].T)
    expected.backward()
    assert outcome.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert_same(own, gradients(explainer))
    assert own["projection.weight"][1].abs().max() > 1e-4


@pytest.mark.parametrize("injection", [InjectionConfig(), ADD], ids=["replace", "add"])
def test_gradient_checkpointing_changes_nothing(family, new_explainer, examples, injection):
    explainer = new_explainer(family, projection=linear(), injection=injection)
    explainer.train()  # checkpoints are for training only; these models have no dropout but GPT-2's
    for module in explainer.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    outcome = explainer(collate(examples, 0))
    outcome.loss.backward()
    plain = gradients(explainer)
    explainer.checkpoint_gradients()
    recomputed = explainer(collate(examples, 0))
    recomputed.loss.backward()
    assert recomputed.loss.item() == pytest.approx(outcome.loss.item(), abs=1e-6)
    assert_same(plain, gradients(explainer))


def test_adapters_and_marker_embeddings_equal_those_written_by_hand(family, new_model, markers, examples):
    model = with_lora(new_model(family), rank=4, alpha=8, dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    explainer = Explainer(model, markers, linear(), train_markers=True)
    with torch.no_grad():
        explainer.marker_embeddings.normal_()
    batch = collate(examples, 0)
    outcome = explainer(batch)
    outcome.loss.backward()
    own = gradients(explainer)
    by_hand(explainer, examples, batch.vectors @ explainer.projection.weight[1].T).backward()
    expected = gradients(explainer)
    assert_same(own, expected)
    assert not [name for name in own if "lora" not in name and name.startswith("model")]
    begin, slot, end = own["marker_embeddings"]
    assert begin.abs().max() > 1e-5 and end.abs().max() > 1e-5 and slot.abs().max() == 0  # the slot is the vector


def test_the_vector_enters_the_residual_stream_at_its_own_norm(family, new_explainer, examples):
    if family == "gpt2":
        pytest.skip("adds learned positions to what is embedded")
    explainer = new_explainer(family)
    batch = collate(examples, 0)
    with explainer.reading(batch):
        out = explainer.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    torch.testing.assert_close(out.hidden_states[0][batch.input_ids == 41], batch.vectors)


def test_add_is_a_patch_that_adds_the_direction_with_the_norm_of_the_stream(family, new_explainer, new_example):
    rng = np.random.default_rng(3)
    examples = [new_example(rng, 1, n, 3) for n in (4, 7)]
    explainer, batch = new_explainer(family, injection=ADD), collate(examples, 0)
    positions = (batch.input_ids == 41).nonzero()[:, 1]
    inputs = dict(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids, use_cache=False
    )
    real = batch.attention_mask.bool()
    with torch.no_grad(), capturing(explainer.model, [1]) as found:
        plain = explainer.model(**inputs).logits[real]
    norms = found[1][torch.arange(2), positions].norm(dim=-1, keepdim=True)
    patch = Patch(layer=1, positions=positions, values=norms * normalize(batch.vectors, dim=-1), kind="add")
    with writing(explainer.model, patch):
        expected = explainer.model(**inputs).logits[real]
    expected.square().mean().backward()
    expected_gradients = gradients(explainer)
    with explainer.reading(batch):
        logits = explainer.model(**inputs).logits[real]
    logits.square().mean().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_same(gradients(explainer), expected_gradients)  # the norm is a number, no path for gradients
    assert (logits - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("scale", "norm"), [("unit", 1.0), ("mean_embedding", 7.5)])
def test_scaled_vectors_have_the_norm_asked_for_and_zero_stays_zero(scale, norm):
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -1e-3]])
    scaled = rescaled(vectors, scale, 7.5)
    torch.testing.assert_close(scaled, norm * torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))
    assert rescaled(vectors, "raw", None) is vectors


@pytest.mark.parametrize(("name", "factor"), [("llama", 1), ("gemma2", 32**0.5), ("gemma3", 32**0.5), ("granite", 12)])
def test_the_mean_embedding_norm_is_what_the_first_block_sees(name, factor, new_model):
    model = new_model(name)
    table = model.get_input_embeddings().weight
    assert mean_embedding_norm(model) == pytest.approx(factor * table.norm(dim=-1).mean().item(), rel=1e-5)


def test_scaled_injection_uses_the_norm_of_the_model(new_explainer, examples):
    explainer = new_explainer("gemma2", injection=InjectionConfig(scale="mean_embedding"))
    batch = collate(examples, 0)
    with explainer.reading(batch):
        out = explainer.model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    norms = out.hidden_states[0][batch.input_ids == 41].norm(dim=-1)
    torch.testing.assert_close(norms, torch.full_like(norms, mean_embedding_norm(explainer.model)))


def drop_a_vector(batch: ExplainerBatch) -> Tensor:
    return batch.vectors[1:]


def add_a_vector(batch: ExplainerBatch) -> Tensor:
    return torch.cat([batch.vectors, batch.vectors[:1]])


def widen(batch: ExplainerBatch) -> Tensor:
    return batch.vectors.repeat(1, 2)


@pytest.mark.parametrize("injection", [InjectionConfig(), ADD], ids=["replace", "add"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(drop_a_vector, "4 slot tokens"), (add_a_vector, "5 vectors"), (widen, "width 64")],
)
def test_what_does_not_fit_is_refused_and_no_hook_is_left(
    new_explainer, examples, change: Callable[[ExplainerBatch], Tensor], message, injection
):
    explainer, batch = new_explainer(injection=injection), collate(examples, 0)
    with (
        pytest.raises(ValueError, match=message),
        injecting(explainer.model, 41, change(batch), injection),
    ):
        explainer.model(batch.input_ids)
    assert not [m for m in explainer.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_every_pass_longer_than_a_token_has_to_hold_the_slots(new_explainer, examples):
    explainer, batch = new_explainer(), collate(examples, 0)
    with injecting(explainer.model, 41, batch.vectors):
        explainer.model(batch.input_ids)
        explainer.model(batch.input_ids[:, -1:])  # a step of generation
        with pytest.raises(ValueError, match="0 slot tokens"):
            explainer.model(torch.full((1, 5), 7))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(mode="swap"), "the mode is one of"),
        (dict(scale="big"), "the scale one of"),
        (dict(mode="add"), "`add` needs one"),
        (dict(layer=1), "`replace` has none"),
        (dict(mode="add", layer=1, scale="unit"), "leave the scale out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InjectionConfig(**settings)


def test_a_layer_that_the_explainer_lacks_is_refused(new_explainer):
    with pytest.raises(ValueError, match="layer 3"):
        new_explainer(injection=InjectionConfig(mode="add", layer=3))
