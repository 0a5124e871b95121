"""Whether explainers know what they know: the probability of an answer against how often such answers are right."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from ray_explain.evaluation import intervals

BINS = 8  # at most; each holds the same number of answers
LEAST = 20  # answers a bin


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Answers of about the same confidence."""

    confidence: float  # mean
    right: float  # share of exact matches
    low: float | None  # 95 % interval of `right`
    high: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Of an explainer on a task and target, all its seeds together."""

    task: str
    target: str
    explainer: str
    n: int  # answers that have a confidence
    overconfidence: tuple[float, float | None, float | None]  # mean confidence minus accuracy, and its 95 % interval
    error: float  # expected calibration error: mean distance of confidence and accuracy over the bins, answers counted
    bins: Sequence[Bin]


def calibrations(graded: pa.Table, trained: Sequence[str], *, seed: int, resamples: int = 2000) -> list[Calibration]:
    """One for each task, target and `trained` explainer, asked without a control.

    The confidence in an answer is the probability of its tokens, all together. Answers without one (questions that
    could not be asked) are left out. The intervals resample groups.
    """
    asked = graded.filter((pc.field("control") == "none") & pc.is_in(pc.field("explainer"), pa.array(trained)))
    asked = asked.filter(pc.is_valid(asked["logprob"]))
    keys = ["task", "target", "explainer"]
    found = []
    for series in asked.group_by(keys).aggregate([]).sort_by([(key, "ascending") for key in keys]).to_pylist():
        mask = None
        for key, value in series.items():
            here = pc.equal(asked[key], value)
            mask = here if mask is None else pc.and_(mask, here)
        found.append(_calibration(asked.filter(mask), series, seed, resamples))
    return found


def _calibration(answers: pa.Table, series: dict[str, str], seed: int, resamples: int) -> Calibration:
    confidence = np.exp(answers["logprob"].cast(pa.float64()).to_numpy())
    right = answers["exact"].to_numpy(zero_copy_only=False).astype(np.float64)
    n_bins = int(np.clip(len(right) // LEAST, 1, BINS))
    order = np.lexsort([answers["question_id"].to_numpy(zero_copy_only=False), confidence])
    bin_of = np.empty(len(right), dtype=np.int64)
    bin_of[order] = np.arange(len(right)) * n_bins // len(right)
    names, group_of = np.unique(answers["group"].to_numpy(zero_copy_only=False), return_inverse=True)
    sums = np.zeros((len(names), n_bins, 3))
    np.add.at(sums, (group_of, bin_of), np.stack([np.ones_like(right), confidence, right], axis=1))
    values = _values(sums.sum(axis=0))
    resampled = intervals.bootstrap(
        sums.reshape(len(names), -1), lambda flat: _values(flat.reshape(*flat.shape[:-1], n_bins, 3)),
        resamples=resamples, seed=seed,
    )  # fmt: skip
    groups = np.append((sums[:, :, 0] > 0).sum(axis=0), len(names))
    n, said, hit = sums.sum(axis=0).T
    lows, highs = _interval(values, resampled, groups, n)
    bins = [
        Bin(confidence=said[b] / n[b], right=values[b], low=_known(lows[b]), high=_known(highs[b]), n=int(n[b]))
        for b in range(n_bins)
    ]
    return Calibration(
        **series,
        n=len(right),
        overconfidence=(float(values[-1]), _known(lows[-1]), _known(highs[-1])),
        error=float(np.abs(said - hit).sum() / len(right)),
        bins=bins,
    )


def _values(sums: Float[np.ndarray, "*batch bins 3"]) -> Float[np.ndarray, "*batch bins+1"]:
    """The accuracy of each bin, then confidence minus accuracy over all of them; NaN for a bin without answers."""
    n, said, right = np.moveaxis(sums, -1, 0)
    accuracy = np.divide(right, n, out=np.full(n.shape, np.nan), where=n > 0)
    over = (said.sum(axis=-1) - right.sum(axis=-1)) / n.sum(axis=-1)
    return np.concatenate([accuracy, over[..., None]], axis=-1)


def _interval(
    values: np.ndarray, resampled: np.ndarray, groups: np.ndarray, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each bin's accuracy, a share of answers, and of the overconfidence, a difference of two means."""
    of_bins = intervals.wilson_interval(values[:-1], resampled[:, :-1], groups[:-1], n)
    over = intervals.percentile_interval(resampled[:, -1:], groups[-1:])
    low, high = (np.append(*pair) for pair in zip(of_bins, over))
    reach = np.array([[0.0, 1.0]] * len(n) + [[-1.0, 1.0]]).T
    return intervals.alike_interval(values, low, high, resampled, groups, reach)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
