from dataclasses import replace

from ray_explain.distributed.power import told
from ray_explain.evaluation.power import Need, Size

SIZE = Size(
    task="features",
    target="a",
    against="b",
    fraction=1.0,
    metric="simulated",
    questions=400,
    seeds=1,
    seed_variance=None,
    n_tests=1,
    detectable=0.042,
    needs=[Need(wanted=0.05, questions=282, seeds=1)],
)


def test_what_a_study_finds_is_told_in_the_metric_that_it_is_judged_on():
    assert told(SIZE) == [
        "feature descriptions, simulator correlation, a itself against b (400 questions, 1 seed): finds +.042 or more",
        "  +.05 needs 282 questions",
    ]
    (head, _) = told(replace(SIZE, fraction=0.3))
    assert "against b, at 30\u202f% of the training data (400" in head


def test_two_that_differ_by_nothing_are_not_called_right():
    (line,) = told(replace(SIZE, detectable=None, needs=[]))
    assert line.endswith(
        ": they answered alike, or differ by the same in every group; that says nothing of what it takes"
    )
