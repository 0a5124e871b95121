import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain.ground_truth.chats import chat_prompt
from tests.ground_truth.conftest import with_template


def test_the_assistants_turn_is_opened(tokenizer: PreTrainedTokenizerFast) -> None:
    assert chat_prompt(tokenizer, user="Rome?") == "<|begin|>[user]Rome?\n[assistant]"
    rendered = chat_prompt(tokenizer, user="Rome?", system="Be short.", begun="Answer:")
    assert rendered == "<|begin|>[system]Be short.\n[user]Rome?\n[assistant]Answer:"


def test_a_model_that_can_think_answers_at_once(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ messages[0]['content'] }}|{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    assert chat_prompt(with_template(tokenizer, template), user="Rome?") == "Rome?|<think>\n\n</think>\n\n"


def test_a_prompt_is_the_same_on_every_day(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (  # as Llama 3.2's
        "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "Today Date: {{ date_string }}|{{ messages[0]['content'] }}"
    )
    assert chat_prompt(with_template(tokenizer, template), user="Rome?") == "Today Date: 26 Jul 2024|Rome?"


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("'%Y-%m-%d'", "2024-07-26"),  # gpt-oss
        ("'%d %B %Y'", "26 July 2024"),  # SmolLM3
        ("'%A, %-m/%-d/%y'", "Friday, 7/26/24"),
        ("form", "26.07.2024"),
    ],
)
def test_a_template_that_asks_the_clock_itself_gets_the_same_date(
    tokenizer: PreTrainedTokenizerFast, asked: str, told: str
) -> None:
    template = (
        "\n  {% set form = '%d.%m.%Y' %}\n{% macro today() %}{{ strftime_now('%H:%M') }} {% endmacro %}"
        "{% if strftime_now is defined %}{{ today() + strftime_now(" + asked + ").split('|')[0] }}{% endif %}\n\n!"
    )
    assert chat_prompt(with_template(tokenizer, template), user="Rome?") == f"\n00:00 {told}\n!"


@pytest.mark.parametrize(
    ("opened", "answered"),
    [
        ("<|Assistant|><think>\n", "<|Assistant|><think>\n\n</think>\n\nAnswer:"),
        ("<|start|>assistant", "<|start|>assistant<|channel|>final<|message|>Answer:"),
    ],
)
def test_thoughts_that_a_template_cannot_leave_out_are_over_before_the_answer(
    tokenizer: PreTrainedTokenizerFast, opened: str, answered: str
) -> None:
    assert chat_prompt(with_template(tokenizer, opened), user="Rome?", begun="Answer:") == answered


def test_a_system_turn_that_a_template_leaves_out_opens_the_users(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    rendered = chat_prompt(with_template(tokenizer, template), user="Rome?", system="Be short.")
    assert rendered == "Be short.\n\nRome?"


def test_where_there_is_no_system_turn_its_text_opens_the_users(tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    rendered = chat_prompt(with_template(tokenizer, template), user="Rome?", system="Be short.")
    assert rendered == "[user]Be short.\n\nRome?"


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        chat_prompt(with_template(tokenizer, None), user="Rome?")
