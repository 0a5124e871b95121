"""Prompts in a target's own chat form."""

from contextlib import suppress

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ray_explain.explainer.examples import rendered_chat

# Where a template opens the answer with thoughts that nothing leaves out, what ends them, or goes round them.
_OPEN = {"<think>": "\n\n</think>\n\n", "<|start|>assistant": "<|channel|>final<|message|>"}  # DeepSeek R1; gpt-oss


def chat_prompt(tokenizer: PreTrainedTokenizerBase, *, user: str, system: str | None = None, begun: str = "") -> str:
    """A user turn (after a system turn if there is one) and the assistant's turn, opened with the text `begun`.

    Models that can think answer at once; where a template tells the date, it is always the same. Where it takes no
    system turn (Gemma) or leaves it out, the system's text opens the user's.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template: use a text-completion form, or an instruction-tuned model"
        )
    turns = [{"role": "user", "content": user}]
    if system is not None:
        with suppress(TemplateError):
            rendered = _rendered(tokenizer, [{"role": "system", "content": system}, *turns])
            if system.strip() in rendered:
                return rendered + begun
        turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
    return _rendered(tokenizer, turns) + begun


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]]) -> str:
    rendered = rendered_chat(tokenizer, turns, add_generation_prompt=True)
    for opened, answered in _OPEN.items():
        if rendered.rstrip().endswith(opened):
            return rendered.rstrip() + answered
    return rendered
