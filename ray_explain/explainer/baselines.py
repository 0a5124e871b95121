"""Explainers that were never trained: what a model says about vectors by itself."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain.explainer.examples import Example, prompt_ids
from ray_explain.explainer.generate import Generation, generate
from ray_explain.explainer.injection import InjectionConfig
from ray_explain.explainer.markers import Markers, markers_of
from ray_explain.explainer.module import Explainer
from ray_explain.explainer.projection import Projection
from ray_explain.explainer.vocabulary import make_room

SELFIE_SCALES = (1.0, 5.0, 10.0, 25.0, 50.0)
SELFIE_PROMPT = "What is the meaning of the word 'X'? The meaning of the word 'X' is"
SELFIE_CHAT = ("Briefly define the word 'X'.", "The meaning of the word 'X' is")  # user, beginning of the answer
SELFIE_BRIEF = "what is the word X ? the word X is"  # in words that the small models of the demo know
SELFIE_TOKENS = 25


def untrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    d_target: int,
    layers: Sequence[int] = (),
    injection: InjectionConfig | None = None,
) -> Explainer:
    """`model` as it is, with vectors read through an identity, or through a random projection where widths differ."""
    markers = markers_of(tokenizer)
    make_room(model, tokenizer)
    d_model = model.config.get_text_config().hidden_size
    projection = Projection("identity" if d_target == d_model else "linear", d_target, d_model, layers)
    return Explainer(model, markers, projection, injection).eval()


def selfie(
    explainer: Explainer,
    tokenizer: PreTrainedTokenizerBase,
    vectors: Float[np.ndarray, "n d_target"],
    layers: Sequence[tuple[int, ...]],
    *,
    batch_size: int,
    template: str | tuple[str, str] | None = None,
    scales: Sequence[float] = SELFIE_SCALES,
) -> list[list[Generation]]:
    """SelfIE (arXiv 2403.10949) as the paper's baseline: for each vector, one answer for each scale.

    The vector, at norm 1 times the scale, is the embedding of every X of `template`, without markers. To take the best
    of the answers by a score is an advantage that trained explainers do not have.

    Args:
        explainer: An `untrained` one that injects by "replace" and "raw".
        template: A text to go on with, or a user's turn and the beginning of the answer; unless given, the paper's for
            tokenizers with and without a chat template.

    Raises:
        ValueError: it injects in another way, or the template has no X.
    """
    if explainer.injection != InjectionConfig():
        raise ValueError(f"SelfIE sets the scale itself: use an explainer that replaces raw, not {explainer.injection}")
    template = template or (SELFIE_CHAT if tokenizer.chat_template else SELFIE_PROMPT)
    if "X" not in "".join(template):
        raise ValueError(f"template {template!r} has no X to put a vector at")
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    prompts = [
        _prompt(template, tokenizer, explainer.markers, scale * unit, block)
        for unit, block in zip(units, layers, strict=True)
        for scale in scales
    ]
    answers = generate(explainer, prompts, tokenizer, max_new_tokens=SELFIE_TOKENS, batch_size=batch_size)
    return [answers[i : i + len(scales)] for i in range(0, len(answers), len(scales))]


def _prompt(
    template: str | tuple[str, str],
    tokenizer: PreTrainedTokenizerBase,
    markers: Markers,
    vector: np.ndarray,
    layers: tuple[int, ...],
) -> Example:
    if isinstance(template, str):
        ids = tokenizer.encode(template.replace("X", markers.slot))
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    else:
        asked, begun = template
        ids = prompt_ids(asked.replace("X", markers.slot), tokenizer)
        ids = [*ids, *tokenizer.encode(begun.replace("X", markers.slot), add_special_tokens=False)]
    vectors = np.repeat(vector[None].astype(np.float32), ids.count(markers.slot_id), axis=0)
    return Example(ids, len(ids), vectors, layers, "selfie", "features")
