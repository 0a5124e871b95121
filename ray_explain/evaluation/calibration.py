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

Bounded = tuple[float, float | None, float | None]  # a value and its 95 % interval


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
    overconfidence: Bounded  # mean confidence minus accuracy
    error: Bounded  # expected calibration error: mean distance of confidence and accuracy in the bin, over the answers
    bins: Sequence[Bin]


def calibrations(graded: pa.Table, trained: Sequence[str], *, seed: int, resamples: int = 2000) -> list[Calibration]:
    """One for each task, target and `trained` explainer, asked without a control.

    The confidence in an answer is the probability of its tokens, all together. Answers without one (questions that
    could not be asked), and those to questions without a right one, are left out. The intervals resample groups.

    A resample is further from calibration than what it is drawn from, so percentiles of the error would never hold 0,
    where a calibrated explainer is. Its interval begins where the error is smaller by as much as the bins of resamples,
    all together, move; so it holds the truth in 96 to 100 % of simulated studies.
    """
    asked = graded.filter((pc.field("control") == "none") & pc.is_in(pc.field("explainer"), pa.array(trained)))
    asked = asked.filter(pc.and_(pc.is_valid(asked["logprob"]), pc.is_valid(asked["exact"])))
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
    total = sums.sum(axis=0)
    observed = _distances(total)
    values = _values(total, observed)
    resampled = intervals.bootstrap(
        sums.reshape(len(names), -1), lambda flat: _values(flat.reshape(*flat.shape[:-1], n_bins, 3), observed),
        resamples=resamples, seed=seed,
    )  # fmt: skip
    groups = np.append((sums[:, :, 0] > 0).sum(axis=0), [len(names)] * 3)
    n, said, _ = total.T
    lows, highs = (list(map(_known, ends)) for ends in _interval(values, resampled, groups, n))
    bins = [
        Bin(confidence=said[b] / n[b], right=values[b], low=lows[b], high=highs[b], n=int(n[b])) for b in range(n_bins)
    ]
    overconfidence, error = ((float(values[at]), lows[at], highs[at]) for at in (n_bins, n_bins + 1))
    return Calibration(**series, n=len(right), overconfidence=overconfidence, error=error, bins=bins)


def _distances(sums: Float[np.ndarray, "*batch bins 3"]) -> Float[np.ndarray, "*batch bins"]:
    """Confidence minus accuracy of each bin, times its share of the answers."""
    n, said, right = np.moveaxis(sums, -1, 0)
    return (said - right) / n.sum(axis=-1, keepdims=True)


def _values(
    sums: Float[np.ndarray, "*batch bins 3"], observed: Float[np.ndarray, " bins"]
) -> Float[np.ndarray, "*batch bins+3"]:
    """The accuracy of each bin, NaN for one without answers; then over all of them confidence minus accuracy, the
    calibration error, and how far the distances of the bins are from the `observed` ones.
    """
    n, _, right = np.moveaxis(sums, -1, 0)
    accuracy = np.divide(right, n, out=np.full(n.shape, np.nan), where=n > 0)
    distances = _distances(sums)
    over, error, moved = (each.sum(axis=-1) for each in (distances, np.abs(distances), np.abs(distances - observed)))
    return np.concatenate([accuracy, np.stack([over, error, moved], axis=-1)], axis=-1)


def _interval(
    values: np.ndarray, resampled: np.ndarray, groups: np.ndarray, n: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Of each bin's accuracy, a share of answers; of the overconfidence, a difference of two means; of the error."""
    of_bins = intervals.wilson_interval(values[:-3], resampled[:, :-3], groups[:-3], n)
    of_all = intervals.percentile_interval(resampled[:, -3:], groups[-3:])
    low, high = (np.concatenate(pair) for pair in zip(of_bins, of_all))
    low[-2] = np.maximum(values[-2] - high[-1], 0)
    reach = np.array([[0.0, 1.0]] * len(n) + [[-1.0, 1.0], [0.0, 1.0]]).T
    return intervals.alike_interval(values[:-1], low[:-1], high[:-1], resampled[:, :-1], groups[:-1], reach)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
