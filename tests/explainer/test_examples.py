"""Questions as tokens: prompt and answer, nothing more and nothing less, in every chat format."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ray_explain.errors import BadInput
from ray_explain.explainer.examples import Question, Refused, check_end, encode, encode_prompt, stop_ids
from ray_explain.explainer.markers import markers_of

PROMPT = "what does <vector> encode at layer 1 ?"
ANSWER = "the output would change to <<<paris>>>."
QUESTION = Question("q7", "patching", PROMPT, ANSWER, np.ones((1, 4), np.float32), (1,))


def plain(text: str) -> str:
    return text.replace(" ", "").replace("\n", "")


def test_what_is_masked_is_the_prompt_and_what_is_not_is_the_answer_with_its_end(tokenizer):
    markers = markers_of(tokenizer)
    example = encode(QUESTION, tokenizer, markers, max_tokens=100)
    given, learned = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
    assert plain(tokenizer.decode(learned[:-1])) == plain(ANSWER)
    assert learned[-1] in stop_ids(tokenizer)
    assert example.n_answer == len(learned)
    prompt = tokenizer.decode(given)
    assert plain(PROMPT.replace("<vector>", markers.text)) in plain(prompt)
    assert plain(ANSWER) not in plain(prompt)
    assert given.count(markers.slot_id) == 1


EXPECTED = {
    "llama_base": "<|begin_of_text|>{}\n",
    "gpt2_base": "{}\n",
    "llama_chat": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen_chat": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "gemma_chat": "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
}
ENDS = {
    "llama_base": "<|end_of_text|>",
    "gpt2_base": "<|endoftext|>",
    "llama_chat": "<|eot_id|>",
    "qwen_chat": "<|im_end|>",
    "gemma_chat": "<end_of_turn>",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_prompts_have_the_form_of_their_family_with_one_begin_token(name, new_tokenizer):
    tokenizer = new_tokenizer(name)
    markers = markers_of(tokenizer)
    example = encode(QUESTION, tokenizer, markers, max_tokens=100)
    expected = EXPECTED[name].format(PROMPT.replace("<vector>", markers.text))
    assert tokenizer.decode(example.input_ids[: example.n_prompt]).replace(" ", "") == expected.replace(" ", "")
    assert tokenizer.decode(example.input_ids[-1:]) == ENDS[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_newline_at_the_end_of_a_prompt_is_neither_doubled_nor_part_of_what_a_user_says(name, new_tokenizer):
    tokenizer = new_tokenizer(name)
    markers = markers_of(tokenizer)
    ended = encode(QUESTION._replace(prompt=f"{QUESTION.prompt}\n"), tokenizer, markers, max_tokens=100)
    assert ended.input_ids == encode(QUESTION, tokenizer, markers, max_tokens=100).input_ids


def cut_into_pieces(likeness, splitter, decoder):
    """A byte-pair tokenizer with the special tokens, the begin token and the chat template of another."""
    core = Tokenizer(models.BPE(unk_token=None if isinstance(splitter, pre_tokenizers.ByteLevel) else "<unk>"))
    core.pre_tokenizer, core.decoder = splitter, decoder
    specials = [likeness.unk_token, likeness.pad_token, *likeness.all_special_tokens]
    seen = ["the output would change to", "what does it encode at layer", "user assistant model system think\n\n"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() + list("äöüé日本語🙂")
    core.train_from_iterator(
        seen, trainers.BpeTrainer(special_tokens=list(dict.fromkeys(specials)), initial_alphabet=alphabet)
    )
    begin = likeness.bos_token
    if begin:
        core.post_processor = TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, core.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=begin,
        eos_token=likeness.eos_token,
        additional_special_tokens=likeness.all_special_tokens,
        chat_template=likeness.chat_template,
    )


PIECES = {
    "byte level": lambda: (pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "spaces as pieces": lambda: (  # as Gemma's
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        decoders.Metaspace(prepend_scheme="never"),
    ),
}
TRICKY = [
    "the output would change to <<< Hamas>>>.",
    "paris",
    "Fälle auf 日本語, 🙂  zwei  Leerzeichen\n\nund Zeilen",
    "<<<Answer: B>>>",
]


@pytest.mark.parametrize("answer", TRICKY)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_masked_decodes_to_exactly_the_prompt_and_what_is_not_to_exactly_the_answer(
    name, pieces, answer, new_tokenizer
):
    tokenizer = cut_into_pieces(new_tokenizer(name), *PIECES[pieces]())
    markers = markers_of(tokenizer)
    prompt = f"If <vector> is added to <<<Zürich 日本>>>, what  then?\n{answer}"
    example = encode(QUESTION._replace(prompt=prompt, answer=answer), tokenizer, markers, max_tokens=500)
    given, learned = example.input_ids[: example.n_prompt], example.input_ids[example.n_prompt :]
    assert tokenizer.decode(given) == EXPECTED[name].format(prompt.replace("<vector>", markers.text))
    assert tokenizer.decode(learned[:-1]) == answer
    assert tokenizer.decode(learned[-1:]) == ENDS[name]


def without_end(tokenizer):
    """Nor a chat template that writes anything after the answer."""
    tokenizer.eos_token = None
    if tokenizer.chat_template:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }} : {{ m.content }}{% endfor %}"
    return tokenizer


@pytest.mark.parametrize("name", ["gpt2_base", "qwen_chat"])
def test_a_tokenizer_that_cannot_end_an_answer_is_refused_and_can_still_be_asked(name, new_tokenizer):
    tokenizer = without_end(new_tokenizer(name))
    markers = markers_of(tokenizer)
    for refused in (lambda: check_end(tokenizer), lambda: encode(QUESTION, tokenizer, markers, max_tokens=100)):
        with pytest.raises(BadInput, match="has no end token"):
            refused()
    assert encode_prompt(QUESTION, tokenizer, markers, max_tokens=100).n_answer == 0


def test_an_end_of_turn_or_an_end_token_is_enough(new_tokenizer):
    chat, base = new_tokenizer("qwen_chat"), new_tokenizer("gpt2_base")
    chat.eos_token = None
    for tokenizer in (chat, base):
        check_end(tokenizer)
        made = encode(QUESTION, tokenizer, markers_of(tokenizer), max_tokens=100)
        assert tokenizer.decode(made.input_ids[-1:]) == ENDS["qwen_chat" if tokenizer is chat else "gpt2_base"]


def test_a_question_is_asked_as_it_was_learned(tokenizer):
    markers = markers_of(tokenizer)
    learned = encode(QUESTION, tokenizer, markers, max_tokens=100)
    asked = encode_prompt(QUESTION, tokenizer, markers, max_tokens=100)
    assert asked.input_ids == learned.input_ids[: learned.n_prompt]
    assert (asked.n_answer, asked.layers, asked.question_id) == (0, (1,), "q7")


def test_a_final_space_of_the_prompt_is_no_token_of_its_own(new_tokenizer):
    tokenizer = new_tokenizer("llama_base")
    markers = markers_of(tokenizer)
    example = encode(QUESTION._replace(prompt="at layer 1 , <vector> encodes "), tokenizer, markers, max_tokens=100)
    assert "\n" not in tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(prompt="no mark"), "marks and vectors do not match"),
        (dict(prompt="<vector> <vector>"), "marks and vectors do not match"),
        (dict(vectors=np.ones((2, 4))), "marks and vectors do not match"),
        (dict(vectors=np.empty((0, 4))), "marks and vectors do not match"),
        (dict(answer="paris <vector>"), "marks and vectors do not match"),
        (dict(vectors=np.full((1, 4), np.nan)), "vector not finite"),
        (dict(vectors=np.full((1, 4), np.inf)), "vector not finite"),
        (dict(vectors=np.ones((1, 5))), "vector of the wrong width"),
        (dict(answer=""), "no answer"),
        (dict(answer="  "), "no answer"),
        (dict(prompt=PROMPT + " a" * 200), "over-long"),
        (dict(answer="paris " * 200), "over-long"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_fixed_reason(tokenizer, changes, reason):
    markers = markers_of(tokenizer)
    with pytest.raises(Refused, match="q7") as refused:
        encode(QUESTION._replace(**changes), tokenizer, markers, max_tokens=100, d_model=4)
    assert refused.value.reason == reason


def test_markers_in_a_users_text_are_refused(tokenizer):
    markers = markers_of(tokenizer)
    for marker in markers.texts:
        for changes in (dict(prompt=f"{PROMPT} {marker}"), dict(answer=f"the {marker}")):
            with pytest.raises(Refused) as refused:
                encode(QUESTION._replace(**changes), tokenizer, markers, max_tokens=100)
            assert refused.value.reason == "marker in the text"


def test_an_end_token_inside_an_answer_is_refused(tokenizer):
    markers = markers_of(tokenizer)
    with pytest.raises(Refused) as refused:
        encode(QUESTION._replace(answer=f"the {tokenizer.eos_token} output"), tokenizer, markers, max_tokens=100)
    assert refused.value.reason == "special token in the answer"


def test_a_special_token_that_has_no_name_is_refused_in_an_answer(new_tokenizer):
    tokenizer = new_tokenizer("gpt2_base")
    tokenizer.backend_tokenizer.add_special_tokens(["<|eot_id|>"])  # as base models of Llama 3 have it
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    with pytest.raises(Refused, match="special token in the answer"):
        encode(QUESTION._replace(answer="<<<<|eot_id|>>>>"), tokenizer, markers_of(tokenizer), max_tokens=100)


def test_an_end_token_inside_an_answer_is_refused_where_it_is_called_unknown_too(new_tokenizer):
    tokenizer = new_tokenizer("gpt2_base")
    tokenizer.unk_token = tokenizer.eos_token
    with pytest.raises(Refused, match="special token in the answer"):
        answer = f"the {tokenizer.eos_token} output"
        encode(QUESTION._replace(answer=answer), tokenizer, markers_of(tokenizer), max_tokens=100)


def test_the_longest_example_allowed_is_allowed(tokenizer):
    markers = markers_of(tokenizer)
    length = len(encode(QUESTION, tokenizer, markers, max_tokens=100).input_ids)
    assert encode(QUESTION, tokenizer, markers, max_tokens=length)
    with pytest.raises(Refused, match="over-long"):
        encode(QUESTION, tokenizer, markers, max_tokens=length - 1)


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(new_tokenizer):
    tokenizer = new_tokenizer("llama_base")
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}", special_tokens=tokens
    )
    example = encode(QUESTION, tokenizer, markers_of(tokenizer), max_tokens=100)
    assert [i for i, token in enumerate(example.input_ids) if token == tokenizer.eos_token_id] == [
        len(example.input_ids) - 1
    ]
    learned = encode(text("rome", "paris"), tokenizer, markers_of(tokenizer), max_tokens=100)
    assert tokenizer.decode(learned.input_ids[learned.n_prompt :]) == "paris"


def text(prompt: str, answer: str) -> Question:
    return Question("t", "text", prompt, answer, np.empty((0, 4), np.float32), ())


def test_of_a_text_with_a_prompt_only_the_answer_is_learned(tokenizer):
    example = encode(text("rome would", "change to paris"), tokenizer, markers_of(tokenizer), max_tokens=100)
    assert tokenizer.decode(example.input_ids[example.n_prompt :]) == "change to paris"
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert example.input_ids[: example.n_prompt] == [*begin, *tokenizer.convert_tokens_to_ids(["rome", "would"])]


def test_of_a_text_without_a_prompt_all_but_the_first_token_is_learned(tokenizer):
    example = encode(text("", "rome would change"), tokenizer, markers_of(tokenizer), max_tokens=100)
    assert example.n_prompt == 1
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == "rome would change"


def test_a_text_that_teaches_nothing_is_refused(tokenizer):
    for prompt, answer in [("rome", ""), ("rome", " "), ("", "")]:
        with pytest.raises(Refused, match="no answer"):
            encode(text(prompt, answer), tokenizer, markers_of(tokenizer), max_tokens=100)


def test_a_template_without_the_assistants_turn_is_refused(new_tokenizer):
    tokenizer = new_tokenizer("llama_chat")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="assistant's turn"):
        encode(QUESTION, tokenizer, markers_of(tokenizer), max_tokens=100)
