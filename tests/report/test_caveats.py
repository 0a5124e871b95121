import pytest

from ray_explain.report.caveats import caveats
from ray_explain.report.estimates import Scores


def told(data) -> str:
    return "\n".join(f"{it.title} {it.text}" for it in caveats(data, Scores(data)))


def test_a_lookup_that_knows_whether_is_held_against_has_changed_f1(report) -> None:
    text = told(report())
    assert (
        "The baseline “majority class” reaches .81 on activation patching, the best model that explains itself .86: "
        "where a patch sits alone tells about as much of whether the answer will change, or more." in text
    )
    assert "headline is therefore exact match" in text


@pytest.mark.parametrize(("constant", "own", "near"), [(0.41, 0.86, False), (0.75, 0.86, False), (0.78, 0.86, True)])
def test_a_lookup_that_does_not_know_whether_is_not_said_to(report, score_row, constant, own, near) -> None:
    """What was trained without vectors is no lookup, however near it comes."""
    f1 = {"llama": own, "majority layer x role": constant, "majority": 0.38, "text only": 0.84}
    rows = [score_row("patching", "llama", name, "changed_f1", value) for name, value in f1.items()]
    text = told(report(scores=[*rows, score_row("patching", "llama", "llama")], comparisons=[]))
    assert f"“majority of layer and role” reaches {constant:.2f}".replace("0.", ".") in text
    assert ("of whether the answer will change" in text) is near


def test_a_lookup_has_to_know_whether_on_every_target(report, score_row) -> None:
    rows = [
        score_row("patching", target, name, "changed_f1", value)
        for target, *values in [("llama", 0.8, 0.86), ("qwen3", 0.41, 0.8)]
        for name, value in zip(("majority layer x role", target), values)
    ]
    text = told(report(scores=rows, comparisons=[]))
    assert "reaches .80 on activation patching, the best model that explains itself .86." in text


def test_where_a_gap_on_patching_comes_from_is_not_claimed(report) -> None:
    assert "cannot be told apart here" in told(report()) and "most of the gap" not in told(report())


def test_figures_that_rest_on_vectors_without_labels_are_told(report, score_row) -> None:
    assert "have no label" not in told(report())
    text = told(report(scores=unlabelled(score_row), comparisons=[]))
    assert (
        "scored by simulator correlation alone: feature descriptions, target llama: stratum activation 8, "
        "stratum sae 1 questions. Over all questions they count towards simulator correlation;" in text
    )


def unlabelled(score_row):
    rows = [score_row("features", "llama", "llama", "exact_match", 0.2, by=by, n=3) for by in ("all", "stratum=sae")]
    sizes = {"all": 12, "stratum=sae": 4, "stratum=activation": 8}
    return rows + [score_row("features", "llama", "llama", "simulated", 0.5, by=by, n=n) for by, n in sizes.items()]


def test_targets_are_not_ranked_and_their_changed_rates_are_told(report) -> None:
    text = told(report()).replace("\u202f", " ")
    assert "activation patching: llama 34 %, qwen3 34 %" in text


def test_what_a_gap_may_come_from_is_told_of_the_tasks_that_there_are(report, score_row) -> None:
    every = told(report())
    assert "A gap on activation patching and feature descriptions may be about reading the vector" in every
    assert "A gap on input ablation may be about what the two models know" in every
    for task, about in [("patching", "activation patching"), ("features", "feature descriptions")]:
        only = told(report(scores=[score_row(task, "llama", "llama")], comparisons=[]))
        assert f"A gap on {about} may be about reading" in only and "nput ablation" not in only
    assert "foreign" not in told(report(scores=[score_row("ablation", "llama", "llama")], comparisons=[]))


def test_answers_that_could_not_be_read_are_counted_without_baselines(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", "llama", unparsed=7),
        score_row("patching", "llama", "untrained", unparsed=500),
    ]
    assert "could not be read: 7 on activation patching" in told(report(scores=rows))
    assert "cannot be read" not in told(report(scores=[score_row("patching", "llama", "llama")]))


@pytest.mark.parametrize(
    ("of_differences", "said"),
    [
        ((2, 2), "hold their draw too; a score is the mean over them, and its interval leaves their draw out."),
        ((2, 3), "Differences are of 2 to 3 seeds of training and hold their draw too"),
        ((1, 3), "Differences are of 1 to 3 seeds of training; those of one do not hold what another seed would give"),
        (
            (1, 1),
            "Differences are of one seed of training, so their intervals do not hold what another seed would give",
        ),
        ((), "A score is the mean over the seeds of training, and its interval does not hold their draw."),
    ],
)
def test_no_more_seeds_are_claimed_than_the_differences_have(
    report, score_row, comparison_row, of_differences, said
) -> None:
    rows = [score_row("patching", "llama", name, seed=seed) for name in ("llama", "qwen3") for seed in range(3)]
    differences = [
        comparison_row("self_minus_cross", "patching", "llama", "llama", "qwen3", seeds=seeds)
        for seeds in of_differences
    ]
    text = told(report(scores=rows, comparisons=differences))
    assert said in text and "trained once" not in text and "do not have the same seeds" not in text


def test_the_difference_in_differences_may_have_fewer_seeds_than_any_pair(report, score_row, comparison_row) -> None:
    """It has those alone that all pairings share."""
    seeds = {
        ("llama", "llama"): (0, 1),
        ("llama", "qwen3"): (0, 1),
        ("qwen3", "llama"): (1, 2),
        ("qwen3", "qwen3"): (1, 2),
    }
    rows = [score_row("patching", *pair, seed=seed) for pair, own in seeds.items() for seed in own]
    pairs = [
        comparison_row("self_minus_cross", "patching", *pair, seeds=2)
        for pair in (("llama", "llama", "qwen3"), ("qwen3", "qwen3", "llama"))
    ]
    advantage = comparison_row("advantage", "patching", "", "", "", seeds=1)
    text = told(report(scores=rows, comparisons=pairs, advantages=[advantage]))
    assert "Differences are of 1 to 2 seeds of training; those of one do not hold" in text


def test_explainers_that_were_trained_once_are_called_so(report) -> None:
    assert "Each explainer was trained once" in told(report())


def test_explainers_of_other_seeds_are_named(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", name, seed=seed) for name, seed in [("llama", 0), ("llama", 1), ("qwen3", 1)]
    ]
    assert "do not have the same seeds on activation patching of llama:" in told(report(scores=rows))


def test_what_is_missing_at_the_largest_share_is_named(report, score_row) -> None:
    def of(target, **known):
        return [score_row("patching", target, name, fraction=f) for name, shares in known.items() for f in shares]

    models = {name: name for name in ("llama", "qwen3", "gemma")}
    rows = of("llama", llama=[0.3, 1.0], qwen3=[0.3], gemma=[0.3, 1.0]) + of("gemma", gemma=[0.3, 1.0], llama=[1.0])
    rows += of("qwen3", llama=[0.3, 1.0], qwen3=[1.0], gemma=[0.1])
    text = told(report(scores=rows, comparisons=[], explainers=models)).replace("\u202f", " ")
    assert (
        "Activation patching, target llama: qwen3 is not scored at 100 % of the training data, explainers are shown at "
        "30 % of the training data." in text
    )
    assert "Activation patching, target gemma: qwen3 is not scored at all." in text
    assert (
        "Activation patching, target qwen3: gemma is not scored at 100 % of the training data, gemma is shown at 10 % "
        "of the training data." in text
    )
    whole = of("llama", llama=[1.0], qwen3=[1.0], gemma=[1.0])
    assert "Not every explainer" not in told(report(scores=whole, comparisons=[], explainers=models))
