import dataclasses

import numpy as np
import pytest
import torch

from ray_explain.explainer.batches import answer_tokens, collate, training_steps
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.optimise import with_lora
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.training import NotFinite, PlainTraining, train_plain

CONFIG = PlainTraining(epochs=2, batch_size=8, learning_rate=1e-2, schedule="linear", warmup=0.2)


@pytest.fixture
def data(new_example):
    rng = np.random.default_rng(2)
    return [
        new_example(rng, int(rng.integers(0, 3)), int(rng.integers(2, 9)), int(rng.integers(2, 6))) for _ in range(24)
    ]


def linear() -> Projection:
    return Projection("linear", 32, 32, [0, 1, 2])


@pytest.mark.parametrize("micro_batches", [2, 8, 11])  # of 8 examples
def test_accumulation_changes_no_loss(new_explainer, data, micro_batches):
    whole = train_plain(new_explainer(projection=linear()), data, CONFIG, pad_id=0)
    parts = dataclasses.replace(CONFIG, micro_batches=micro_batches)
    assert len(whole) == 6
    assert train_plain(new_explainer(projection=linear()), data, parts, pad_id=0) == pytest.approx(whole, abs=2e-4)


def test_training_is_adamw_with_clipping_on_the_mean_over_answer_tokens(new_explainer, data):
    """Written out again, one example at a time."""
    explainer, other = new_explainer("llama"), new_explainer("llama")
    config = PlainTraining(epochs=2, batch_size=8, learning_rate=3e-3, weight_decay=0.5, clip=2.0)
    reports = []
    train_plain(explainer, data, config, pad_id=0, on_step=reports.append)
    decayed = [p for name, p in other.named_parameters() if p.ndim > 1 and ".layers." in name]
    others = [p for name, p in other.named_parameters() if p.ndim == 1 or ".layers." not in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], 3e-3, weight_decay=0.5
    )
    lengths = [len(example.input_ids) for example in data]
    steps = training_steps(lengths, ["patching"] * 24, epochs=2, batch_size=8, micro_batches=1, seed=0)
    for report, (step,) in zip(reports, steps, strict=True):
        n_tokens = answer_tokens([data[i] for i in step])
        loss = sum(other(collate([data[i]], 0), n_answer_tokens=n_tokens).loss for i in step)
        loss.backward()
        norm = torch.stack([parameter.grad.norm() for parameter in other.parameters()]).norm().item()
        for parameter in other.parameters():
            parameter.grad *= min(1.0, 2.0 / norm)
        optimizer.step()
        optimizer.zero_grad()
        assert report.loss == pytest.approx(loss.item(), abs=2e-3)
        assert report.gradient_norm == pytest.approx(norm, rel=1e-2)
        assert report.n_answer_tokens == n_tokens
    assert max(report.gradient_norm for report in reports) > 3 * min(report.gradient_norm for report in reports) / 2


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("injection", [InjectionConfig(), InjectionConfig(mode="add", layer=0)], ids=["replace", "add"])
def test_an_explainer_learns_what_only_the_vector_tells(new_model, new_example, markers, lora, injection):
    """One prompt, one answer token for each of six directions."""
    rng = np.random.default_rng(1)
    one, directions = new_example(rng, 1, 3, 2), rng.standard_normal((6, 32)).astype(np.float32)
    examples = [
        one._replace(vectors=direction[None], input_ids=[*one.input_ids[: one.n_prompt], 10 + i, 2])
        for i, direction in enumerate(directions)
    ]
    model = new_model("llama")
    if lora:
        model = with_lora(model, rank=8, alpha=16, dropout=0.0)
    explainer = Explainer(model, markers, Projection("identity", 32, 32), injection, train_markers=lora)
    config = PlainTraining(epochs=60, batch_size=6, learning_rate=1e-2 if lora else 3e-3)
    reports = []
    losses = train_plain(explainer, examples, config, pad_id=0, on_step=reports.append)
    assert losses[0] > 2 and losses[-1] < 0.3
    assert reports[-1].accuracy == 1.0
    assert not explainer.training


def test_with_adapters_the_model_itself_stays_as_it_was_and_the_markers_move(new_model, markers, data):
    model = with_lora(new_model("llama"), rank=4, alpha=8, dropout=0.0)
    explainer = Explainer(model, markers, linear(), train_markers=True)
    before = {name: parameter.detach().clone() for name, parameter in explainer.named_parameters()}
    train_plain(explainer, data, CONFIG, pad_id=0)
    moved = {name for name, p in explainer.named_parameters() if not torch.equal(p, before[name])}
    assert {"marker_embeddings", "projection.weight"} < moved
    assert {name for name in before if "lora_" in name} < moved
    assert not [name for name in moved if "base_layer" in name or "embed_tokens" in name or "lm_head" in name]


def test_the_rate_follows_its_schedule_and_steps_count_from_one(new_explainer, data):
    reports = []
    train_plain(new_explainer(), data, CONFIG, pad_id=0, on_step=reports.append)
    assert [(report.step, report.n_steps) for report in reports] == [(i, 6) for i in range(1, 7)]
    assert [report.learning_rate for report in reports] == pytest.approx([0.005, 0.01, 0.008, 0.006, 0.004, 0.002])


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched_and_names_the_questions(new_explainer, data):
    explainer = new_explainer()
    bad = data[3]._replace(vectors=np.full((2, 32), np.nan, np.float32), question_id="bad one")
    bad = bad._replace(input_ids=[1, 40, 41, 42, 40, 41, 42, 5, 2], n_prompt=7)
    before = [parameter.detach().clone() for parameter in explainer.parameters()]
    with pytest.raises(NotFinite, match="bad one"):
        train_plain(explainer, [*data[:2], bad], PlainTraining(epochs=1, batch_size=3, learning_rate=1.0), pad_id=0)
    assert all(torch.equal(a, b) for a, b in zip(before, explainer.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched_though_its_loss_is_finite(
    new_explainer, data
):
    explainer, losses, before = new_explainer(), [], []
    matrix = explainer.language_model.model.layers[1].mlp.up_proj.weight
    matrix.register_hook(lambda gradient: gradient * (float("inf") if len(losses) == 2 else 1.0))

    def after(report):
        losses.append(report.loss)
        before[:] = [parameter.detach().clone() for parameter in explainer.parameters()]

    ids = [f"question {i}" for i in range(24)]
    named = [example._replace(question_id=name) for example, name in zip(data, ids)]
    with pytest.raises(NotFinite, match="the gradient's norm is") as told:
        train_plain(explainer, named, CONFIG, pad_id=0, on_step=after)
    lengths = [len(example.input_ids) for example in data]
    [third] = training_steps(lengths, ["patching"] * 24, epochs=2, batch_size=8, micro_batches=1, seed=0)[2]
    assert len(losses) == 2 and f"on questions {', '.join(ids[i] for i in third)}: lower" in str(told.value)
    assert all(torch.equal(a, b) for a, b in zip(before, explainer.parameters(), strict=True))


def test_weights_reach_the_steps(new_explainer, data):
    tasks = ["patching"] * 16 + ["text"] * 8
    data = [example._replace(task=task) for example, task in zip(data, tasks, strict=True)]
    config = dataclasses.replace(CONFIG, weights={"text": 2.0})
    n_steps = len(
        training_steps([1] * 24, tasks, epochs=2, batch_size=8, micro_batches=1, seed=0, weights={"text": 2.0})
    )
    assert len(train_plain(new_explainer(), data, config, pad_id=0)) == n_steps == 8
