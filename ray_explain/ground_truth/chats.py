"""Prompts in a target's own chat form."""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, *, user: str, system: str | None = None, begun: str = "") -> str:
    """A user turn (after a system turn if there is one) and the assistant's turn, opened with the text `begun`.

    Models that can think answer at once. Where a template takes no system turn (Gemma), its text opens the user's.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template: use a text-completion form, or an instruction-tuned model"
        )
    turns = [{"role": "user", "content": user}]
    if system is not None:
        try:
            return _rendered(tokenizer, [{"role": "system", "content": system}, *turns]) + begun
        except TemplateError:
            turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return _rendered(tokenizer, turns) + begun


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return str(rendered)
