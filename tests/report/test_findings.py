"""The sentences: each says what the data allow and no more."""

import pytest

from ray_explain.report.estimates import Scores
from ray_explain.report.findings import Findings, verdict_of

BETTER = {"difference": 0.21, "low": 0.17, "high": 0.25, "p_value": 0.0002, "p_holm": 0.0004}
NOTHING = {"difference": 0.01, "low": -0.03, "high": 0.05, "p_value": 0.6, "p_holm": 1.0}
WORSE = {"difference": -0.1, "low": -0.14, "high": -0.06, "p_value": 0.0002, "p_holm": 0.0004}
WEAK = {"difference": 0.05, "low": 0.01, "high": 0.09, "p_value": 0.03, "p_holm": 0.12}
WEAKLY_WORSE = {"difference": -0.05, "low": -0.09, "high": -0.01, "p_value": 0.03, "p_holm": 0.12}
NO_INTERVAL = {"difference": 0.3, "low": None, "high": None, "p_value": None, "p_holm": None}
UNDEFINED = {"difference": None, "low": None, "high": None, "p_value": None, "p_holm": None}


@pytest.fixture
def findings(report, comparison_row):
    """From rows (contrast, task, target, explainer, against, numbers)."""

    def make(*rows, **changes):
        data = report(comparisons=[comparison_row(*row[:-1], **row[-1]) for row in rows], **changes)
        return Findings(data, Scores(data))

    return make


def access(findings, numbers, task="patching"):
    return findings(("self_minus_cross", task, "llama", "llama", "qwen3", numbers))


def plain(text: str) -> str:
    return text.replace("\u202f", " ")


CLAIM = "llama explains itself better than qwen3 explains it on activation patching"
CONTRARY = "qwen3 explains llama better than llama explains itself on activation patching"


@pytest.mark.parametrize(
    ("numbers", "verdict", "text"),
    [
        (BETTER, "shown", f"{CLAIM}: +.21 exact match (95 % interval +.17 to +.25, Holm p < .001)."),
        (
            NOTHING,
            "not shown",
            f"No evidence that {CLAIM}: +.01 exact match (95 % interval −.03 to +.05, Holm p = 1.00).",
        ),
        (WORSE, "opposite", f"{CONTRARY}: −.10 exact match (95 % interval −.14 to −.06, Holm p < .001)."),
        (
            WEAK,
            "weak",
            f"Weak evidence, gone after correction, that {CLAIM}: "
            "+.05 exact match (95 % interval +.01 to +.09, Holm p = .12).",
        ),
        (
            WEAKLY_WORSE,
            "weak",
            f"Weak evidence, gone after correction, that {CONTRARY}: "
            "−.05 exact match (95 % interval −.09 to −.01, Holm p = .12).",
        ),
        (UNDEFINED, "unknown", f"Nothing can be said on whether {CLAIM}: exact match undefined."),
    ],
)
def test_self_and_cross_are_told_as_the_interval_allows(findings, numbers, verdict, text) -> None:
    (found,) = access(findings, numbers).access()
    assert (found.verdict, plain(found.text)) == (verdict, text)


def test_an_interval_that_touches_zero_is_no_evidence(comparison_row) -> None:
    row = comparison_row("self_minus_cross", "patching", "llama", "llama", "qwen3", 0.1, low=0.0, high=0.2)
    assert verdict_of(row) == "not shown"
    assert verdict_of(row | {"low": 0.001}) == "shown"


def test_the_corrected_p_value_decides_and_the_other_only_where_there_is_none(comparison_row) -> None:
    row = comparison_row("uplift", "patching", "llama", "llama", "shuffled", 0.1, p_value=0.01, p_holm=0.2)
    assert verdict_of(row) == "weak"
    assert verdict_of(row | {"p_holm": None}) == "shown"
    assert verdict_of(row | {"p_holm": None, "p_value": None}) == "shown"


def test_exact_match_and_content_that_disagree_are_mixed_evidence(findings) -> None:
    content = NOTHING | {"metric": "content_match", "by": "changed=true"}
    (found,) = findings(
        *[("self_minus_cross", "ablation", "llama", "llama", "qwen3", numbers) for numbers in (BETTER, content)]
    ).access()
    assert found.verdict == "mixed"
    assert found.text.startswith("Mixed evidence that llama explains itself better than qwen3")
    assert "+.21 exact match" in found.text and "+.01 content match on changed cases" in found.text


def test_weak_evidence_for_both_sides_is_mixed(findings) -> None:
    content = {"metric": "content_match", "by": "changed=true"}
    of = "self_minus_cross", "ablation", "llama", "llama", "qwen3"
    (found,) = findings((*of, WEAK), (*of, WEAKLY_WORSE | content)).access()
    assert found.verdict == "mixed" and found.text.startswith("Mixed evidence that llama explains itself better")
    (found,) = findings((*of, WEAKLY_WORSE), (*of, WEAKLY_WORSE | content)).access()
    assert found.verdict == "weak" and CONTRARY.replace("activation patching", "input ablation") in found.text


@pytest.mark.parametrize("against", [WEAKLY_WORSE, WORSE, UNDEFINED])
def test_where_nothing_speaks_for_a_claim_there_is_no_evidence_of_it(findings, against) -> None:
    used = uplift(findings, shuffled=NOTHING, no_vector=against)
    (sentence,) = used.vector_use()
    assert sentence.verdict == vector_summary(used).verdict == "not shown"
    assert sentence.text.startswith("No evidence that llama, explaining itself, uses the vector")
    assert "no evidence that models that explain themselves use the vector" in vector_summary(used).text
    content = {"metric": "content_match", "by": "changed=true"}
    of = "self_minus_cross", "patching", "llama", "llama", "qwen3"
    (told,) = findings((*of, NOTHING), (*of, against | content)).access()
    assert told.verdict == "not shown" and told.text.startswith(f"No evidence that {CLAIM}")
    assert told.text.endswith(f", {verdict_of(against)}.")


def test_a_small_bound_is_not_rounded_into_zero(findings) -> None:
    (found,) = access(findings, BETTER | {"difference": 0.03, "low": 0.004}).access()
    assert "+.030 exact match (95 % interval +.004 to +.250" in plain(found.text)


def uplift(findings, **controls):
    return findings(
        *[("uplift", "patching", "llama", "llama", control, numbers) for control, numbers in controls.items()]
    )


def vector_summary(found):
    """What is said first on the use of vectors in patching, below the sentences on privileged access."""
    return next(it for it in found.summary()[3:] if it.text.startswith("Activation patching"))


def test_a_vector_whose_loss_costs_nothing_is_not_called_used(findings) -> None:
    found = uplift(findings, shuffled=NOTHING, no_vector=NOTHING)
    (sentence,) = found.vector_use()
    assert sentence.verdict == "not shown"
    assert sentence.text.startswith("No evidence that llama, explaining itself, uses the vector on activation patching")
    assert any("no evidence that models that explain themselves use the vector" in it.text for it in found.summary())


def test_a_vector_whose_loss_costs_much_is_used(findings) -> None:
    found = uplift(findings, shuffled=BETTER, no_vector=BETTER | {"difference": 0.24, "high": 0.28})
    (sentence,) = found.vector_use()
    assert sentence.verdict == "shown"
    assert sentence.text == (
        "llama, explaining itself, uses the vector on activation patching: exact match falls by .21 (.17 to .25) "
        "when vectors are shuffled between questions and by .24 (.17 to .28) when there is no vector."
    )
    assert any("without the right one they lose .21 to .24 exact match" in it.text for it in found.summary())


def test_a_vector_that_misleads_is_told(findings) -> None:
    (sentence,) = uplift(findings, shuffled=WORSE).vector_use()
    assert sentence.verdict == "opposite"
    assert "answers better without the right vector" in sentence.text and "rises by .10 (.06 to .14)" in sentence.text


def test_weak_evidence_that_a_vector_misleads_is_not_told_as_use_of_it(findings) -> None:
    found = uplift(findings, shuffled=WEAKLY_WORSE, other_layer=WEAK)
    (sentence,) = found.vector_use()
    assert sentence.verdict == "weak"
    assert sentence.text.startswith(
        "Weak evidence, gone after correction, that llama, explaining itself, answers better without the right "
        "vector on activation patching: exact match rises by .05 (.01 to .09) when vectors are shuffled between "
        "questions"
    )
    told = "evidence that models that explain themselves {} vector does not survive correction."
    assert told.format("answer better without the right") in vector_summary(found).text
    used = uplift(findings, shuffled=WEAK)
    assert (
        told.format("use the") in vector_summary(used).text
        and "llama, explaining itself, uses" in used.vector_use()[0].text
    )
    assert uplift(findings, shuffled=WEAK, no_vector=WEAKLY_WORSE).vector_use()[0].verdict == "mixed"


def test_controls_that_disagree_are_mixed_evidence_but_another_layer_does_not_decide(findings) -> None:
    (mixed,) = uplift(findings, shuffled=BETTER, no_vector=NOTHING).vector_use()
    assert mixed.verdict == "mixed"
    (used,) = uplift(findings, shuffled=BETTER, other_layer=NOTHING).vector_use()
    assert used.verdict == "shown" and "from another layer" in used.text


def test_where_nobody_explains_itself_the_use_of_vectors_is_summed_up_of_others(findings) -> None:
    of = "uplift", "patching", "llama", "qwen3"
    found = findings((*of, "shuffled", BETTER), explainers={"qwen3": "qwen3"}, examples=[])
    assert found.vector_use()[0].text.startswith("qwen3, explaining llama, uses the vector")
    summary = vector_summary(found)
    assert summary.verdict == "shown"
    text = "models that explain others use the vector: without the right one they lose .21 exact match."
    assert summary.text.endswith(text)
    both = findings((*of, "shuffled", BETTER), ("uplift", "patching", "llama", "llama", "shuffled", NOTHING))
    assert "no evidence that models that explain themselves use the vector" in vector_summary(both).text


@pytest.mark.parametrize(
    ("numbers", "verdict", "told"),
    [
        (BETTER, "shown", "use the vector: with that of another layer they lose .21 exact match."),
        (WEAKLY_WORSE, "weak", "answer better with the vector of another layer does not survive correction."),
        (NOTHING, "not shown", "use the vector; that of another layer may be enough."),
        (WORSE, "opposite", "answer better with the vector of another layer."),
    ],
)
def test_another_layer_decides_where_it_is_the_only_control(findings, numbers, verdict, told) -> None:
    found = uplift(findings, other_layer=numbers)
    assert vector_summary(found).verdict == found.vector_use()[0].verdict == verdict
    assert vector_summary(found).text.endswith(told)


@pytest.mark.parametrize("controls", [{"no_vector"}, {"no_vector", "random"}, {"no_vector", "other_layer"}])
@pytest.mark.parametrize(("numbers", "verdict"), [(BETTER, "shown"), (WEAK, "weak")])
def test_a_fall_without_a_real_vector_alone_is_not_told_as_use_of_it(findings, controls, numbers, verdict) -> None:
    found = uplift(findings, **{control: numbers for control in controls})
    (sentence,), summary = found.vector_use(), vector_summary(found)
    assert sentence.verdict == summary.verdict == verdict
    for text, worse in ((sentence.text, "answers worse without"), (summary.text, "answer worse without")):
        assert f"{worse} a real vector" in text and text.endswith(" and may merely confuse.") and "use" not in text[:90]
    if verdict == "shown":
        assert "explain themselves answer worse without a real vector: they lose .21 exact match. What" in summary.text


@pytest.mark.parametrize("numbers", [NOTHING, WORSE, WEAKLY_WORSE, UNDEFINED])
def test_nothing_is_said_of_confusion_where_no_fall_speaks_for_the_vector(findings, numbers) -> None:
    found = uplift(findings, no_vector=numbers)
    assert not any("confuse" in it.text for it in [*found.vector_use(), *found.summary()])


def test_without_any_control_nothing_is_said_on_the_vector(findings) -> None:
    summary = access(findings, BETTER).summary()
    told = [it.text for it in summary if "use of the vector" in it.text]
    assert told == [
        f"{task}: nothing can be said on the use of the vector; no explainer was asked under a control."
        for task in ("Activation patching", "Feature descriptions")
    ]


def test_baselines_are_told_together(findings) -> None:
    of = "over_baseline", "features", "llama", "llama"
    rows = [(*of, "majority", BETTER), (*of, "nearest neighbour", BETTER | {"difference": 0.24})]
    (shown,) = findings(*rows).over_baselines()
    assert shown.verdict == "shown"
    assert plain(shown.text).endswith(
        "is above each of 2 baselines on feature descriptions: "
        "+.21 exact match (95 % interval +.17 to +.25) over the best of them, majority class."
    )
    (mixed,) = findings(rows[0], (*rows[1][:-1], NOTHING)).over_baselines()
    assert mixed.verdict == "mixed" and "is not shown to be above each of 2 baselines" in mixed.text
    assert mixed.text.endswith("in exact match, +.01 (−.03 to +.05) over nearest neighbour.")
    (below,) = findings(rows[0], (*rows[1][:-1], WORSE)).over_baselines()
    assert below.verdict == "mixed" and "is below 1 of 2 baselines" in below.text
    assert below.text.endswith("in exact match, −.10 (−.14 to −.06) over nearest neighbour.")
    (apart,) = findings((*rows[0][:-1], NOTHING), (*rows[1][:-1], WORSE)).over_baselines()
    assert apart.verdict == "not shown" and "is below 1 of 2 baselines" in apart.text
    (hint,) = findings(rows[0], (*rows[1][:-1], WEAKLY_WORSE)).over_baselines()
    assert "is not shown to be above each of 2 baselines" in hint.text


@pytest.mark.parametrize(("numbers", "where"), [(WEAK, "above"), (WEAKLY_WORSE, "below")])
def test_weak_evidence_says_on_which_side_of_the_baselines(findings, numbers, where) -> None:
    of = "over_baseline", "features", "llama", "llama"
    (weak,) = findings((*of, "majority", numbers), (*of, "nearest neighbour", numbers)).over_baselines()
    assert weak.verdict == "weak" and f"that llama, explaining itself, is {where} each of 2 baselines" in weak.text


BETTER_IN_BOTH = "that a model explains itself better than another explains it (in both comparisons)"
ONE_OF_TWO = "models explain themselves better in 1 of 2 comparisons (+.21 exact match)"


@pytest.mark.parametrize(
    ("one", "other", "verdict", "text"),
    [
        (
            BETTER,
            BETTER | {"difference": 0.29},
            "shown",
            "explain them, in both comparisons (+.21 to +.29 exact match).",
        ),
        (BETTER, NOTHING, "mixed", f"{ONE_OF_TWO}."),
        (BETTER, WORSE, "mixed", f"{ONE_OF_TWO}; in 1 the other model is better."),
        (WEAK, NOTHING, "mixed", f"no firm evidence {BETTER_IN_BOTH}."),
        (NOTHING, NOTHING, "not shown", f"it is not shown {BETTER_IN_BOTH}."),
        (WORSE, NOTHING, "not shown", f"it is not shown {BETTER_IN_BOTH}; in 1 the other model is better."),
        (
            WORSE,
            WORSE,
            "opposite",
            "others explain the targets better than these explain themselves, in both comparisons.",
        ),
    ],
)
def test_a_task_is_summed_up_over_its_targets(findings, one, other, verdict, text) -> None:
    of = "self_minus_cross", "features"
    rows = [(*of, "llama", "llama", "qwen3", one), (*of, "qwen3", "qwen3", "llama", other)]
    found = next(it for it in findings(*rows).summary() if it.text.startswith("Feature descriptions"))
    assert found.verdict == verdict and found.text.endswith(text)


def test_no_comparison_at_all_is_said_and_not_passed_over(findings) -> None:
    assert {it.verdict for it in findings().summary()} == {"unknown"}
    assert findings().access() == []


def test_a_comparison_without_an_interval_is_not_told_as_none(findings) -> None:
    found = findings(
        ("self_minus_cross", "patching", "llama", "llama", "qwen3", NO_INTERVAL),
        ("uplift", "patching", "llama", "llama", "shuffled", NO_INTERVAL),
    )
    told = [it.text for it in found.summary() if it.text.startswith("Activation patching")]
    assert [text.split("; ")[1] for text in told] == [
        "no comparison of self and others has an interval.",
        "no comparison with a control has an interval.",
    ]
    assert (
        findings()
        .summary()[0]
        .text.endswith("nothing can be said on privileged access; self and others were not compared.")
    )


def test_other_metrics_and_parts_make_no_sentence(findings) -> None:
    rows = [BETTER | {"metric": "changed_f1"}, BETTER | {"by": "stratum=known"}]
    assert findings(*[("self_minus_cross", "patching", "llama", "llama", "qwen3", row) for row in rows]).access() == []


def test_a_difference_in_differences_is_told(findings) -> None:
    row = {
        "task": "features",
        "fraction": 1.0,
        "metric": "simulated",
        "by": "all",
        "n_groups": 43,
        "seeds": 1,
        **BETTER,
    }
    (found,) = findings(advantages=[row]).access()
    assert found.verdict == "shown" and "explainer strength and target ease" in found.text
    assert "+.21 simulator correlation" in found.text
    (found,) = findings(advantages=[row | NOTHING]).access()
    assert found.text.startswith("No evidence that models explain themselves better")


def test_what_all_pairings_together_show_is_not_denied_where_single_ones_do_not(findings) -> None:
    """The difference in differences has more data than each of the comparisons that it is made of."""
    advantage = {"task": "patching", "fraction": 1.0, "metric": "exact_match", "by": "all"}
    single = "self_minus_cross", "patching", "llama", "llama", "qwen3", NOTHING
    summary, *_ = findings(single, advantages=[advantage | BETTER]).summary()
    assert summary.verdict == "not shown" and "it is not shown that a model explains itself better" in summary.text
    assert summary.text.endswith("over all pairings together, it is shown: see below.")
    for elsewhere in (advantage | NOTHING, advantage | BETTER | {"task": "ablation"}):
        assert "pairings" not in findings(single, advantages=[elsewhere]).summary()[0].text


def test_what_is_compared_at_a_part_of_the_training_data_is_told_with_it(findings, score_row) -> None:
    rows = [
        score_row("patching", "llama", name, fraction=f) for name, f in [("llama", 0.3), ("llama", 1.0), ("qwen3", 0.3)]
    ]
    found = findings(
        ("self_minus_cross", "patching", "llama", "llama", "qwen3", BETTER | {"fraction": 0.3}), scores=rows
    )
    (summary, *_), (access,) = found.summary(), found.access()
    assert summary.verdict == access.verdict == "shown"
    assert "exact match (95 %" in plain(access.text)
    assert plain(summary.text).startswith(
        "Activation patching, at 30 % of the training data: models explain themselves"
    )
    assert plain(access.text).startswith(f"{CLAIM}, at 30 % of the training data: +.21 exact match")


def test_scored_descriptions_are_told_in_one_metric(findings, score_row) -> None:
    metrics = ("simulated", "exact_match", "similarity")
    rows = [score_row("features", "llama", name, metric) for name in ("llama", "qwen3") for metric in metrics]
    of = "self_minus_cross", "features", "llama", "llama", "qwen3"
    found = findings(
        (*of, BETTER | {"metric": "simulated"}), (*of, NOTHING), (*of, NOTHING | {"metric": "similarity"}), scores=rows
    )
    (access,) = found.access()
    assert access.verdict == "shown" and "simulator correlation" in access.text and "exact match" not in access.text


def test_names_of_runs_are_told_as_their_models(findings) -> None:
    found = findings(
        ("self_minus_cross", "patching", "llama", "run-1", "run-2", BETTER),
        explainers={"run-1": "llama", "run-2": "qwen3"},
        examples=[],
    )
    assert found.access()[0].text.startswith("llama explains itself better than qwen3 explains it")
