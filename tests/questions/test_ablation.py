import pytest

from ray_explain import records
from ray_explain.questions.ablation import ablation_questions
from ray_explain.questions.asking import SPECIAL

ROW = {
    "case_id": "a",
    "group": "g",
    "split": "train",
    "prompt": "quiz : ann ? hint : rome answer",
    "span_start": 13,
    "span_end": 25,
    "kind": "hint",
    "stratum": "withheld",
    "truth": None,
    "full_answer": " B",
    "ablated_answer": " C",
    "changed": True,
    "full_logprob": -0.1,
    "ablated_logprob": -0.1,
    "kl": 0.2,
}


def ask(wording, said=str, **changes):
    table = records.rows_table([ROW | changes], records.ABLATION_EFFECTS)
    return ablation_questions(table, said, d_model=3, wording=wording, seed=0).table


def test_the_papers_question_ends_in_its_sentence_and_answers_with_the_answer_without_the_hint():
    (row,) = ask("paper").to_pylist()
    assert row["prompt"] == ROW["prompt"] + "\n\nIf the hint were removed how would the assistant answer change?"
    assert row["answer"] == "The most likely output would change to <<<Answer: C>>>."


def test_a_question_about_a_hint_shows_what_was_said_to_the_target():
    (row,) = ask("paper", said=str.upper).to_pylist()
    assert row["prompt"].startswith("QUIZ : ANN ? HINT : ROME ANSWER\n\nIf the hint were removed")


@pytest.mark.parametrize("wording", ["paper", "paper_chat", "paper_qwen", "brief"])
def test_a_span_that_is_no_hint_is_quoted_so_that_two_of_a_prompt_are_two_questions(wording):
    asked = [ask(wording, kind="span", span_start=s, span_end=e).to_pylist()[0] for s, e in [(0, 7), (13, 25)]]
    first, second = (row["prompt"].removeprefix(ROW["prompt"]).strip() for row in asked)
    assert first.lower().startswith("if <<<quiz :>>> were removed how would the")
    assert second.lower().startswith("if <<<hint : rome>>> were removed how would the")


def test_an_unchanged_answer_is_the_one_with_the_hint():
    (row,) = ask("paper", changed=False, ablated_answer=" B").to_pylist()
    assert row["answer"] == "The output would remain unchanged from <<<Answer: B>>>."


def test_an_answer_that_is_a_special_token_is_asked_for_by_no_question():
    table = records.rows_table([ROW | {"changed": changed} for changed in (True, False)], records.ABLATION_EFFECTS)
    for special, changed in (("B", True), ("C", False)):
        made = ablation_questions(table, str, d_model=3, wording="paper", seed=0, special={special})
        assert made.table["changed"].to_pylist() == [changed] and made.dropped == [("a", SPECIAL)]


def test_in_brief_the_answer_is_the_word_alone():
    (row,) = ask("brief").to_pylist()
    assert row["prompt"] == ROW["prompt"] + " if the hint were removed how would the answer change ?"
    assert row["answer"] == "The most likely output would change to <<<C>>>."


def test_a_question_holds_no_vector_and_no_layer():
    table = ask("brief")
    assert records.vectors_of(table["vectors"])[0].shape == (0, 3)
    (row,) = table.to_pylist()
    assert (row["layers"], row["role"], row["stratum"]) == ([], "hint", "withheld")
