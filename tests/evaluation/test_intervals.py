import numpy as np
import pytest
from scipy import stats

from ray_explain.evaluation import intervals
from ray_explain.evaluation.intervals import Pilot

GROUPS, PER_GROUP = 60, 5
OF_ALL = np.full(1, GROUPS)


def rates(sums):
    """Shares of pairs of columns (right, asked)."""
    return sums[..., 0::2] / sums[..., 1::2]


def clustered(rng, studies, mean, spread, groups=GROUPS):
    """Sums of `studies` studies: right answers in each of `groups` groups, whose own rates differ by beta noise."""
    own = rng.beta(mean * spread, (1 - mean) * spread, (groups, studies))
    right = rng.binomial(PER_GROUP, own)
    return np.stack([right, np.full_like(right, PER_GROUP)], axis=-1).reshape(groups, -1).astype(float)


@pytest.mark.parametrize("mean, spread", [(0.5, 1.0), (0.8, 2.0)])
def test_95_percent_intervals_hold_the_truth_in_95_percent_of_clustered_studies(mean, spread):
    studies = 2000
    sums = clustered(np.random.default_rng(0), studies, mean, spread)
    resampled = intervals.bootstrap(sums, rates, resamples=1000, seed=0)
    low, high = intervals.percentile_interval(resampled, np.full(studies, GROUPS))
    assert 0.93 < np.mean((low <= mean) & (mean <= high)) < 0.97


@pytest.mark.parametrize("groups, spread", [(60, 2.0), (150, 2.0), (150, 20.0), (30, 20.0)])
@pytest.mark.parametrize("mean", [0.02, 0.05, 0.5, 0.8, 0.95])
def test_intervals_of_rare_and_of_common_shares_hold_the_truth_in_95_percent_of_clustered_studies(mean, groups, spread):
    studies = 3000
    sums = clustered(np.random.default_rng(8), studies, mean, spread, groups)
    share, told = rates(sums.sum(axis=0)), np.full(studies, groups)
    resampled = intervals.bootstrap(sums, rates, resamples=400, seed=0)
    low, high = intervals.wilson_interval(share, resampled, told, told * PER_GROUP)
    low, high = intervals.alike_interval(share, low, high, resampled, told, np.array([[0.0], [1.0]]))
    held = np.mean((low <= mean) & (mean <= high))
    assert (0.9 if mean == 0.02 and spread == 2.0 else 0.925) < held < 0.975
    assert (low >= 0).all() and (high <= 1).all()


def test_shares_of_independent_answers_have_wilsons_interval():
    right = np.zeros(4000)
    right[:400] = 1
    sums = np.stack([right, np.ones_like(right)], axis=1)
    resampled = intervals.bootstrap(sums, rates, resamples=20_000, seed=0)
    low, high = intervals.wilson_interval(np.array([0.1]), resampled, np.array([4000]), np.array([4000]))
    exact = stats.binomtest(400, 4000).proportion_ci(method="wilson")
    assert [low[0], high[0]] == pytest.approx([exact.low, exact.high], abs=0.0005)


def test_groups_that_all_say_the_same_leave_room_for_others():
    """A certain bootstrap: five groups, one side always right and the other never, or both never."""
    for one, other, expected in ((1, 0, (1 - 2 * intervals.alike_bound(5), 1)), (0, 0, (-1, 1))):
        sums = [np.stack([np.full(5, float(each)), np.ones(5)], axis=1) for each in (one, other)]
        resampled = np.subtract(*(intervals.bootstrap(each, rates, resamples=200, seed=0) for each in sums))
        spread = intervals.spread_over_seeds(
            np.array([[float(one - other)]]), resampled[:, None], np.array([5]), np.array([[-1.0], [1.0]])
        )
        scale = 1 if one else intervals.alike_bound(5)
        assert (spread.low[0], spread.high[0]) == pytest.approx(tuple(scale * np.array(expected)))
        assert spread.p_value[0] == pytest.approx(2.0**-4 if one else 1)


def test_resampling_rows_instead_of_groups_would_be_far_too_sure():
    """What the intervals are for: were each answer its own group, 95 % would be 70 %."""
    rng, studies = np.random.default_rng(0), 500
    own = np.repeat(rng.beta(0.5, 0.5, (GROUPS, studies)), PER_GROUP, axis=0)
    right = (rng.random(own.shape) < own).astype(float)
    rows = np.stack([right, np.ones_like(right)], axis=-1).reshape(len(right), -1)
    low, high = intervals.percentile_interval(
        intervals.bootstrap(rows, rates, resamples=400, seed=0), np.full(studies, len(rows))
    )
    assert np.mean((low <= 0.5) & (high >= 0.5)) < 0.8


def test_few_groups_widen_an_interval_as_students_t_does():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5)
    sums = np.stack([values, np.ones(5)], axis=1)
    low, high = intervals.percentile_interval(intervals.bootstrap(sums, rates, resamples=40_000, seed=0), np.array([5]))
    narrow = stats.bootstrap((values,), np.mean, n_resamples=40_000, method="percentile", rng=1).confidence_interval
    assert (high - low)[0] > 1.2 * (narrow.high - narrow.low)


@pytest.mark.parametrize("groups", [2, 3, 4, 6])
def test_intervals_over_a_few_groups_hold_the_truth_in_95_percent_of_studies_too(groups):
    studies, truth = 2000, 0.1
    differences = np.random.default_rng(4).normal(truth, 0.1, (groups, studies))
    resampled = intervals.bootstrap(differences, lambda sums: sums / groups, resamples=400, seed=0)
    reach = np.tile([[-1.0], [1.0]], studies)
    found = intervals.spread_over_seeds(
        differences.mean(axis=0)[None], resampled[:, None], np.full(studies, groups), reach
    )
    assert 0.93 < np.mean((found.low <= truth) & (truth <= found.high)) < 0.97
    assert (found.low >= -1).all() and (found.high <= 1).all()


def test_intervals_of_a_mean_are_scipys():
    values = np.random.default_rng(0).exponential(size=400)
    sums = np.stack([values, np.ones(400)], axis=1)
    low, high = intervals.percentile_interval(intervals.bootstrap(sums, rates, resamples=9999, seed=0), np.array([400]))
    wanted = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=1).confidence_interval
    assert [low[0], high[0]] == pytest.approx([wanted.low, wanted.high], abs=0.06 * (wanted.high - wanted.low))


def test_an_undefined_part_or_a_single_group_has_no_interval():
    resampled = np.stack([np.full(100, np.nan), np.arange(100.0), np.arange(100.0)], axis=1)
    low, high = intervals.percentile_interval(resampled, np.array([9, 1, 9]))
    assert np.isnan(low).tolist() == np.isnan(high).tolist() == [True, True, False]


def test_the_same_seed_draws_the_same_groups_in_chunks_of_any_size(monkeypatch):
    whole = np.concatenate(list(intervals.group_counts(7, 50, seed=3)))
    monkeypatch.setattr(intervals, "_CHUNK", 30)
    chunks = list(intervals.group_counts(7, 50, seed=3))
    assert len(chunks) > 1
    assert np.array_equal(np.concatenate(chunks), whole)
    assert (whole.sum(axis=1) == 7).all()


def test_the_bound_where_all_are_alike_is_the_exact_binomial_one():
    for n in (3, 40):
        exact = stats.binomtest(n, n).proportion_ci(method="exact").low
        assert 1 - intervals.alike_bound(n) == pytest.approx(exact)


def test_the_swap_test_is_scipys_sign_flip_test_on_a_mean():
    rng = np.random.default_rng(2)
    one, other = rng.normal(0.6, 1, 10), rng.normal(0, 1, 10)
    exact = stats.permutation_test(
        (one, other), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True
    ).pvalue
    sums = [np.stack([each, np.ones(10)], axis=1)[:, None] for each in (one, other)]
    (p_value,) = intervals.swap_test(*sums, rates, permutations=40_000, seed=0)
    assert p_value == pytest.approx(exact, abs=0.01)


def test_the_swap_test_errs_in_5_percent_of_clustered_studies_without_a_difference():
    rng, studies = np.random.default_rng(1), 4000
    own = rng.beta(1, 1, (GROUPS, studies))
    sides = []
    for _ in range(2):
        right = rng.binomial(PER_GROUP, own).astype(float)
        sides.append(np.stack([right, np.full_like(right, PER_GROUP)], axis=-1).reshape(GROUPS, 1, -1))
    p_values = intervals.swap_test(*sides, rates, permutations=499, seed=0)
    assert 0.04 < np.mean(p_values <= 0.05) <= 0.055


def test_the_smallest_p_value_is_that_of_no_swap_as_large():
    one = np.stack([np.ones(40), np.ones(40)], axis=1)[:, None]
    other = np.stack([np.zeros(40), np.ones(40)], axis=1)[:, None]
    assert intervals.swap_test(one, other, rates, permutations=999, seed=0) == pytest.approx([1 / 1000])
    assert intervals.swap_test(one, one, rates, permutations=999, seed=0) == pytest.approx([1])


def test_an_undefined_difference_has_no_p_value():
    nothing = np.zeros((5, 1, 2))
    with np.errstate(invalid="ignore"):
        assert np.isnan(intervals.swap_test(nothing, nothing, rates, permutations=9, seed=0)).all()


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_undefined_difference_has_no_p_value_over_seeds_either(seeds):
    """Else it would count among those that Holm corrects over."""
    values = np.random.default_rng(0).normal(0.1, 0.1, (300, seeds, 2))
    values[:, :, 0] = np.nan
    reach = np.array([[-1.0, -1.0], [1.0, 1.0]])
    p_value = intervals.spread_over_seeds(values[0], values, np.array([0, 30]), reach).p_value
    assert np.isnan(p_value).tolist() == [True, False]


WIDE = np.array([[-np.inf], [np.inf]])  # values of any size


def seeds_study(tau, seeds, studies, groups=50, own=0.2):
    """Whether the interval held 0, and the spread, in studies whose seeds differ by `tau`; the truth is 0."""
    rng = np.random.default_rng(4)
    common = rng.normal(0, 0.3, (groups, 1, studies))
    values = common + rng.normal(0, own, (groups, seeds, studies)) + rng.normal(0, tau, (seeds, studies))
    resampled = intervals.bootstrap(
        values.reshape(groups, -1), lambda sums: sums / groups, resamples=500, seed=0
    ).reshape(-1, seeds, studies)
    spread = intervals.spread_over_seeds(values.mean(axis=0), resampled, np.full(studies, groups), WIDE)
    return (spread.low <= 0) & (spread.high >= 0), spread


@pytest.mark.parametrize("own", [0.2, 0.4])
@pytest.mark.parametrize("tau", [0.0, 0.03, 0.06, 0.15])
@pytest.mark.parametrize("seeds, most", [(2, 0.995), (3, 0.985), (5, 0.97)])
def test_intervals_over_seeds_hold_the_truth_whether_or_not_seeds_differ(seeds, most, tau, own):
    held, spread = seeds_study(tau, seeds, studies=1500, own=own)
    assert 0.94 < held.mean() < most  # of 1,500 studies, give or take .006
    assert np.mean(spread.p_value <= 0.05) <= 0.055


def test_seeds_and_groups_without_any_difference_are_no_evidence_of_one():
    spread = intervals.spread_over_seeds(
        np.zeros((3, 1)), np.zeros((100, 3, 1)), np.array([40]), np.array([[-1.0], [1.0]])
    )
    assert spread.low[0] < 0 < spread.high[0] and spread.p_value[0] == 1


def test_the_spread_of_the_seeds_alone_has_an_interval_of_students_t():
    """Where groups tell nothing, the seeds' means are the data."""
    rng, seeds, groups = np.random.default_rng(6), 4, 40
    means = rng.normal(0.3, 1, (seeds, 1))
    resampled = np.tile(means, (300, 1, 1)) + 1e-9 * rng.normal(size=(300, 1, 1))
    spread = intervals.spread_over_seeds(means, resampled, np.array([groups]), WIDE)
    exact = stats.ttest_1samp(means[:, 0], 0)
    interval = exact.confidence_interval()
    assert [spread.low[0], spread.high[0]] == pytest.approx([interval.low, interval.high], abs=0.01)
    assert spread.p_value[0] == pytest.approx(exact.pvalue, rel=0.01)


def test_quantiles_of_a_sum_of_two_ts_are_those_of_draws():
    rng = np.random.default_rng(7)
    for scale, other, freedom in ((1.0, 0.5, 1), (0.3, 1.0, 2), (1.0, 1.0, 4), (1.0, 0.0, 1), (0.0, 1.0, 3)):
        draws = np.abs(scale * rng.standard_t(30, 400_000) + other * rng.standard_t(freedom, 400_000))
        one, two = np.array([scale]), np.array([other])
        quantile = intervals._sum_of_ts_quantile(one, two, np.array([30]), freedom)[0]
        assert quantile == pytest.approx(np.quantile(draws, 0.95), rel=0.03)
        tail = 2 * intervals._sum_of_ts_tail(np.array([quantile]), one, two, np.array([30]), freedom)[0]
        assert tail == pytest.approx(0.05, abs=0.001)


def test_one_seed_says_nothing_of_others_and_seeds_that_differ_are_noticed():
    assert not seeds_study(0.15, seeds=1, studies=50)[1].seed_variance.any()
    assert seeds_study(0.15, seeds=3, studies=400)[1].seed_variance.mean() == pytest.approx(0.15**2, rel=0.15)
    assert seeds_study(0.0, seeds=3, studies=400)[1].seed_variance.mean() < 0.02**2
    held_by_one, _ = seeds_study(0.15, seeds=1, studies=400)
    assert held_by_one.mean() < 0.6  # so a single seed's interval must not be read as one for other seeds


def test_holm_worked_by_hand():
    # sorted: .01 x4, .02 x3, .03 x2 (raised to .06), .5 x1
    assert intervals.holm([0.5, 0.01, np.nan, 0.03, 0.02]) == pytest.approx(
        [0.5, 0.04, np.nan, 0.06, 0.06], nan_ok=True
    )
    assert intervals.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert intervals.holm([0.9, 0.9]) == pytest.approx([1, 1])


def test_the_advantage_is_mean_self_minus_mean_cross_on_a_square():
    names = "abc"
    pairings = [(explainer, target) for explainer in names for target in names]
    weights = intervals.self_weights(pairings)
    assert weights == pytest.approx([1 / 3 if one == other else -1 / 6 for one, other in pairings])


def test_the_advantage_takes_out_strength_and_ease_even_with_pairings_missing():
    pairings = [(e, t) for e in "abcd" for t in "abc" if (e, t) not in {("a", "b"), ("d", "c")}]
    strength, ease = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.9}, {"a": 0.0, "b": 0.2, "c": 0.4}
    scores = [strength[e] + ease[t] + 0.07 * (e == t) for e, t in pairings]
    assert intervals.self_weights(pairings) @ scores == pytest.approx(0.07)


def test_pairings_that_cannot_tell_the_advantage_are_refused():
    with pytest.raises(ValueError, match="at least two models must explain themselves and each other"):
        intervals.self_weights([("a", "a"), ("b", "a")])


def test_a_study_as_large_as_planned_finds_the_difference_as_often_as_planned():
    rng, wanted, studies = np.random.default_rng(5), 0.1, 2000
    pilot = Pilot(group_variance=0.3**2 + 0.5**2 / PER_GROUP, questions_per_group=PER_GROUP)
    groups = intervals.questions_needed(wanted, pilot, power=0.8) // PER_GROUP
    means = rng.normal(wanted, 0.3, (groups, studies)) + rng.normal(0, 0.5 / PER_GROUP**0.5, (groups, studies))
    sums = [np.stack([each, np.ones_like(each)], -1).reshape(groups, 1, -1) for each in (means, np.zeros_like(means))]
    found = intervals.swap_test(*sums, rates, permutations=299, seed=0) <= 0.05
    assert 0.76 < found.mean() < 0.84


@pytest.mark.parametrize("seeds, tau", [(3, 0.02), (3, 0.05), (5, 0.05), (10, 0.1)])
def test_a_study_of_several_seeds_as_large_as_planned_finds_the_difference_as_often_as_planned(seeds, tau):
    """Groups of one question; what a training adds to each is a part of what groups differ by."""
    rng, studies, groups = np.random.default_rng(9), 1500, 200
    pilot = Pilot(group_variance=0.3**2 + 0.1**2, questions_per_group=1, seed_variance=tau**2)
    wanted = intervals.detectable(pilot, groups, seeds=seeds)
    common = rng.normal(wanted, 0.3, (groups, 1, studies))
    values = common + rng.normal(0, 0.1, (groups, seeds, studies)) + rng.normal(0, tau, (seeds, studies))
    resampled = intervals.bootstrap(values.reshape(groups, -1), lambda sums: sums / groups, resamples=200, seed=0)
    spread = intervals.spread_over_seeds(
        values.mean(axis=0), resampled.reshape(-1, seeds, studies), np.full(studies, groups), WIDE
    )
    assert 0.75 < np.mean(spread.p_value <= 0.05) < 0.9


def test_planning_with_seeds_that_spread_too_much_says_how_many_it_takes():
    pilot = Pilot(group_variance=0.2, questions_per_group=4, seed_variance=0.01)
    with pytest.raises(ValueError, match="train at least 10 seeds"):
        intervals.questions_needed(0.1, pilot, seeds=2)
    assert intervals.questions_needed(0.1, pilot, seeds=10) > intervals.questions_needed(0.1, pilot, seeds=20)
    with pytest.raises(ValueError, match="no number of questions shows a difference of 0"):
        intervals.questions_needed(0.0, pilot)
