import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation.comparisons import comparisons, corrected, pilot, self_advantage
from ray_explain.evaluation.intervals import alike_bound, questions_needed
from ray_explain.evaluation.metrics import GRADED, grade

N = 240


@pytest.fixture
def world(questions, answers, say):
    """The answers of made-up explainers to 240 patching questions in 60 groups."""
    rng = np.random.default_rng(0)
    facts = [
        {"group": f"g{i // 4}", "changed": bool(rng.random() < 0.4), "content": f"x{rng.integers(5)}"} for i in range(N)
    ]
    table = questions(*facts)
    truths = [say(fact["changed"], fact["content"]) for fact in facts]

    class World:
        questions = table

        @staticmethod
        def graded(explainer, share, control="none", target="a", seed=0, noise=0, fraction=1.0):
            """`explainer` is right on about `share` of the questions, the easiest ones for all."""
            rng = np.random.default_rng([noise, seed])
            ease = (np.arange(N) * 7919 % N) / N + rng.normal(0, 0.2, N) * bool(noise)
            wrong = say(True, "nonsense")
            said = [truth if each < share else wrong for each, truth in zip(ease, truths)]
            given = answers(table, said, explainer, control)
            return grade(table, given, target=target, seed=seed, fraction=fraction)

    return World


def find(table, **wanted):
    rows = [row for row in table.to_pylist() if all(row[key] == value for key, value in wanted.items())]
    assert len(rows) == 1, f"{len(rows)} rows with {wanted}"
    return rows[0]


def compare(*graded, **changes):
    return comparisons(
        pa.concat_tables(graded), **{"trained": "abc", "seed": 0, "resamples": 300, "permutations": 499, **changes}
    )


def test_a_large_difference_survives_a_correction_over_more_comparisons_than_swaps_can_tell(world):
    others = [world.graded(f"lookup {i}", 0.4, noise=i + 1) for i in range(12)]
    table = compare(world.graded("a", 0.9, noise=20), *others, permutations=19)
    row = find(table, contrast="over_baseline", against="lookup 0", metric="exact_match", by="all")
    assert row["p_value"] < 1e-4 and row["p_holm"] < 0.01
    even = compare(world.graded("a", 0.4, noise=20), others[0], permutations=19)
    assert find(even, contrast="over_baseline", metric="exact_match", by="all")["p_value"] > 0.05


def test_an_explainer_that_ignores_vectors_has_no_uplift_over_any_control(world):
    controls = ("shuffled", "no_vector", "other_layer", "random")
    blind = [world.graded("a", 0.6, control) for control in ("none", *controls)]
    table = compare(*blind)
    for control in controls:
        row = find(table, contrast="uplift", against=control, metric="exact_match", by="all")
        assert (row["difference"], row["p_value"], row["p_holm"]) == (0, 1, 1)
        assert -row["low"] == row["high"] == pytest.approx(alike_bound(row["n_groups"]))  # in groups not asked


def test_an_oracles_uplift_is_its_accuracy_minus_the_controls(world):
    table = compare(world.graded("a", 2), world.graded("a", 0.3, "shuffled"))
    row = find(table, contrast="uplift", against="shuffled", metric="exact_match", by="all")
    assert row["difference"] == pytest.approx(1 - 0.3)
    assert row["low"] < 0.7 < row["high"]
    assert row["p_value"] < 1e-9  # of 499 swaps none came near
    assert (row["n"], row["n_groups"], row["seeds"]) == (N, 60, 1)


def test_the_target_is_compared_with_each_other_explainer_and_all_with_baselines(world):
    table = compare(world.graded("a", 0.7), world.graded("b", 0.5), world.graded("majority", 0.2))
    pairs = {(row["contrast"], row["explainer"], row["against"]) for row in table.to_pylist()}
    assert pairs == {
        ("self_minus_cross", "a", "b"),
        ("over_baseline", "a", "majority"),
        ("over_baseline", "b", "majority"),
    }
    row = find(table, contrast="self_minus_cross", metric="exact_match", by="all")
    assert row["difference"] == pytest.approx(0.2)


def test_a_target_that_nobody_but_others_explains_has_no_self(world):
    table = compare(world.graded("b", 0.7), world.graded("c", 0.5))
    assert table.num_rows == 0


def test_the_paired_interval_is_narrower_than_that_of_the_scores(world):
    table = compare(world.graded("a", 0.6), world.graded("b", 0.5))
    row = find(table, metric="exact_match", by="all")
    unpaired = 2 * 1.96 * (2 * 0.25 / N) ** 0.5
    assert row["high"] - row["low"] < 0.8 * unpaired


def test_f1_is_undefined_within_a_class_and_never_nan(world):
    table = compare(world.graded("a", 0.6), world.graded("b", 0.5))
    row = find(table, metric="changed_f1", by="changed=true")
    assert [row[name] for name in ("difference", "low", "high", "p_value", "p_holm")] == [None] * 5
    assert all(value == value for row in table.to_pylist() for value in row.values())


def test_seeds_are_pooled_and_their_spread_widens_the_interval(world):
    def study(*shares):
        selves = [world.graded("a", share, seed=seed) for seed, share in enumerate(shares)]
        return find(
            compare(*selves, *[world.graded("b", 0.5, seed=seed) for seed in range(len(shares))]),
            metric="exact_match",
            by="all",
        )

    alike, apart = study(0.6, 0.6, 0.6), study(0.4, 0.6, 0.8)
    assert alike["difference"] == pytest.approx(apart["difference"]) == pytest.approx(0.1)
    assert alike["seeds"] == apart["seeds"] == 3
    assert apart["high"] - apart["low"] > 3 * (alike["high"] - alike["low"])
    assert alike["p_value"] < 0.05 < 0.2 < apart["p_value"]


def test_a_baseline_without_seeds_stands_against_every_seed(world):
    table = compare(
        *[world.graded("a", share, seed=seed) for seed, share in [(3, 0.5), (4, 0.7)]], world.graded("majority", 0.2)
    )
    row = find(table, contrast="over_baseline", metric="exact_match", by="all")
    assert (row["difference"], row["seeds"]) == (pytest.approx(0.4), 2)


def test_a_baseline_that_was_trained_once_stands_against_that_seed_alone(world):
    """Else the interval would seem to hold the draw of seeds, of which one side has but one."""
    own = [world.graded("a", share, seed=seed) for seed, share in [(0, 0.5), (1, 0.7)]]
    table = compare(*own, world.graded("text only", 0.2, seed=1))
    row = find(table, contrast="over_baseline", metric="exact_match", by="all")
    assert (row["difference"], row["seeds"]) == (pytest.approx(0.5), 1)


def test_trained_explainers_without_a_common_seed_are_not_compared_and_others_are(world):
    """At a share of the data where trials failed, say: the other shares have their report all the same."""
    unlike = [world.graded("a", 0.5, fraction=0.1), world.graded("b", 0.5, seed=1, fraction=0.1)]
    assert not compare(*unlike).num_rows
    found = compare(*unlike, *[world.graded(name, 0.5) for name in "ab"], world.graded("majority", 0.2, fraction=0.1))
    kinds = {(row["fraction"], row["contrast"]) for row in found.to_pylist()}
    assert kinds == {(1.0, "self_minus_cross"), (0.1, "over_baseline")}
    with pytest.raises(ValueError, match="'a' and 'b' of 'a' have no seed in common"):
        pilot(pa.concat_tables(unlike), task="patching", target="a", explainer="a", against="b", fraction=0.1, seed=0)


def test_answers_to_different_questions_are_not_compared(world):
    with pytest.raises(BadInput, match="different questions"):
        compare(world.graded("a", 0.5), world.graded("b", 0.5).slice(0, N - 40))


def test_the_order_of_rows_changes_nothing(world):
    graded = pa.concat_tables([world.graded("a", 0.6), world.graded("b", 0.5), world.graded("a", 0.4, "random")])
    mixed = graded.take(np.random.default_rng(0).permutation(graded.num_rows))
    assert compare(mixed).equals(compare(graded))


def test_holm_corrects_over_the_matrix_of_one_contrast_metric_and_part():
    rows = [
        {
            "task": "patching",
            "fraction": fraction,
            "contrast": contrast,
            "metric": "exact_match",
            "by": by,
            "p_value": p,
        }
        for contrast, by, p, fraction in [
            ("uplift", "all", 0.01, 1.0),
            ("uplift", "all", 0.04, 1.0),
            ("uplift", "changed=true", 0.04, 1.0),
            ("uplift", "changed=false", None, 1.0),
            ("self_minus_cross", "all", 0.03, 1.0),
            ("uplift", "all", 0.02, 0.5),
        ]
    ]
    assert [row["p_holm"] for row in corrected(rows)] == [0.02, 0.04, 0.04, None, 0.03, 0.02]


def test_explainers_are_compared_at_the_same_fraction_of_the_data_alone(world):
    given = [("a", 0.8, 1.0), ("b", 0.5, 1.0), ("a", 0.6, 0.25), ("b", 0.5, 0.25), ("untrained", 0.1, 0.0)]
    table = compare(*(world.graded(name, share, fraction=fraction) for name, share, fraction in given))
    for fraction, self_minus_cross, over_untrained in [(1.0, 0.3, 0.7), (0.25, 0.1, 0.5)]:
        here = {"fraction": fraction, "explainer": "a", "metric": "exact_match", "by": "all"}
        assert find(table, contrast="self_minus_cross", **here)["difference"] == pytest.approx(self_minus_cross)
        assert find(table, contrast="over_baseline", **here)["difference"] == pytest.approx(over_untrained)
    assert set(table["fraction"].to_pylist()) == {1.0, 0.25}


def test_a_smaller_fraction_beside_it_changes_nothing_at_the_whole(world):
    whole = [world.graded("a", 0.7, noise=1), world.graded("b", 0.5, noise=2), world.graded("majority", 0.2)]
    alone, beside = compare(*whole), compare(*whole, world.graded("a", 0.4, fraction=0.5))
    at_whole = [row for row in beside.to_pylist() if row["fraction"] == 1]
    assert alone.to_pylist() == at_whole


def test_a_pilot_foretells_the_interval_of_a_study_of_its_own_size(world):
    graded = pa.concat_tables([world.graded("a", 0.6, noise=1), world.graded("b", 0.5, noise=2)])
    row = find(compare(graded), metric="exact_match", by="all")
    known = pilot(graded, task="patching", target="a", explainer="a", against="b", seed=0)
    assert (known.questions_per_group, known.seed_variance) == (4, 0)
    half = (row["high"] - row["low"]) / 2
    # a true difference of half an interval's width is found every second time
    assert questions_needed(half, known, power=0.5) == pytest.approx(N, rel=0.25)


def test_a_pilot_notices_that_seeds_differ_and_says_what_is_missing(world):
    selves = [world.graded("a", share, seed=seed) for seed, share in enumerate((0.4, 0.6, 0.8))]
    graded = pa.concat_tables([*selves, *[world.graded("b", 0.5, seed=seed) for seed in range(3)]])
    known = pilot(graded, task="patching", target="a", explainer="a", against="b", seed=0, resamples=300)
    assert known.seed_variance == pytest.approx(0.04, rel=0.1)
    with pytest.raises(ValueError, match="no answers of 'c' to patching questions about 'a'"):
        pilot(graded, task="patching", target="a", explainer="a", against="c", seed=0, resamples=300)


def test_strength_and_ease_alone_are_no_advantage(world):
    def square(bonus):
        strength, ease = {"a": 0.1, "b": 0.3}, {"a": 0.2, "b": 0.4}
        return pa.concat_tables(
            [
                world.graded(e, strength[e] + ease[t] + bonus * (e == t), target=t, noise=1 + i + 2 * j)
                for i, e in enumerate("ab")
                for j, t in enumerate("ab")
            ]
        )

    (none,), (some,) = (self_advantage(square(bonus), seed=0, resamples=500) for bonus in (0.0, 0.2))
    assert none["low"] < 0 < none["high"] and none["p_value"] > 0.05
    assert some["low"] > 0.05 and some["p_value"] < 0.001
    assert some["difference"] == pytest.approx(0.2, abs=0.07)
    assert (some["task"], some["n_groups"], some["seeds"]) == ("patching", 60, 1)


def test_a_task_that_no_target_explains_has_no_advantage(world):
    assert self_advantage(world.graded("majority", 0.5), seed=0) == []


def test_a_task_without_a_square_or_a_common_seed_has_no_advantage(world):
    lone = pa.concat_tables([world.graded("a", 0.5), world.graded("b", 0.5)])
    assert self_advantage(lone, seed=0, resamples=100) == []
    unlike = [world.graded(e, 0.5, target=t, seed=int(e == "a" and t == "b")) for e in "ab" for t in "ab"]
    assert self_advantage(pa.concat_tables(unlike), seed=0, resamples=100) == []


def test_an_advantage_is_that_at_the_largest_share_that_all_pairings_know(world):
    known = [(e, t, f) for e in "ab" for t in "ab" for f in (0.1, 0.3, 1.0) if (e, t, f) != ("a", "b", 1.0)]
    square = pa.concat_tables([world.graded(e, 0.5 * f, target=t, fraction=f) for e, t, f in known])
    (row,) = self_advantage(square, seed=0, resamples=100)
    assert (row["fraction"], row["metric"]) == (0.3, "exact_match")


def test_the_advantage_of_scored_descriptions_is_on_their_score(questions, answers):
    """No description is worded as the right one; `simulated` is higher by .2 where models explain themselves."""
    table = questions(*({"task": "features", "group": f"g{i}"} for i in range(20)))

    def graded(explainer, target):
        made = grade(table, answers(table, ["x"] * 20, explainer), target=target, seed=0)
        score = pa.array([0.3 + 0.01 * i + 0.2 * (explainer == target) for i in range(20)])
        return made.set_column(made.column_names.index("simulated"), "simulated", score)

    (row,) = self_advantage(pa.concat_tables([graded(e, t) for e in "ab" for t in "ab"]), seed=0, resamples=100)
    assert (row["metric"], row["difference"]) == ("simulated", pytest.approx(0.2))


@pytest.fixture
def marked(questions, answers):
    """The answers of an explainer to 20 questions about features, each in a group of its own, with these marks."""
    table = questions(*({"task": "features", "group": f"g{i}"} for i in range(20)))

    def make(explainer, marks, target="a"):
        made = grade(table, answers(table, ["x"] * 20, explainer), target=target, seed=0)
        return made.set_column(made.column_names.index("judged"), "judged", pa.array(marks, pa.float64()))

    return make


MARKS = [0.9 if i % 2 else 0.3 for i in range(20)]
# lower by .1 on each question; no mark on the hard half, which alone would make it win
WITHOUT_THE_HARD = [mark - 0.1 if mark > 0.5 else None for mark in MARKS]


def test_what_one_side_has_no_score_for_is_left_out_on_both(marked):
    row = find(compare(marked("a", MARKS), marked("b", WITHOUT_THE_HARD)), metric="judged", by="all")
    assert (row["difference"], row["n"], row["n_groups"]) == (pytest.approx(0.1), 10, 10)


def test_vectors_without_labels_have_an_advantage_where_a_detector_alone_marks_answers(marked):
    told = {True: MARKS, False: [mark - 0.1 for mark in MARKS]}
    graded = pa.concat_tables([marked(e, told[e == t], t) for e in "ab" for t in "ab"])
    bare = dict.fromkeys(("exact", "similarity", "judged"))
    rows = [row | bare | {"detection": row["judged"]} for row in graded.to_pylist()]
    (row,) = self_advantage(records.rows_table(rows, GRADED), seed=0, resamples=100)
    assert (row["metric"], row["difference"]) == ("detection", pytest.approx(0.1))


def test_what_one_explainer_of_a_target_has_no_score_for_is_left_out_of_an_advantage(marked):
    told = {True: MARKS, False: WITHOUT_THE_HARD}
    (row,) = self_advantage(
        pa.concat_tables([marked(e, told[e == t], t) for e in "ab" for t in "ab"]), seed=0, resamples=100
    )
    assert (row["difference"], row["n_groups"]) == (pytest.approx(0.1), 10)


def test_a_target_that_all_explainers_are_scored_on_keeps_its_questions_in_an_advantage(marked):
    """Of `b` nothing is missing; that the questions about `a` are fewer then moves only what is of `a`."""
    told = {"aa": MARKS, "ba": WITHOUT_THE_HARD, "bb": MARKS, "ab": [mark - 0.1 for mark in MARKS]}
    (row,) = self_advantage(pa.concat_tables([marked(e, told[e + t], t) for e, t in told]), seed=0, resamples=100)
    assert row["difference"] == pytest.approx(0.1)
    told["bb"] = [mark + 0.2 * (mark < 0.5) for mark in MARKS]  # on the hard half, which `a` lost
    (row,) = self_advantage(pa.concat_tables([marked(e, told[e + t], t) for e, t in told]), seed=0, resamples=100)
    assert row["difference"] == pytest.approx(0.1 + 0.1 / 2)


def test_advantages_are_corrected_over_their_tasks():
    rows = [
        {"task": task, "fraction": 1.0, "contrast": "advantage", "metric": "exact_match", "by": "all", "p_value": p}
        for task, p in (("patching", 0.03), ("ablation", 0.04), ("features", None))
    ]
    rows[1] |= {"fraction": 0.3, "metric": "simulated"}  # each task has its own share and headline
    assert [row["p_holm"] for row in corrected(rows)] == [pytest.approx(0.06), pytest.approx(0.06), None]
