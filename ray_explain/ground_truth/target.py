"""The model that is measured, and which prompts it can read."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.ground_truth.positions import UNKNOWN_TOKEN, PromptTokens, Unusable, reading
from ray_explain.interventions.layout import Layout, layout_of
from ray_explain.interventions.memory import free_budget
from ray_explain.interventions.walk import row_bytes
from ray_explain.models import load_model

TOO_LONG = "the prompt is longer than the context"
TOO_LARGE = "it alone needs more than `cluster.memory_budget`"
NO_SUCH_LAYER = "a layer that the model does not have"
NO_SUCH_POSITION = "a position outside the prompt"


class Target:
    """A loaded model and its tokenizer.

    Config: `model` (folder, s3:// or hub id), `revision`, `dtype`; `memory_budget` in bytes, or without one
    `memory_share`, the share of the device that is this process's (default: all of it).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    memory_budget: int

    def __init__(self, config: dict[str, Any]) -> None:
        with storage.local_folder(config["model"]) as folder:
            loaded = load_model(folder, revision=config.get("revision"), dtype=config["dtype"])
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.layout = layout_of(loaded.model)
        self.memory_budget = config.get("memory_budget") or free_budget(
            self.layout.device, config.get("memory_share", 1.0)
        )
        self._reading_bytes = row_bytes(self.layout, logits=False)

    def read(self, prompts: Iterable[str]) -> Callable[[str], PromptTokens]:
        """What gives the tokens of one of these prompts.

        It raises Unusable where a prompt is empty, longer than the context or over the memory budget, or has a token
        that the model does not know.
        """
        tokens_of = reading(self.tokenizer, prompts)
        return lambda prompt: self._readable(tokens_of(prompt))

    def _readable(self, tokens: PromptTokens) -> PromptTokens:
        if self.layout.max_positions is not None and len(tokens.ids) > self.layout.max_positions:
            raise Unusable(TOO_LONG)
        if max(tokens.ids) >= self.layout.embedding.weight.shape[0]:
            raise Unusable(UNKNOWN_TOKEN)
        self.check_fits(self._reading_bytes(len(tokens.ids)))
        return tokens

    def check_fits(self, needed: int) -> None:
        """Raises: Unusable: a row that needs so many bytes is over the memory budget, even alone."""
        if needed > self.memory_budget:
            raise Unusable(TOO_LARGE)

    def check_layers(self, first: int, last: int) -> None:
        """Raises: Unusable: `first` to `last` is no block of layers of this model."""
        if not 0 <= first <= last < self.layout.n_layers:
            raise Unusable(NO_SUCH_LAYER)
