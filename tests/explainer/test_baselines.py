import numpy as np
import pytest
import torch

from ray_explain.explainer.baselines import selfie, untrained
from ray_explain.explainer.injection import InjectionConfig


def test_an_untrained_explainer_is_the_model_with_vectors(new_model, new_tokenizer):
    tokenizer = new_tokenizer("llama_base")
    explainer = untrained(new_model("llama"), tokenizer, d_target=32)
    assert explainer.projection.kind == "identity" and not explainer.training
    assert explainer.markers.begin == "<|reserved_special_token_10|>"
    assert untrained(new_model("llama"), tokenizer, d_target=20, layers=[0, 1]).projection.layers == (0, 1)


def test_an_untrained_explainer_gets_rows_for_new_markers(new_model, new_tokenizer):
    tokenizer, model = new_tokenizer("gpt2_base"), new_model("llama")
    tokenizer.add_tokens([f"w{i}" for i in range(50 - len(tokenizer))])
    assert untrained(model, tokenizer, d_target=32).markers.ids == (50, 51, 52)
    assert model.get_input_embeddings().weight.shape[0] == 53


TEMPLATE = "what does X encode ? X encode the"


def test_selfie_puts_the_unit_vector_times_each_scale_at_every_x(new_model, new_tokenizer):
    tokenizer, model = new_tokenizer("llama_base"), new_model("llama")
    explainer = untrained(model, tokenizer, d_target=32)
    vectors = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    scales = (1.0, 7.0)
    found = selfie(explainer, tokenizer, vectors, [(0,)] * 3, batch_size=4, template=TEMPLATE, scales=scales)
    assert [len(row) for row in found] == [2, 2, 2]
    slot = "<|reserved_special_token_12|>"
    ids = torch.tensor([tokenizer.encode(TEMPLATE.replace("X", slot))])
    for i, j in [(0, 0), (2, 1)]:
        embeddings = model.get_input_embeddings()(ids).detach()
        at = (ids[0] == explainer.markers.slot_id).nonzero().flatten()
        assert len(at) == 2
        embeddings[0, at] = scales[j] * torch.nn.functional.normalize(torch.from_numpy(vectors[i]), dim=0)
        best = model(inputs_embeds=embeddings).logits[0, -1].argmax().item()
        expected = (
            "" if best in tokenizer.all_special_ids and best != tokenizer.unk_token_id else tokenizer.decode([best])
        )
        assert found[i][j].text.startswith(expected.strip())
        assert found[i][j].n_tokens <= 25


def test_selfie_asks_a_chat_model_in_a_chat_and_begins_its_answer(new_model, new_tokenizer, monkeypatch):
    tokenizer = new_tokenizer("llama_chat")
    explainer = untrained(new_model("llama"), tokenizer, d_target=32)
    asked = []
    monkeypatch.setattr(
        "ray_explain.explainer.baselines.generate", lambda e, prompts, *a, **k: asked.extend(prompts) or []
    )
    selfie(explainer, tokenizer, np.ones((1, 32), np.float32), [(0,)], batch_size=1, scales=(1.0,))
    text = tokenizer.decode(asked[0].input_ids)
    user, answer = text.split("assistant")
    slot = "<|reserved_special_token_12|>"
    assert "user" in user and slot in user and answer.count(slot) == 1
    assert "<|eot_id|>" not in answer and len(asked[0].vectors) == 2


def test_selfie_refuses_what_would_make_it_something_else(new_model, new_tokenizer):
    tokenizer, vectors = new_tokenizer("llama_base"), np.ones((1, 32), np.float32)
    scaled = untrained(new_model("llama"), tokenizer, d_target=32, injection=InjectionConfig(scale="unit"))
    with pytest.raises(ValueError, match="sets the scale itself"):
        selfie(scaled, tokenizer, vectors, [(0,)], batch_size=1, template=TEMPLATE)
    plain = untrained(new_model("llama"), tokenizer, d_target=32)
    with pytest.raises(ValueError, match="no X"):
        selfie(plain, tokenizer, vectors, [(0,)], batch_size=1, template="what")
