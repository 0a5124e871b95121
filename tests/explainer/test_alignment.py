import itertools

import pytest

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


def test_another_model_is_explained_less_well_and_its_layers_are_taken_by_depth(new_model, base):
    found = align((new_model("llama", 0), base), (new_model("qwen3", 1), base), TEXTS, [1])
    assert 0 < found.explained[1] < 0.99
    assert [counterpart(layer, 32, 36) for layer in (0, 15, 31)] == [0, 17, 35]


def test_places_are_shared_where_tokens_of_both_end(new_tokenizer):
    one, other = new_tokenizer("llama_base"), new_tokenizer("gpt2_base")
    (ids, at), (other_ids, other_at) = shared_places("the model does", one, other)
    words = ["the", "model", "does"]
    assert [one.decode([ids[i]]) for i in at] == words == [other.decode([other_ids[i]]) for i in other_at]
    assert (at, other_at) == ([1, 2, 3], [0, 1, 2]), "a begin token is no place"


def test_too_little_text_is_refused(new_model, base):
    model = new_model("llama")
    with pytest.raises(ValueError, match=r"places of 2 texts to fit maps of vectors 32 wide: too few"):
        align((model, base), (model, base), TEXTS[:2], [0])
