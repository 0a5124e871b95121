"""Prompts in a target's own chat form."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ray_explain.explainer.examples import DATE


def chat_prompt(tokenizer: PreTrainedTokenizerBase, *, user: str, system: str | None = None, begun: str = "") -> str:
    """A user turn (after a system turn if there is one) and the assistant's turn, opened with the text `begun`.

    Models that can think answer at once; where a template tells the date, it is always the same. Where it takes no
    system turn (Gemma), the system's text opens the user's.

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
    how: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False, "date_string": DATE}
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **how))
