from itertools import islice

import pytest
from transformers import AutoTokenizer

from ray_explain.world.corpus import documents
from ray_explain.world.tokenizer import SPECIAL_TOKENS, world_tokenizer
from ray_explain.world.wordings import BEGIN_VECTOR, END_VECTOR, VECTOR


def test_every_word_is_one_token_and_decoding_gives_the_text_back(world, tokenizer):
    for document in islice(documents(world, "any", 1), 500):
        ids = tokenizer(document.text).input_ids
        assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
        assert [tokenizer.decode([i]) for i in ids[1:]] == [word.text for word in document.words]
        assert tokenizer.decode(ids, skip_special_tokens=True) == document.text


def test_brackets_are_one_token_wherever_they_stand(tokenizer):
    ids = tokenizer("Would change to <<<tea>>>.", add_special_tokens=False).input_ids
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["would", "change", "to", "<<<", "tea", ">>>", "."]


@pytest.mark.parametrize(
    "text",
    [
        "The most likely output would change to <<<tea>>>. The output would remain unchanged from <<<63>>>.",
        "at layers 0 replace token 17 <<<tea>>> by <|vector|> in : the pet of . output ?",
        "question : the pet ? hint : tea . answer : if the hint were removed how would the answer change ?",
        "what does <|vector|> at layer 3 encode ? any name of a city",
        "At layer 3, <|vector|> encodes what? What happens to the model's output?",
        "If we steer towards feature <|vector|> at layer 1, 2 and tokens <tea> when processing <<<the>>>, "
        "how would the model's response differ?",
    ],
)
def test_questions_and_answers_of_all_tasks_are_in_the_vocabulary(tokenizer, text):
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_vector_markers_are_single_reserved_tokens(world, tokenizer):
    ids = tokenizer(f"by {BEGIN_VECTOR}{VECTOR}{END_VECTOR}in", add_special_tokens=False).input_ids
    markers = tokenizer.convert_tokens_to_ids([BEGIN_VECTOR, VECTOR, END_VECTOR])
    assert ids[1:4] == markers and len(ids) == 5
    written = {i for document in islice(documents(world, "any", 1), 500) for i in tokenizer(document.text).input_ids}
    assert not written & set(markers)


def test_a_word_it_does_not_know_is_unknown_unless_it_was_an_extra_text(world, tokenizer):
    assert tokenizer.unk_token_id in tokenizer("xylophone").input_ids
    larger = world_tokenizer(world, ["a xylophone"])
    assert larger.unk_token_id not in larger("xylophone").input_ids
    assert larger("the pet").input_ids == tokenizer("the pet").input_ids


def test_a_saved_tokenizer_loads_as_any_other(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = f"The pet of {VECTOR} <<<tea>>>?"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    assert (loaded.padding_side, loaded.eos_token, loaded.pad_token) == ("left", *SPECIAL_TOKENS[2::-2])
    assert loaded(["tea", "the pet"], padding=True).input_ids[0][0] == loaded.pad_token_id
