import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from ray_explain.explainer.markers import markers_of
from ray_explain.explainer.vocabulary import make_room
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

RESERVED = {
    "llama_base": [f"<|reserved_special_token_{i}|>" for i in (10, 12, 11)],  # the slot is 12, the end 11
    "qwen_chat": ["<|vision_start|>", "<|vision_pad|>", "<|vision_end|>"],
    "gemma_chat": ["<unused10>", "<unused12>", "<unused11>"],
}


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_tokens_of_a_vocabulary_are_used_again(name, new_tokenizer):
    tokenizer = new_tokenizer(name)
    size = len(tokenizer)
    markers = markers_of(tokenizer)
    assert list(markers.texts) == RESERVED[name]
    assert tokenizer.convert_tokens_to_ids(RESERVED[name]) == list(markers.ids)
    assert (markers.added, len(tokenizer)) == (False, size)


def test_a_world_reserves_its_own():
    tokenizer = world_tokenizer(World())
    markers = markers_of(tokenizer)
    assert markers.texts == ("<|begin_vector|>", "<|vector|>", "<|end_vector|>")
    assert not markers.added
    assert tokenizer.encode(f"what does {markers.text} encode ?")[3:6] == list(markers.ids)


def test_a_vocabulary_without_any_gets_three_new_tokens_once(new_tokenizer):
    tokenizer = new_tokenizer("gpt2_base")
    size = len(tokenizer)
    markers = markers_of(tokenizer)
    assert markers.added and markers.ids == (size, size + 1, size + 2)
    assert markers_of(tokenizer).ids == markers.ids
    assert len(tokenizer) == size + 3


def test_markers_that_are_plain_words_of_a_vocabulary_are_not_cut():
    words = ["<unk>", "a", "<", "|", "vector", ">", "<|begin_vector|>", "<|vector|>", "<|end_vector|>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert 7 not in tokenizer.encode("<|vector|>")
    assert markers_of(tokenizer).ids == (6, 7, 8)
    assert tokenizer.encode("a <|vector|> a") == [1, 7, 1]


class Cutting(PreTrainedTokenizerFast):
    """Reads no token of its own but single characters."""

    def encode(self, text: str, **options: object) -> list[int]:
        return [ord(letter) for letter in text]


def test_a_tokenizer_that_cuts_markers_is_refused(new_tokenizer):
    tokenizer = Cutting(tokenizer_object=new_tokenizer("qwen_chat").backend_tokenizer)
    with pytest.raises(ValueError, match="would be cut"):
        markers_of(tokenizer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])  # untied, tied, tied
def test_new_tokens_get_the_mean_row_and_old_ones_keep_theirs(family, new_model, new_tokenizer):
    model, tokenizer = new_model(family), new_tokenizer("gpt2_base")
    tokenizer.add_tokens([f"w{i}" for i in range(50 - len(tokenizer))])
    old = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    assert markers_of(tokenizer).ids == (50, 51, 52)
    make_room(model, tokenizer)
    for before, table in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        torch.testing.assert_close(table.weight[:50], before)
        torch.testing.assert_close(table.weight[50:], before.mean(0).expand(3, -1))


def test_a_vocabulary_with_spare_rows_is_left_alone(new_model, new_tokenizer):
    model, tokenizer = new_model("llama"), new_tokenizer("gpt2_base")
    weight = model.get_input_embeddings().weight
    markers_of(tokenizer)
    make_room(model, tokenizer)
    assert model.get_input_embeddings().weight is weight
