from ray_explain.report.caveats import caveats
from ray_explain.report.estimates import Scores


def told(data) -> str:
    return "\n".join(f"{it.title} {it.text}" for it in caveats(data, Scores(data)))


def test_a_lookup_that_knows_whether_is_held_against_has_changed_f1(report) -> None:
    text = told(report())
    assert (
        "the baseline “majority class” reaches .81 on activation patching, the best model that explains itself .86"
        in text
    )
    assert "headline is therefore exact match" in text


def test_targets_are_not_ranked_and_their_changed_rates_are_told(report) -> None:
    text = told(report()).replace("\u202f", " ")
    assert "activation patching: llama 34 %, qwen3 34 %" in text


def test_patching_alone_does_not_call_ablation_the_cleaner_evidence(report, score_row) -> None:
    assert "Input ablation has no vector" in told(report())
    only = told(report(scores=[score_row("patching", "llama", "llama")], comparisons=[]))
    assert "foreign" in only and "Input ablation" not in only


def test_answers_that_could_not_be_read_are_counted_without_baselines(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", "llama", unparsed=7),
        score_row("patching", "llama", "untrained", unparsed=500),
    ]
    assert "could not be read: 7 on activation patching" in told(report(scores=rows))
    assert "cannot be read" not in told(report(scores=[score_row("patching", "llama", "llama")]))


def test_one_seed_is_called_one_seed(report, score_row) -> None:
    assert "trained once" in told(report())
    rows = [score_row("patching", "llama", "llama", seed=seed) for seed in (0, 1)]
    assert "There are 2 seeds of training" in told(report(scores=rows))
