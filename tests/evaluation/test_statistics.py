"""What the statistics promise, on simulated pairing matrices whose truth is known: three models explain each other.

An answer is right with a probability made of the explainer's strength, the target's ease, the advantage of explaining
oneself, and what all answers about a group of questions have in common.
"""

from dataclasses import replace

import numpy as np
import pytest

from ray_explain.evaluation import comparisons, intervals
from ray_explain.evaluation.intervals import Pilot, holm, questions_needed
from ray_explain.evaluation.metrics import METRICS, Part, Tally

MODELS, GROUPS, PER_GROUP = 3, 60, 4
PAIRINGS = [(str(e), str(t)) for e in range(MODELS) for t in range(MODELS)]
STRENGTH, EASE = np.array([0.0, 0.1, 0.2]), np.array([0.0, 0.05, 0.1])


def matrix(rng, advantage, groups=GROUPS, luck=0.0):
    """Right answers of each group of questions: [groups of each target, explainers, targets]."""
    common = rng.normal(0, 0.12, (groups, 1, MODELS))
    p = 0.3 + STRENGTH[:, None] + EASE + advantage * np.eye(MODELS) + luck + common
    return rng.binomial(PER_GROUP, np.clip(p, 0, 1)).astype(float)


def tallied(right):
    """One explainer's answers about one target, as `metrics.tally` sums up exact matches over the groups."""
    exact = next(metric for metric in METRICS if metric.name == "exact_match")
    sums = np.stack([right, np.full(len(right), float(PER_GROUP))], axis=1)
    n = PER_GROUP * len(right)
    part = Part(metric=exact, by="all", columns=slice(0, 2), n=n, n_groups=len(right), unparsed=0)
    return Tally(groups=[f"g{i:03}" for i in range(len(right))], sums=sums, parts=[part])


def advantage_of(seeds):
    """`comparisons.self_advantage` of matrices, one for each seed; the groups of each target are its own."""
    cells = {}
    for explainer, target in PAIRINGS:
        cells[explainer, target] = {
            seed: replace(tally, groups=[f"{target} {name}" for name in tally.groups])
            for seed, right in enumerate(seeds)
            for tally in [tallied(right[:, int(explainer), int(target)])]
        }
    return comparisons._advantage(cells, "exact_match", "all", resamples=300, seed=0)


@pytest.mark.parametrize("advantage", [0.0, 0.1])
def test_the_difference_in_differences_holds_the_true_advantage_in_95_percent_of_matrices(advantage):
    rng = np.random.default_rng(1)
    made = [advantage_of([matrix(rng, advantage)]) for _ in range(1000)]
    assert 0.93 < np.mean([row["low"] <= advantage <= row["high"] for row in made]) < 0.97
    assert np.mean([row["difference"] for row in made]) == pytest.approx(advantage, abs=0.005)
    if not advantage:
        assert np.mean([row["p_value"] <= 0.05 for row in made]) <= 0.055


def test_the_difference_in_differences_over_seeds_holds_the_truth_where_trainings_differ():
    """Each training of an explainer is a little better or worse at everything about a target."""
    rng, held, found = np.random.default_rng(4), [], []
    for _ in range(250):
        lucky = rng.normal(0, 0.06, (3, MODELS, MODELS))
        row = advantage_of([matrix(rng, 0.1, luck=each) for each in lucky])
        held.append(row["low"] <= 0.1 <= row["high"])
        none = advantage_of([matrix(rng, 0.0, luck=each) for each in lucky])
        found.append(none["p_value"] <= 0.05)
    assert np.mean(held) > 0.93 and np.mean(found) <= 0.055


F1 = next(metric for metric in METRICS if metric.name == "changed_f1")


def verdicts(rng, groups, studies, changed, skills):
    """The columns of F1, [groups, studies, explainers, 6], of explainers of these skills who answer the same questions.

    Groups differ in how often their answers change, and in how hard they are for everybody.
    """
    own = rng.beta(3 * changed, 3 * (1 - changed), (groups, studies))
    n_changed, common = rng.binomial(PER_GROUP, own), rng.normal(0, 0.15, (groups, studies))
    columns = []
    for skill in skills:
        sizes = n_changed, PER_GROUP - n_changed
        found = [rng.binomial(size, np.clip(skill + more + common, 0, 1)) for size, more in zip(sizes, (0, 0.05))]
        falsely = [size - hits for size, hits in zip(sizes, found)][::-1]
        columns.append(np.stack([part for of_class in zip(found, sizes, falsely) for part in of_class], axis=-1))
    return np.stack(columns, axis=2).astype(float)


@pytest.mark.parametrize("groups", [60, 150])
@pytest.mark.parametrize("changed", [0.1, 0.3, 0.5])
def test_f1_of_one_training_and_its_difference_from_another_hold_the_truth_in_95_percent_of_studies(groups, changed):
    rng, studies, skills = np.random.default_rng(5), 2000, (0.75, 0.6)
    truth = F1.value(verdicts(rng, 400_000, 1, changed, skills).sum(axis=0)[0])
    seen = verdicts(rng, groups, studies, changed, skills)
    sums = seen.reshape(groups, -1)

    def values(sums):
        return F1.value(sums.reshape(*sums.shape[:-1], 2 * studies, 6))

    resampled = intervals.bootstrap(sums, values, resamples=400, seed=0)
    told = (seen[:, :, 0, list(F1.counts)] > 0).sum(axis=0).min(axis=-1)  # groups with the rarer class
    low, high = intervals.percentile_interval(resampled, np.repeat(told, 2))
    assert 0.93 < np.mean((low <= np.tile(truth, studies)) & (np.tile(truth, studies) <= high)) < 0.97
    observed, pairs = values(sums.sum(axis=0)).reshape(studies, 2), resampled.reshape(-1, studies, 2)
    difference, known = -np.diff(observed)[:, 0], -np.diff(pairs)[:, None, :, 0]
    spread = intervals.spread_over_seeds(difference[None], known, told, np.tile([[-1.0], [1.0]], studies))
    wanted = truth[0] - truth[1]
    assert 0.93 < np.mean((spread.low <= wanted) & (wanted <= spread.high)) < 0.97


@pytest.mark.parametrize("equal", [True, False])
def test_one_training_against_another_holds_the_true_difference_of_right_answers_in_95_percent_of_studies(equal):
    rng, studies, groups = np.random.default_rng(6), 2000, 60
    common = rng.normal(0, 0.15, (groups, studies))
    skills = np.array([0.55, 0.55 if equal else 0.45])
    p = np.clip(skills + common[..., None] + rng.normal(0, 0.05, (groups, studies, 2)), 0, 1)
    rates = rng.binomial(PER_GROUP, p) / PER_GROUP
    differences = rates[..., 0] - rates[..., 1]
    resampled = intervals.bootstrap(differences, lambda sums: sums / groups, resamples=1000, seed=0)
    spread = intervals.spread_over_seeds(
        differences.mean(axis=0)[None],
        resampled[:, None],
        np.full(studies, groups),
        np.tile([[-1.0], [1.0]], studies),
    )
    wanted = skills[0] - skills[1]
    assert 0.93 < np.mean((spread.low <= wanted) & (wanted <= spread.high)) < 0.97
    if equal:
        assert np.mean(spread.p_value <= 0.05) <= 0.055


def self_minus_cross(right, permutations=199):
    """p-values of each target against each other explainer, as `comparisons` tests them."""
    p_values = []
    for explainer in range(MODELS):
        for target in range(MODELS):
            if explainer != target:
                sides = [
                    np.stack([right[:, who, target], np.full(len(right), float(PER_GROUP))], axis=1)[:, None]
                    for who in (target, explainer)
                ]
                p_values.append(intervals.swap_test(*sides, _rate, permutations=permutations, seed=0)[0])
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


def test_a_matrix_planned_for_the_smallest_of_holms_p_values_finds_its_one_difference_as_often_as_planned():
    """Three models explain each other equally well but for one pair; six comparisons are corrected together."""
    rng, wanted, tests = np.random.default_rng(7), 0.1, MODELS * (MODELS - 1)
    rates = np.full((MODELS, MODELS), 0.4)
    rates[1, 0] -= wanted  # all others are level with self

    def study(groups):
        p = np.clip(rates + rng.normal(0, 0.12, (groups, 1, MODELS)), 0, 1)
        return rng.binomial(PER_GROUP, p).astype(float)

    large = study(4000)
    pilot = Pilot(
        group_variance=float(((large[:, 0, 0] - large[:, 1, 0]) / PER_GROUP).var()), questions_per_group=PER_GROUP
    )
    groups = round(questions_needed(wanted, pilot, power=0.8, alpha=0.05 / tests) / PER_GROUP)
    found, others = [], []
    for _ in range(600):
        # `self_minus_cross` goes through explainers, then targets: explainer 1 of target 0 is the third of six.
        corrected = holm(self_minus_cross(study(groups), permutations=999))
        found.append(corrected[2] <= 0.05)
        others.append(np.delete(corrected, 2).min() <= 0.05)
    assert 0.75 < np.mean(found) < 0.85
    assert np.mean(others) <= 0.055
