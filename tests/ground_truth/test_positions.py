from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth import positions
from ray_explain.ground_truth.positions import (
    PromptTokens,
    Unusable,
    matched,
    prompt_tokens,
    span_positions,
    special_prefix,
    token_roles,
)
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

TEXT = "Emilio Lussu speaks Italian"


@pytest.mark.parametrize("word", ["Emilio", "Emilio Lussu", "Lussu", "speaks", "Italian", "mil", "us"])
def test_the_tokens_of_a_span_hold_it_and_no_token_more(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    tokens = prompt_tokens(tokenizer, TEXT)
    start = TEXT.index(word)
    found = span_positions(tokens, TEXT, (start, start + len(word)))
    assert word in tokenizer.decode([tokens.ids[at] for at in found])
    assert word not in tokenizer.decode([tokens.ids[at] for at in found[1:]])
    assert word not in tokenizer.decode([tokens.ids[at] for at in found[:-1]])


def test_spaces_around_a_span_do_not_count(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = prompt_tokens(tokenizer, TEXT)
    assert span_positions(tokens, TEXT, (6, 13)) == span_positions(tokens, TEXT, (7, 12))


def test_all_byte_tokens_of_a_character_belong_to_its_span(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a漢b"
    tokens = prompt_tokens(tokenizer, text)
    assert len(span_positions(tokens, text, (1, 2))) == 3


@pytest.mark.parametrize("span", [(-1, 3), (3, 3), (5, 2), (0, 100), (100, 101)])
def test_a_span_outside_the_text_is_unusable(tokenizer: PreTrainedTokenizerFast, span: tuple[int, int]) -> None:
    with pytest.raises(Unusable, match=positions.OUTSIDE):
        span_positions(prompt_tokens(tokenizer, TEXT), TEXT, span)


def test_a_span_of_a_space_has_no_token(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Unusable, match=positions.NO_TOKEN):
        span_positions(prompt_tokens(tokenizer, TEXT), TEXT, (6, 7))


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_unusable(tokenizer: PreTrainedTokenizerFast, prompt: str) -> None:
    with pytest.raises(Unusable, match=positions.EMPTY_PROMPT):
        prompt_tokens(tokenizer, prompt)


def test_an_unknown_word_is_unusable() -> None:
    tokenizer = world_tokenizer(World())
    assert len(prompt_tokens(tokenizer, "the word bread").ids) == 4
    with pytest.raises(Unusable, match=positions.UNKNOWN_TOKEN):
        prompt_tokens(tokenizer, "the word supercalifragilistic")


def test_a_chat_that_begins_with_the_end_token_is_read_where_that_is_called_unknown_too(
    plain_tokenizer: PreTrainedTokenizerFast,
) -> None:
    core, end = plain_tokenizer.backend_tokenizer, "<|end|>"
    olmo = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end)
    assert prompt_tokens(olmo, f"{end}[user]Rome") == prompt_tokens(plain_tokenizer, f"{end}[user]Rome")


def test_a_rendered_chat_begins_only_once(tokenizer: PreTrainedTokenizerFast) -> None:
    once = prompt_tokens(tokenizer, "[user]Rome")
    rendered = prompt_tokens(tokenizer, f"{tokenizer.bos_token}[user]Rome")
    assert once.ids == rendered.ids
    assert not once.is_text(0) and once.is_text(1)


def around(tokenizer: PreTrainedTokenizerFast, before: Sequence[str], after: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with these special tokens around every text, and no begin-of-text token."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.add_special_tokens([*before, *after])
    special = [(token, core.token_to_id(token)) for token in (*before, *after)]
    core.post_processor = TemplateProcessing(single=" ".join([*before, "$A", *after]), special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_a_rendered_chat_begins_only_once_where_no_begin_token_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    glm = around(tokenizer, ["[gMASK]", "<sop>"], [])
    once = prompt_tokens(glm, "[user]Rome").ids
    assert glm.convert_ids_to_tokens(list(once[:3])) == ["[gMASK]", "<sop>", "["]
    assert prompt_tokens(glm, "[gMASK]<sop>[user]Rome").ids == once


def test_no_special_token_stands_behind_a_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, ending = around(tokenizer, ["<|begin|>"], []), around(tokenizer, ["<|begin|>"], ["<|end|>"])
    for text in (TEXT, "Rome<|end|>"):  # what the prompt itself says stays
        assert prompt_tokens(ending, text) == prompt_tokens(plain, text)


def test_the_special_prefix_is_what_the_tokenizer_puts_before_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert special_prefix(tokenizer) == (tokenizer.bos_token_id,)
    assert special_prefix(around(tokenizer, [], ["<|end|>"])) == ()


def roles_of(tokenizer: PreTrainedTokenizerFast, text: str, subject: str, **more: object) -> dict[str, str]:
    """Role -> the text of its tokens."""
    tokens, start = prompt_tokens(tokenizer, text), text.index(subject)
    roles = token_roles(tokens, text, (start, start + len(subject)), **more)  # type: ignore[arg-type]
    assert roles[0] is None  # the begin-of-text token
    by_role: dict[str, list[int]] = {}
    for role, token in zip(roles[1:], tokens.ids[1:]):
        by_role.setdefault(str(role), []).append(token)
    return {role: tokenizer.decode(ids) for role, ids in by_role.items()}


def test_each_token_of_a_statement_has_its_role(tokenizer: PreTrainedTokenizerFast) -> None:
    found = roles_of(tokenizer, "The capital of Italy is", "Italy")
    assert found == {"other": "The capital of", "subject_last": " Italy", "final": " is"}
    found = roles_of(tokenizer, "Emilio Lussu lies in Rome", "Emilio Lussu")
    assert "Emilio".startswith(found["subject_first"]) and "Lussu".endswith(found["subject_last"].strip())
    assert (found["relation"], found["final"]) == (" lies in", " Rome")


def test_what_follows_the_statement_is_other_but_for_what_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Rome lies in\n\nRespond with one of Italy or France"
    end, at = text.index("\n"), text.index("Italy")
    found = roles_of(tokenizer, text, "Rome", statement_end=end, named=[("option_base", (at, at + 5))])
    assert found["relation"] == " lies in"
    assert found["option_base"] == " Italy"
    assert found["other"].strip().startswith("Respond with one of")
    assert "France".endswith(found["final"].strip())


def test_positions_match_from_the_end_where_subjects_differ_in_length(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, spans = ("Emilio Lussu lies in", "Rome lies in"), ((0, 12), (0, 4))
    tokens = [prompt_tokens(tokenizer, text) for text in texts]
    roles = [token_roles(own, text, span) for own, text, span in zip(tokens, texts, spans)]
    pairs = matched(tokens[0], roles[0], tokens[1], roles[1])
    lengths = len(tokens[0].ids), len(tokens[1].ids)
    assert pairs["final"] == [(lengths[0] - 1, lengths[1] - 1)]
    assert pairs["relation"] == [(lengths[0] - 2, lengths[1] - 2)]
    assert pairs["subject_last"] == [(lengths[0] - 3, lengths[1] - 3)]
    assert "subject_first" not in pairs  # Rome is one token


def test_positions_where_both_runs_are_still_the_same_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, spans = ("The capital of Italy is", "The capital of France is"), ((15, 20), (15, 21))
    tokens = [prompt_tokens(tokenizer, text) for text in texts]
    roles = [token_roles(own, text, span) for own, text, span in zip(tokens, texts, spans)]
    assert "other" in roles[0]
    assert "other" not in matched(tokens[0], roles[0], tokens[1], roles[1])


def test_roles_with_more_tokens_in_one_prompt_are_matched_from_their_last() -> None:
    base = PromptTokens((1, 2, 3, 4, 5), ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)))
    source = PromptTokens((6, 7, 8), ((0, 1), (1, 2), (2, 3)))
    roles = ["other", "other", "relation", "relation", "final"], ["other", "relation", "final"]
    assert matched(base, roles[0], source, roles[1]) == {"other": [(1, 0)], "relation": [(3, 1)], "final": [(4, 2)]}
    assert matched(source, roles[1], base, roles[0])["relation"] == [(1, 3)]


def test_half_a_character_is_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Unusable, match="half a character"):
        prompt_tokens(tokenizer, "Rome \ud800 lies in")
