"""How well a description foretells a feature: by a simulator's activations, and by telling active windows from others.

The simulator's format is that of the paper (4.2, "Simulator correlation"): a language model reads the description and
then the window, and its logits of vocabulary ids 0 to 10 at each token are a distribution over that token's activation.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional

from ray_explain.interventions.tokens import token_batch

LEVELS = 11  # activations 0 to 10, which the simulator says by the vocabulary ids of the same numbers
RESAMPLES, CONFIDENCE = 1000, 0.95
# The released simulator's vocabulary: special ids of Llama 3.1 that an exemplar may hold, and its padding.
RELEASED_VOCABULARY, RELEASED_PAD = 128_261, 128_256
RELEASED_SPECIAL = {128_000: 128_257, 128_006: 128_258, 128_007: 128_259, 128_009: 128_260}


class Score(NamedTuple):
    """A number with its 95 % interval; NaN where it is undefined, which is to be told as unscored, not as 0."""

    value: float
    low: float
    high: float
    n: int  # windows it rests on


UNSCORED = Score(float("nan"), float("nan"), float("nan"), 0)


def simulator_score(
    simulated: Sequence[Float[np.ndarray, " pos"]],
    true: Sequence[Float[np.ndarray, " pos"]],
    kinds: Sequence[str] | None = None,
    seed: int = 0,
) -> Score:
    """Pearson correlation of simulated with true activations over all tokens of all windows, with its sign.

    True activations are clipped at 0, as in the paper (4.2). Its own score fits a line first, and so loses the sign: an
    opposite description scores like a right one. That number is the absolute value, and 0 where this is undefined.

    The interval is a bootstrap over windows, within each of `kinds` (such as top and random: their numbers are chosen,
    not sampled). Undefined where either side is constant, as for a simulator that says 0 throughout.

    Raises:
        ValueError: windows differ in number or length, or a simulated value is not finite.
    """
    _check(simulated, true, kinds)
    if not simulated:
        return UNSCORED
    sums = _window_sums(simulated, [np.clip(window, 0, None) for window in true])
    value = _correlation(sums.sum(axis=0))
    if np.isnan(value):
        return Score(float("nan"), float("nan"), float("nan"), len(true))
    low, high = _interval(sums, list(kinds or [""] * len(true)), seed)
    return Score(float(value), low, high, len(true))


def detection_score(said: Sequence[bool], active: Sequence[bool]) -> Score:
    """Balanced accuracy of saying in which windows a feature is active: 0.5 is chance, whatever the mix of windows.

    The interval joins the Wilson intervals of the two rates (Zou and Donner 2008), so that a perfect score on few
    windows does not look certain. Undefined without active windows, or without others.

    Raises:
        ValueError: they differ in number.
    """
    if len(said) != len(active):
        raise ValueError(f"{len(said)} verdicts on {len(active)} windows: give one for each")
    hits = [bool(s) for s, a in zip(said, active, strict=True) if a]
    rejections = [not s for s, a in zip(said, active, strict=True) if not a]
    if not hits or not rejections:
        return UNSCORED._replace(n=len(said))
    rates, below, above = zip(*(_rate(kind) for kind in (hits, rejections)), strict=True)
    value = sum(rates) / 2
    return Score(value, value - float(np.hypot(*below)) / 2, value + float(np.hypot(*above)) / 2, len(said))


class Simulator:
    """A causal language model that foretells activations in the paper's format, such as the released simulator.

    Windows are given as token ids of its own vocabulary, or as the texts of another tokenizer's tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_windows: int = 16) -> None:
        self._model, self._tokenizer, self._batch_windows = model, tokenizer, batch_windows
        released = model.config.vocab_size == RELEASED_VOCABULARY
        self._pad = RELEASED_PAD if released else pad_of(tokenizer)
        self._special = RELEASED_SPECIAL if released else {}

    def of_ids(self, description: str, windows: Sequence[Sequence[int]]) -> list[Float[np.ndarray, " pos"]]:
        """The activation, 0 to 10, that the description lets expect on each token of each window."""
        prefix = opening(self._tokenizer, prompt(description))
        rows = [prefix + [self._special.get(token, token) for token in window] for window in windows]
        values: list[np.ndarray] = []
        for start in range(0, len(rows), self._batch_windows):
            values += self._values(rows[start : start + self._batch_windows])
        return [row[len(prefix) :] for row in values]

    def of_texts(self, description: str, windows: Sequence[Sequence[str]]) -> list[Float[np.ndarray, " pos"]]:
        """As `of_ids`, for windows in the tokens of any tokenizer, given as texts that join to the window's text.

        A token gets the highest value of those of the simulator's tokens that share a character with it.
        """
        encoded = [
            self._tokenizer("".join(window), add_special_tokens=False, return_offsets_mapping=True)
            for window in windows
        ]
        values = self.of_ids(description, [one["input_ids"] for one in encoded])
        return [
            carried_over(own, one["offset_mapping"], window)
            for own, one, window in zip(values, encoded, windows, strict=True)
        ]

    @torch.no_grad()
    def _values(self, rows: Sequence[Sequence[int]]) -> Iterator[Float[np.ndarray, " pos"]]:
        batch = token_batch(rows, self._pad, self._model.device)
        hidden = self._model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).last_hidden_state
        head = self._model.get_output_embeddings()  # only its first rows: all logits of a batch would take gigabytes
        bias = None if head.bias is None else head.bias[:LEVELS]
        expected = expected_activations(functional.linear(hidden, head.weight[:LEVELS], bias)).cpu().numpy()
        return (row[-len(own) :] for row, own in zip(expected, rows, strict=True))


def pad_of(tokenizer: Any) -> int:
    """The id that rows are padded with; a tokenizer may have none of its own."""
    return next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def opening(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that is to go on: with the special ones that the tokenizer puts before it, none behind."""
    read = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    added = read["special_tokens_mask"]
    behind = next((n for n, special in enumerate(reversed(added)) if not special), 0)
    return list(read["input_ids"][: len(added) - behind])


def prompt(description: str) -> str:
    """What the simulator reads before a window, byte for byte (4.2)."""
    return f"## Neuron Description: {description}\n\n ## Input: "


def expected_activations(logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch"]:
    """The mean of the distribution that the logits of ids 0 to 10 stand for, from 0 to 10."""
    return logits[..., :LEVELS].float().softmax(dim=-1) @ torch.arange(
        LEVELS, dtype=torch.float32, device=logits.device
    )


def carried_over(
    values: Float[np.ndarray, " own"], spans: Sequence[tuple[int, int]], pieces: Sequence[str]
) -> Float[np.ndarray, " pieces"]:
    """Values of tokens with these spans of characters, carried over to other pieces of the same text.

    0 for a piece that no token shares a character with.
    """
    length = sum(map(len, pieces))
    by_character = np.zeros(length, dtype=np.float32)
    for value, (start, stop) in zip(values, spans, strict=True):
        by_character[start:stop] = np.maximum(by_character[start:stop], value)
    ends = np.cumsum([len(piece) for piece in pieces])
    return np.array(
        [by_character[end - len(piece) : end].max(initial=0) for end, piece in zip(ends, pieces, strict=True)],
        dtype=np.float32,
    )


def _check(simulated: Sequence[np.ndarray], true: Sequence[np.ndarray], kinds: Sequence[str] | None) -> None:
    if [len(window) for window in simulated] != [len(window) for window in true]:
        raise ValueError(
            f"{len(simulated)} simulated and {len(true)} true windows: they must be alike in number and length"
        )
    if kinds is not None and len(kinds) != len(true):
        raise ValueError(f"{len(kinds)} kinds of {len(true)} windows: give one for each")
    for i, window in enumerate(simulated):
        if not np.isfinite(window).all():
            raise ValueError(f"simulated activations of window {i} are not finite: leave the feature unscored")


def _window_sums(simulated: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> Float[np.ndarray, "windows 6"]:
    """What a correlation is made of, for each window: n, and the sums of x, y, xx, yy, xy."""
    x_mean, y_mean = (np.concatenate(side).mean(dtype=np.float64) for side in (simulated, true))
    rows = []
    for window, truth in zip(simulated, true, strict=True):
        x, y = window - x_mean, truth - y_mean  # near 0, so that the sums lose no digits
        rows.append([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    return np.array(rows, dtype=np.float64)


def _correlation(sums: Float[np.ndarray, "*batch 6"]) -> Float[np.ndarray, "*batch"]:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y = xx - x * x / n, yy - y * y / n
    tiny = 1e-12 * np.maximum(1.0, np.maximum(xx, yy))
    defined = (spread_x > tiny) & (spread_y > tiny)
    root = np.sqrt(np.where(defined, spread_x * spread_y, 1.0))
    return np.where(defined, np.clip((xy - x * y / n) / root, -1, 1), np.nan)


def _interval(sums: Float[np.ndarray, "windows 6"], kinds: Sequence[str], seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(seed)
    total = np.zeros((RESAMPLES, 6))
    for kind in sorted(set(kinds)):
        rows = sums[[i for i, own in enumerate(kinds) if own == kind]]
        total += generator.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES) @ rows
    drawn = _correlation(total)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _rate(right: Sequence[bool]) -> tuple[float, float, float]:
    """The rate, and how far it is from the two ends of its Wilson interval."""
    result = binomtest(sum(right), len(right))
    ends = result.proportion_ci(CONFIDENCE, method="wilson")
    return result.statistic, result.statistic - ends.low, ends.high - result.statistic
