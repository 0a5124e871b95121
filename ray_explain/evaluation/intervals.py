"""How sure a number is: resampling of groups, tests by swapping within groups, correction, and planning.

The unit is the group, not the row: questions about one subject are alike, and counting them as independent would make
intervals too narrow. All of it works on sums over groups, so that a resample is one row of a matrix product.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

CONFIDENCE = 0.95
_FEW = 8  # groups whose percentiles do not reach as far as Student's t
_CHUNK = 2**22  # group counts made at a time, to bound memory
_LEVELS = 101  # of one t that the other is averaged over
_HALVINGS = 14  # of the range of a quantile
_NO_END = 1e12  # questions
_MOST_SEEDS = 1000

Values = Callable[[Float[np.ndarray, "*batch columns"]], Float[np.ndarray, "*batch parts"]]
"""From sums of columns to the metrics of a table's parts; NaN where one is undefined."""


def group_counts(n_groups: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "chunk n_groups"]]:
    """How often each group is drawn in each bootstrap resample of `n_groups` groups, a chunk of resamples at a time."""
    rng, done = np.random.default_rng(seed), 0
    while done < resamples:
        chunk = min(resamples - done, max(1, _CHUNK // n_groups))
        drawn = rng.integers(0, n_groups, (chunk, n_groups)) + n_groups * np.arange(chunk)[:, None]
        yield np.bincount(drawn.ravel(), minlength=chunk * n_groups).reshape(chunk, n_groups).astype(np.float64)
        done += chunk


def bootstrap(
    sums: Float[np.ndarray, "n_groups columns"], values: Values, *, resamples: int, seed: int
) -> Float[np.ndarray, "resamples parts"]:
    """`values` of the summed columns under each resample of the groups; the same `seed` draws the same groups."""
    return np.concatenate([values(counts @ sums) for counts in group_counts(len(sums), resamples, seed)])


def percentile_interval(
    resampled: Float[np.ndarray, "resamples parts"], n_groups: Int[np.ndarray, " parts"]
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """95 % intervals: percentiles of the resamples, taken further out for few groups (Hesterberg 2015, section 5.3).

    No resample lies beyond the most extreme groups, so that the percentiles of a mean over 2, 3, 4 or 5 groups hold the
    truth in 51, 76, 88 or 91 of 100 studies: of a few groups the interval is at least Student's. It may lie outside of
    what the values can be. NaN where a part has fewer than two groups or no resample in which it is defined.
    """
    bounds = np.full((2, resampled.shape[1]), np.nan)
    for part, groups in enumerate(n_groups):
        known = resampled[~np.isnan(resampled[:, part]), part]
        if groups >= 2 and len(known):
            tail = stats.norm.cdf(math.sqrt(groups / (groups - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, groups - 1))
            bounds[:, part] = np.quantile(known, [tail, 1 - tail])
            if groups <= _FEW:
                half = _t(groups - 1) * math.sqrt(known.var() * groups / (groups - 1))
                wide = known.mean() - half, known.mean() + half
                bounds[:, part] = min(bounds[0, part], wide[0]), max(bounds[1, part], wide[1])
    return bounds[0], bounds[1]


def wilson_interval(
    share: Float[np.ndarray, " parts"],
    resampled: Float[np.ndarray, "resamples parts"],
    n_groups: Int[np.ndarray, " parts"],
    n: Int[np.ndarray, " parts"],
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """95 % intervals of shares of `n` answers: Wilson's, for as many independent answers as have the variance that the
    resamples of the groups show, and with Student's t (Kott and Carr 1997).

    Near 0 and 1 percentiles of a bootstrap hold the truth too seldom: a share of .02 over 60 groups of 5 in 88 of 100
    studies. NaN as `percentile_interval`; where the resamples do not differ, `alike_interval` knows more.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(n_groups >= 2, _t(np.maximum(n_groups - 1, 1)), np.nan)
        variance = _nanvar(resampled) * n_groups / (n_groups - 1)
        independent = np.minimum(share * (1 - share) / variance, n)
        middle = (share + t**2 / (2 * independent)) / (1 + t**2 / independent)
        half = t / (1 + t**2 / independent) * np.sqrt(share * (1 - share) / independent + (t / (2 * independent)) ** 2)
    return np.clip(middle - half, 0, 1), np.clip(middle + half, 0, 1)


def alike_bound(n_groups: int | np.ndarray) -> Any:
    """How large a share of groups may be unlike the `n_groups` that were seen, all alike: the width of the 95 %
    interval of a proportion that is 0 or 1 in all of them (exact binomial)."""
    return 1 - ((1 - CONFIDENCE) / 2) ** (1 / n_groups)


def alike_interval(
    value: Float[np.ndarray, " parts"],
    low: Float[np.ndarray, " parts"],
    high: Float[np.ndarray, " parts"],
    resampled: Float[np.ndarray, "resamples parts"],
    n_groups: Int[np.ndarray, " parts"],
    reach: Float[np.ndarray, "2 parts"],
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """The interval from `low` to `high` as far as the `reach`; or, where all groups say `value` alone, what they allow.

    The bootstrap, which only ever sees what was seen, would claim to be certain there. A share of `alike_bound` of all
    groups may be otherwise, and those by as much as the `reach` (least and largest value there is) lets them.
    """
    known = ~np.isnan(resampled)
    ends = [np.where(known, resampled, end).T for end in (np.inf, -np.inf)]
    alike = (n_groups >= 2) & known.any(axis=0) & (ends[1].max(axis=1) - ends[0].min(axis=1) < 1e-12)
    others = alike_bound(np.maximum(n_groups, 1))
    return (
        np.where(alike, value - others * (value - reach[0]), np.maximum(low, reach[0])),
        np.where(alike, value + others * (reach[1] - value), np.minimum(high, reach[1])),
    )


class Spread(NamedTuple):
    """95 % intervals of differences, one entry per part of a table."""

    difference: Float[np.ndarray, " parts"]
    low: Float[np.ndarray, " parts"]
    high: Float[np.ndarray, " parts"]
    p_value: Float[np.ndarray, " parts"]  # two-sided t test with the same variances as the interval; NaN if undefined
    seed_variance: Float[np.ndarray, " parts"]  # between seeds of training, beyond what the questions explain


def spread_over_seeds(
    observed: Float[np.ndarray, "seeds parts"],
    resampled: Float[np.ndarray, "resamples seeds parts"],
    n_groups: Int[np.ndarray, " parts"],
    reach: Float[np.ndarray, "2 parts"],
) -> Spread:
    """The mean difference over the seeds of training, with an interval for other questions and for other seeds.

    The bootstrap over groups of the mean over seeds gives the interval for other questions. Several seeds widen it (a
    two-way random-effects model, groups x seeds): the error is the sum of what the groups share, with as many degrees
    of freedom as there are groups but one, and of what differs between seeds, with as many as seeds but one. The
    quantiles are those of the sum of two Student's t (Behrens and Fisher): with two seeds they lie far out. Such
    intervals hold the truth in 95 % of studies or more, whether seeds differ or not; in up to 99 % with two seeds, 98 %
    with three (docs/decisions/0006). One seed says nothing of others: then nothing is added.

    Args:
        reach: The least and the largest difference there can be.
    """
    seeds, difference = len(observed), observed.mean(axis=0)
    pooled = resampled.mean(axis=1)
    low, high = percentile_interval(pooled, n_groups)
    low, high = alike_interval(difference, low, high, pooled, n_groups, reach)
    freedom = np.maximum(n_groups - 1, 1)
    finite = n_groups / freedom  # the variance of a bootstrap is that of n, not of n - 1
    variance, between = _nanvar(pooled) * finite, np.zeros_like(difference)
    if seeds == 1:
        p_value = _two_sided(np.abs(difference), variance, freedom)
        p_value = np.where(np.isnan(difference), np.nan, np.fmax(p_value, _least_p(n_groups)))
        return Spread(difference, low, high, p_value, between)
    by_chance = _nanvar(resampled - pooled[:, None]).mean(axis=0) * seeds / (seeds - 1) * finite
    between = observed.var(axis=0, ddof=1)
    scales = np.sqrt(np.maximum(variance - by_chance / seeds, 0)), np.sqrt(between / seeds)
    extra = _sum_of_ts_quantile(*scales, freedom, seeds - 1) - _t(freedom) * np.sqrt(variance)
    widen = np.maximum(extra, 0)
    p_value = 2 * _sum_of_ts_tail(np.abs(difference), *scales, freedom, seeds - 1)
    p_value = np.fmax(np.fmax(p_value, _two_sided(np.abs(difference), variance, freedom)), _least_p(n_groups))
    return Spread(
        difference,
        np.maximum(low - widen, reach[0]),
        np.minimum(high + widen, reach[1]),
        np.where(np.isnan(difference), np.nan, p_value),
        np.maximum(between - by_chance, 0),
    )


def _two_sided(size: np.ndarray, variance: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(size == 0, 1.0, 2 * stats.t.sf(size / np.sqrt(variance), freedom))


def _least_p(n_groups: np.ndarray) -> np.ndarray:
    """Of n groups that all differ in one direction, which they do by chance as coins do."""
    return 2.0 ** (1 - np.maximum(n_groups, 1))


def _sum_of_ts_tail(
    x: np.ndarray, scale: np.ndarray, other_scale: np.ndarray, freedom: np.ndarray, other_freedom: np.ndarray | int
) -> Float[np.ndarray, " parts"]:
    """How probable it is that scale x t + other_scale x t' is above `x`, t and t' Student's with these degrees."""
    first = scale >= other_scale
    wide, narrow = np.where(first, scale, other_scale), np.where(first, other_scale, scale)
    of_wide, of_narrow = np.where(first, freedom, other_freedom), np.where(first, other_freedom, freedom)
    levels = ((np.arange(_LEVELS) + 0.5) / _LEVELS)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return stats.t.sf((x - narrow * stats.t.ppf(levels, of_narrow)) / wide, of_wide).mean(axis=0)


def _sum_of_ts_quantile(
    scale: np.ndarray, other_scale: np.ndarray, freedom: np.ndarray, other_freedom: int, alpha: float = 1 - CONFIDENCE
) -> Float[np.ndarray, " parts"]:
    """What scale x t + other_scale x t' is above, or below minus which it is, in a share `alpha` of cases."""
    low, high = (
        np.zeros_like(scale),
        sum(
            each * stats.t.ppf(1 - alpha / 2, degrees)
            for each, degrees in [(scale, freedom), (other_scale, other_freedom)]
        ),
    )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_low = _sum_of_ts_tail(middle, scale, other_scale, freedom, other_freedom) > alpha / 2
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return high


def _nanvar(values: np.ndarray) -> np.ndarray:
    """Variance over the first axis, leaving out what is undefined; NaN where all is."""
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, values, 0).sum(axis=0) / count
        return (np.where(known, values - mean, 0) ** 2).sum(axis=0) / count


def _t(freedom: int | np.ndarray) -> Any:
    return stats.t.ppf((1 + CONFIDENCE) / 2, freedom)


def swap_test(
    one: Float[np.ndarray, "n_groups seeds columns"],
    other: Float[np.ndarray, "n_groups seeds columns"],
    values: Values,
    *,
    permutations: int,
    seed: int,
) -> Float[np.ndarray, " parts"]:
    """Two-sided p-values of the difference of `values`, mean over seeds: a permutation test over groups.

    If it makes no difference who answers, the answers to a group's questions may be swapped between the two. For a
    mean this is the sign-flip test; for F1, which is no mean, it stays exact. The smallest p-value there is,
    is 1 / (permutations + 1). NaN where the difference is undefined.
    """
    n_groups, seeds, columns = one.shape
    middle, half = (one + other).sum(axis=0) / 2, ((one - other) / 2).reshape(n_groups, -1)

    def difference(swing: np.ndarray) -> np.ndarray:
        return (values(middle + swing) - values(middle - swing)).mean(axis=-2)

    seen = np.abs(difference(half.sum(axis=0).reshape(seeds, columns)))
    rng, done, as_large = np.random.default_rng(seed), 0, np.zeros(len(seen))
    while done < permutations:
        chunk = min(permutations - done, max(1, _CHUNK // n_groups))
        signs = rng.integers(0, 2, (chunk, n_groups)) * 2.0 - 1.0
        swapped = np.abs(difference((signs @ half).reshape(chunk, seeds, columns)))
        as_large += (swapped >= seen - 1e-9).sum(axis=0)  # sums in another order differ in their last bits
        done += chunk
    return np.where(np.isnan(seen), np.nan, (1 + as_large) / (permutations + 1))


def holm(p_values: Sequence[float]) -> Float[np.ndarray, " n"]:
    """p-values corrected for being the best of several (Holm 1979), in their order; NaNs stay and do not count."""
    p = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


def self_weights(pairings: Sequence[tuple[str, str]]) -> Float[np.ndarray, " pairings"]:
    """What each (explainer, target) score counts in the advantage of self-explanation: differences in differences.

    In the model score = explainer's strength + target's ease + advantage where they are one, the advantage is
    this weighted sum of the scores (least squares). On a full square it is mean self minus mean cross.

    Raises:
        ValueError: the pairings do not tell the advantage from strength and ease.
    """
    names = [sorted({pair[side] for pair in pairings}) for side in (0, 1)]
    indicators = [[float(pair[side] == name) for side in (0, 1) for name in names[side]] for pair in pairings]
    own = np.array([float(explainer == target) for explainer, target in pairings])
    strength_and_ease = np.array(indicators).reshape(len(pairings), -1)
    # the part of the self indicator that strength and ease cannot imitate
    residual = own - strength_and_ease @ np.linalg.lstsq(strength_and_ease, own, rcond=None)[0]
    size = residual @ residual
    if size < 1e-9:
        raise ValueError(
            f"{len(pairings)} pairings do not tell self-explanation from strong explainers and easy targets: "
            "at least two models must explain themselves and each other"
        )
    return residual / size


class Pilot(NamedTuple):
    """What planning needs to know of a difference, from scores that are there already."""

    group_variance: float  # of a group's part in the difference: bootstrap variance times number of groups
    questions_per_group: float
    seed_variance: float = 0.0  # of the difference between seeds of training, beyond what questions explain


def detectable(
    known: Pilot, questions: float, *, seeds: int = 1, power: float = 0.8, alpha: float = 1 - CONFIDENCE
) -> float:
    """The true difference that a study of so many questions and seeds finds with probability `power`, by a two-sided
    test as of `spread_over_seeds`: with few seeds its quantiles lie far out."""
    groups = max(questions / known.questions_per_group, 2.0)
    of_groups, of_seeds = math.sqrt(known.group_variance / groups), math.sqrt(known.seed_variance / seeds)
    spread = math.hypot(of_groups, of_seeds)
    critical = stats.norm.ppf(1 - alpha / 2) * spread
    if seeds > 1:
        scales = np.array([of_groups]), np.array([of_seeds])
        critical = _sum_of_ts_quantile(*scales, np.array([groups - 1]), seeds - 1, alpha)[0]
    return float(critical + stats.norm.ppf(power) * spread)


def questions_needed(
    wanted: float, pilot: Pilot, *, seeds: int = 1, power: float = 0.8, alpha: float = 1 - CONFIDENCE
) -> int:
    """How many questions it takes to find a true difference of `wanted` with probability `power`: where `detectable`
    comes down to it.

    Raises:
        ValueError: the seeds alone spread more than that; the message says how many seeds it takes at least.
    """

    def found(questions: float, seeds: int) -> bool:
        return detectable(pilot, questions, seeds=seeds, power=power, alpha=alpha) <= abs(wanted)

    if not found(_NO_END, seeds):
        least = next((n for n in range(2, _MOST_SEEDS + 1) if found(_NO_END, n)), 0) if wanted else 0
        way_out = f"train at least {least} seeds" if least else f"not even {_MOST_SEEDS} seeds would do"
        way_out = way_out if wanted else "no number of questions shows a difference of 0"
        raise ValueError(f"a difference of {wanted} with {seeds} seeds: their spread hides it; {way_out}")
    low, high = 1.0, _NO_END
    while high > low + 0.5:
        middle = math.sqrt(low * high) if high > 2 * low else (low + high) / 2
        low, high = (low, middle) if found(middle, seeds) else (middle, high)
    return math.ceil(high)
