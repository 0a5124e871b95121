import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from ray_explain.evaluation import power
from ray_explain.evaluation.intervals import Pilot, detectable, questions_needed
from ray_explain.evaluation.metrics import grade
from ray_explain.evaluation.power import WANTED, sizes

N = 240


@pytest.fixture
def graded(questions, answers, say):
    """Two explainers of target "a" with the seeds given, right on about the shares given."""
    rng = np.random.default_rng(0)
    table = questions(*[{"group": f"g{i // 4}", "changed": bool(rng.random() < 0.4)} for i in range(N)])
    truths = table["answer"].to_pylist()

    def make(**shares):
        parts = []
        for name, by_seed in shares.items():
            for seed, share in enumerate(by_seed):
                right = np.random.default_rng([seed, len(name), ord(name[0])]).random(N) < share
                said = [truth if hit else say(True, "nonsense") for truth, hit in zip(truths, right)]
                parts.append(grade(table, answers(table, said, name), target="a", seed=seed))
        return pa.concat_tables(parts)

    return make


def test_what_a_study_finds_is_what_needs_a_study_of_its_size():
    for pilot, seeds in ((Pilot(0.3, 4.0), 1), (Pilot(0.3, 4.0, 0.0004), 3)):
        difference = detectable(pilot, 600, seeds=seeds)
        assert questions_needed(difference, pilot, seeds=seeds) == pytest.approx(600, abs=1)


def test_each_other_explainer_of_a_target_that_explains_itself_is_planned_for(graded):
    (plan,) = sizes(graded(a=[0.7], b=[0.5]), ["a", "b"], seed=0, resamples=300)
    assert (plan.task, plan.target, plan.against, plan.questions, plan.seeds) == ("patching", "a", "b", N, 1)
    assert plan.seed_variance is None and 0.05 < plan.detectable < 0.2
    assert [need.wanted for need in plan.needs] == list(WANTED)
    needed = [need.questions for need in plan.needs]
    assert needed == sorted(needed, reverse=True) and needed[0] == pytest.approx(25 * needed[2], rel=0.02)
    assert not list(sizes(graded(b=[0.5], c=[0.5]), ["b", "c"], seed=0, resamples=300))
    assert not list(sizes(graded(a=[0.7], majority=[0.5]), ["a"], seed=0, resamples=300))


def test_more_comparisons_of_a_task_take_more_questions_each(graded):
    """Where three are made, the best of them has to be below 5 % / 3 to survive Holm's correction."""
    alone, *_ = sizes(graded(a=[0.7], b=[0.5]), ["a", "b"], seed=0, resamples=300)
    first, *others = sizes(graded(a=[0.7], b=[0.5], c=[0.5], d=[0.5]), ["a", "b", "c", "d"], seed=0, resamples=300)
    assert (alone.n_tests, first.n_tests, len(others)) == (1, 3, 2)
    larger = ((2.394 + 0.842) / (1.960 + 0.842)) ** 2  # quantiles of 1 - .05 / 6 and 1 - .05 / 2, and of .8
    assert first.needs[0].questions == pytest.approx(larger * alone.needs[0].questions, rel=0.01)


def test_seeds_that_differ_much_are_told_to_be_the_thing_that_is_missing(graded):
    (plan,) = sizes(graded(a=[0.4, 0.6, 0.8], b=[0.5, 0.5, 0.5]), ["a", "b"], seed=0, resamples=300)
    assert plan.seeds == 3 and plan.seed_variance == pytest.approx(0.04, rel=0.5)
    small = plan.needs[0]
    assert small.questions is None and small.seeds is None


def test_a_study_of_one_seed_is_not_recommended_to_a_pilot_of_several():
    """It says nothing of others, so that its differences look the surest: .096 would be found, with two seeds .228."""
    differ, alike = Pilot(0.1, 4.0, 0.0005), Pilot(0.1, 4.0)
    assert detectable(differ, 600, seeds=1) < 0.1 < detectable(differ, 600, seeds=2)
    for pilot, seeds, needed in [(differ, 3, 3), (alike, 3, 2), (alike, 1, 1)]:
        assert power._need(0.1, pilot, 600, seeds, alpha=0.05).seeds == needed


def test_explainers_are_planned_for_at_the_largest_share_that_both_know(graded):
    whole = graded(a=[0.7], b=[0.5])
    at = whole.schema.get_field_index("fraction")
    part = whole.set_column(at, whole.schema.field(at), pa.array([0.3] * whole.num_rows))
    only_a = whole.filter(pc.equal(whole["explainer"], "a"))
    (plan,) = sizes(pa.concat_tables([part, only_a]), ["a", "b"], seed=0, resamples=100)
    assert (plan.fraction, plan.against) == (0.3, "b")
    other = part.filter(pc.equal(part["explainer"], "b"))
    assert not list(sizes(pa.concat_tables([other, only_a]), ["a", "b"], seed=0, resamples=100))


def test_scored_descriptions_are_planned_for_on_their_score(questions, answers):
    """Both never say the right words, which would say that nothing differs; their scores do."""
    table = questions(*({"task": "features", "group": f"g{i // 2}"} for i in range(80)))
    rng = np.random.default_rng(0)

    def graded(name):
        made = grade(table, answers(table, ["x"] * 80, name), target="a", seed=0)
        return made.set_column(made.column_names.index("judged"), "judged", pa.array(rng.random(80)))

    (plan,) = sizes(pa.concat_tables([graded("a"), graded("b")]), ["a", "b"], seed=0, resamples=300)
    assert plan.metric == "judged"
    assert plan.detectable == pytest.approx((1.96 + 0.84) * np.sqrt(2 / 12 / 80), rel=0.25)


def test_questions_without_a_score_do_not_count_as_those_of_the_pilot(questions, answers):
    """A study with half of its marks missing finds what one of half its size finds."""
    table = questions(*({"task": "features", "group": f"g{i}"} for i in range(80)))

    def graded(name, unscored):
        made = grade(table, answers(table, ["x"] * 80, name), target="a", seed=0)
        marks = [None if i in unscored else mark for i, mark in enumerate(np.random.default_rng(ord(name)).random(80))]
        return made.set_column(made.column_names.index("judged"), "judged", pa.array(marks, pa.float64()))

    (plan,) = sizes(pa.concat_tables([graded("a", range(30)), graded("b", range(10, 40))]), ["a", "b"], seed=0)
    assert plan.questions == 40
    assert plan.detectable == pytest.approx((1.96 + 0.84) * np.sqrt(2 / 12 / 40), rel=0.25)


def test_two_that_answer_alike_say_nothing_of_what_it_takes(graded):
    (plan,) = sizes(graded(a=[1.0], b=[1.0]), ["a", "b"], seed=0, resamples=300)
    assert plan.detectable is None and not plan.needs
