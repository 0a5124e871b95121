import itertools

import pytest
import torch

from ray_explain.explainer.alignment import align, counterpart, shared_places

WORDS = ("a", "what", "paris", "rome")
TEXTS = [f"user {a} the model at layer {b} does encode {c}" for a, b, c in itertools.product("123", WORDS, "123")]


@pytest.fixture
def base(new_tokenizer):
    return new_tokenizer("gpt2_base")


def test_a_model_is_mapped_to_itself_by_the_identity(new_model, base):
    model = new_model("llama")
    found = align((model, base), (model, base), TEXTS, [0, 2])
    assert found.explained == pytest.approx({0: 1.0, 2: 1.0}, abs=1e-2)
    assert found.n_pairs > 32
    assert set(found.maps) == {0, 2} and found.maps[0].shape == (32, 32)


def test_first_tokens_of_a_huge_norm_change_neither_maps_nor_what_they_explain(new_model, base):
    """Without a begin token the first word takes its part: massive activations, here of the word "user"."""
    target, explainer, sink = new_model("llama", 0), new_model("llama", 1), base.encode("user")[0]
    for model in (target, explainer):
        for layer in model.model.layers:  # so that no other token sees it
            layer.self_attn.v_proj.weight.data.zero_()
    ordinary = align((target, base), (explainer, base), TEXTS, [0])
    for model in (target, explainer):
        model.get_input_embeddings().weight.data[sink] *= 1000
    huge = align((target, base), (explainer, base), TEXTS, [0])
    assert huge.explained == pytest.approx(ordinary.explained, abs=1e-4)
    torch.testing.assert_close(huge.maps[0], ordinary.maps[0])


def test_another_model_is_explained_less_well_and_its_layers_are_taken_by_depth(new_model, base):
    found = align((new_model("llama", 0), base), (new_model("qwen3", 1), base), TEXTS, [1])
    assert 0 < found.explained[1] < 0.99
    assert [counterpart(layer, 32, 36) for layer in (0, 15, 31)] == [0, 17, 35]


def test_places_are_shared_where_tokens_of_both_end(new_tokenizer):
    one, other = new_tokenizer("llama_base"), new_tokenizer("gpt2_base")
    (ids, at), (other_ids, other_at) = shared_places("the model does", one, other)
    words = ["model", "does"]
    assert [one.decode([ids[i]]) for i in at] == words == [other.decode([other_ids[i]]) for i in other_at]
    assert (at, other_at) == ([2, 3], [1, 2]), "neither a begin token nor the first token of a text without one"


def test_too_little_text_is_refused(new_model, base):
    model = new_model("llama")
    with pytest.raises(ValueError, match=r"places of 2 texts to fit maps of vectors 32 wide: too few"):
        align((model, base), (model, base), TEXTS[:2], [0])
