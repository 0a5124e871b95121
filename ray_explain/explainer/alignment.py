"""Where the target's vectors would lie in the explainer: a ridge regression between the two on the same text."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ray_explain.explainer.projection import RidgeSums
from ray_explain.interventions.extraction import residuals
from ray_explain.interventions.layout import layout_of

PENALTY = 1e-3
"""Times the mean eigenvalue of the target's activations."""

_TEXTS_AT_ONCE = 64
_HELD_OUT = 10  # of so many texts, one is not fitted on


class Alignment(NamedTuple):
    """For each layer of the target its map, and the share of the squared norm it explains on texts held out."""

    maps: dict[int, Float[Tensor, "d_explainer d_target"]]
    explained: dict[int, float]
    n_pairs: int


def align(
    target: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    explainer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: Sequence[str],
    layers: Sequence[int],
) -> Alignment:
    """Fit, for each of the target's `layers`, its residual stream to the explainer's at the same relative depth, at all
    places where a token ends in both (the paper, 3.4 and appendix C.2, trains such maps).

    Raises:
        ValueError: fewer places than the target is wide, or no text to hold out.
    """
    d_target, d_explainer = layout_of(target[0]).d_model, layout_of(explainer[0]).d_model
    depths = layout_of(target[0]).n_layers, layout_of(explainer[0]).n_layers
    counterparts = [counterpart(layer, *depths) for layer in layers]
    fitted, held_out = ([RidgeSums(d_target, d_explainer) for _ in layers] for _ in range(2))
    n_pairs = 0
    for sums, some in [(fitted, [t for i, t in enumerate(texts) if i % _HELD_OUT]), (held_out, texts[::_HELD_OUT])]:
        for start in range(0, len(some), _TEXTS_AT_ONCE):
            x, y = _paired(target, explainer, some[start : start + _TEXTS_AT_ONCE], layers, counterparts)
            n_pairs += x.shape[1] if sums is fitted else 0
            for one, of_target, of_explainer in zip(sums, x, y, strict=True):
                one.add(of_target, of_explainer)
    if n_pairs < d_target or not held_out[0].yy:
        raise ValueError(f"{n_pairs} places of {len(texts)} texts to fit maps of vectors {d_target} wide: too few")
    maps = {layer: sums.map(PENALTY) for layer, sums in zip(layers, fitted, strict=True)}
    explained = {layer: sums.explained(maps[layer]) for layer, sums in zip(layers, held_out, strict=True)}
    return Alignment(maps, explained, n_pairs)


def counterpart(layer: int, n_target: int, n_explainer: int) -> int:
    """The explainer's layer at the same share of the depth."""
    return round(layer * (n_explainer - 1) / max(n_target - 1, 1))


def shared_places(
    text: str, one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Token ids of a text for each tokenizer, and the positions of the tokens that end at the same characters.

    Without what either reads first of all: there a model without a begin token lays up a norm a hundred times that of
    others, which would be most of what a map is fitted on and judged by.
    """
    read = [tokenizer(text, return_offsets_mapping=True) for tokenizer in (one, other)]
    ends = [{end: i for i, (start, end) in enumerate(own["offset_mapping"]) if end > start and i} for own in read]
    places = sorted(set(ends[0]) & set(ends[1]))
    first, second = ((own["input_ids"], [at[place] for place in places]) for own, at in zip(read, ends))
    return first, second


@torch.no_grad()
def _paired(
    target: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    explainer: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    texts: Sequence[str],
    layers: Sequence[int],
    counterparts: Sequence[int],
) -> tuple[Float[Tensor, "layers n d_target"], Float[Tensor, "layers n d_explainer"]]:
    pairs = [pair for pair in (shared_places(text, target[1], explainer[1]) for text in texts) if pair[0][1]]
    sides = []
    for side, (model, of_layers) in enumerate([(target[0], layers), (explainer[0], counterparts)]):
        ids, positions = zip(*(pair[side] for pair in pairs))
        found = residuals(model, ids, of_layers, positions)
        sides.append(torch.cat(found, dim=1).float().cpu())
    return sides[0], sides[1]
