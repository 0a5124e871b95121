"""What the statistics promise, on simulated pairing matrices whose truth is known: three models explain each other.

An answer is right with a probability made of the explainer's strength, the target's ease, the advantage of explaining
oneself, and what all answers about a group of questions have in common.
"""

import numpy as np
import pytest

from ray_explain.evaluation import intervals
from ray_explain.evaluation.intervals import Pilot, holm, questions_needed

MODELS, GROUPS, PER_GROUP = 3, 60, 4
PAIRINGS = [(str(e), str(t)) for e in range(MODELS) for t in range(MODELS)]
STRENGTH, EASE = np.array([0.0, 0.1, 0.2]), np.array([0.0, 0.05, 0.1])


def matrix(rng, advantage, groups=GROUPS):
    """Right answers of each group of questions: [groups of each target, explainers, targets]."""
    common = rng.normal(0, 0.12, (groups, 1, MODELS))
    p = 0.3 + STRENGTH[:, None] + EASE + advantage * np.eye(MODELS) + common
    return rng.binomial(PER_GROUP, np.clip(p, 0, 1)).astype(float)


def difference_in_differences(right):
    """Estimate and interval, as `comparisons.self_advantage` has them: groups of one target resampled together."""
    weights = intervals.self_weights(PAIRINGS)
    groups = len(right)
    sums = np.zeros((MODELS * groups, len(PAIRINGS)))
    for i, (explainer, target) in enumerate(PAIRINGS):
        sums[int(target) * groups : (int(target) + 1) * groups, i] = right[:, int(explainer), int(target)]
    asked = np.zeros((MODELS * groups, len(PAIRINGS)))
    for i, (_, target) in enumerate(PAIRINGS):
        asked[int(target) * groups : (int(target) + 1) * groups, i] = PER_GROUP
    both = np.concatenate([sums, asked], axis=1)

    def values(total):
        return ((total[..., : len(PAIRINGS)] / total[..., len(PAIRINGS) :]) @ weights)[..., None]

    resampled = intervals.bootstrap(both, values, resamples=400, seed=0)[:, :, None]
    spread = intervals.spread_over_seeds(values(both.sum(axis=0))[None], resampled, np.array([len(both)]))
    return spread.difference[0], spread.low[0], spread.high[0], spread.p_value[0]


@pytest.mark.parametrize("advantage", [0.0, 0.1])
def test_the_difference_in_differences_holds_the_true_advantage_in_95_percent_of_matrices(advantage):
    rng = np.random.default_rng(1)
    made = np.array([difference_in_differences(matrix(rng, advantage)) for _ in range(1000)])
    held = np.mean((made[:, 1] <= advantage) & (advantage <= made[:, 2]))
    assert 0.93 < held < 0.97
    assert made[:, 0].mean() == pytest.approx(advantage, abs=0.005)
    if not advantage:
        assert np.mean(made[:, 3] <= 0.05) <= 0.055


def self_minus_cross(right):
    """p-values of each target against each other explainer, as `comparisons` tests them."""
    p_values = []
    for explainer in range(MODELS):
        for target in range(MODELS):
            if explainer != target:
                sides = [
                    np.stack([right[:, who, target], np.full(len(right), float(PER_GROUP))], axis=1)[:, None]
                    for who in (target, explainer)
                ]
                p_values.append(intervals.swap_test(*sides, _rate, permutations=199, seed=0)[0])
    return np.array(p_values)


def _rate(sums):
    return sums[..., :1] / sums[..., 1:]


def test_in_a_matrix_without_any_difference_holm_finds_one_in_at_most_5_percent():
    rng, studies = np.random.default_rng(2), 1000
    common = rng.normal(0, 0.15, (studies, GROUPS, 1, MODELS))
    right = rng.binomial(PER_GROUP, np.clip(0.5 + common + np.zeros((1, 1, MODELS, 1)), 0, 1)).astype(float)
    p_values = [self_minus_cross(each) for each in right]
    alone = np.mean([p.min() <= 0.05 for p in p_values])
    corrected = np.mean([holm(p).min() <= 0.05 for p in p_values])
    assert corrected <= 0.055 < 0.15 < alone


def test_a_matrix_as_large_as_planned_finds_the_advantage_as_often_as_planned():
    """Planned from the spread of a pilot matrix for one comparison of self and cross of equal strength."""
    rng, wanted = np.random.default_rng(3), 0.1

    def study(groups):
        p = np.clip(0.4 + rng.normal(0, 0.12, (groups, 1)) + np.array([wanted, 0.0]), 0, 1)
        return rng.binomial(PER_GROUP, p).astype(float)

    difference = np.subtract(*study(4000).T) / PER_GROUP
    pilot = Pilot(group_variance=float(difference.var()), questions_per_group=PER_GROUP)
    groups = round(questions_needed(wanted, pilot, power=0.8) / PER_GROUP)
    found = []
    for _ in range(1000):
        sides = [np.stack([each, np.full(groups, float(PER_GROUP))], axis=1)[:, None] for each in study(groups).T]
        found.append(intervals.swap_test(*sides, _rate, permutations=199, seed=0)[0] <= 0.05)
    assert 0.75 < np.mean(found) < 0.85
