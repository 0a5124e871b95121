"""The model that is measured, and which prompts it can read."""

from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain import storage
from ray_explain.ground_truth.positions import UNKNOWN_TOKEN, PromptTokens, Unusable, reading
from ray_explain.interventions.layout import Layout, layout_of
from ray_explain.interventions.patching import MEMORY_BUDGET
from ray_explain.models import load_model

TOO_LONG = "the prompt is longer than the context"
NO_SUCH_LAYER = "a layer that the model does not have"
NO_SUCH_POSITION = "a position outside the prompt"


class Target:
    """A loaded model and its tokenizer.

    Config: `model` (folder, s3:// or hub id), `revision`, `dtype`, and `memory_budget` in bytes if not the default.
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
        self.memory_budget = config.get("memory_budget", MEMORY_BUDGET)

    def read(self, prompts: Iterable[str]) -> Callable[[str], PromptTokens]:
        """What gives the tokens of one of these prompts.

        It raises Unusable where a prompt is empty or longer than the context, or has a token that the model does not
        know.
        """
        tokens_of = reading(self.tokenizer, prompts)
        return lambda prompt: self._readable(tokens_of(prompt))

    def _readable(self, tokens: PromptTokens) -> PromptTokens:
        if self.layout.max_positions is not None and len(tokens.ids) > self.layout.max_positions:
            raise Unusable(TOO_LONG)
        if max(tokens.ids) >= self.layout.embedding.weight.shape[0]:
            raise Unusable(UNKNOWN_TOKEN)
        return tokens

    def check_layers(self, first: int, last: int) -> None:
        """Raises: Unusable: `first` to `last` is no block of layers of this model."""
        if not 0 <= first <= last < self.layout.n_layers:
            raise Unusable(NO_SUCH_LAYER)
