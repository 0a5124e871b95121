from ray_explain import records
from ray_explain.questions.ablation import ablation_questions

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


def ask(wording, **changes):
    table = records.rows_table([ROW | changes], records.ABLATION_EFFECTS)
    return ablation_questions(table, d_model=3, wording=wording, seed=0).table


def test_the_papers_question_ends_in_its_sentence_and_answers_with_the_answer_without_the_hint():
    (row,) = ask("paper").to_pylist()
    assert row["prompt"] == ROW["prompt"] + "\n\nIf the hint were removed how would the assistant answer change?"
    assert row["answer"] == "The most likely output would change to <<<Answer: C>>>."


def test_an_unchanged_answer_is_the_one_with_the_hint():
    (row,) = ask("paper", changed=False, ablated_answer=" B").to_pylist()
    assert row["answer"] == "The output would remain unchanged from <<<Answer: B>>>."


def test_in_brief_the_answer_is_the_word_alone():
    (row,) = ask("brief").to_pylist()
    assert row["prompt"] == ROW["prompt"] + " if the hint were removed how would the answer change ?"
    assert row["answer"] == "The most likely output would change to <<<C>>>."


def test_a_question_holds_no_vector_and_no_layer():
    table = ask("brief")
    assert records.vectors_of(table["vectors"])[0].shape == (0, 3)
    (row,) = table.to_pylist()
    assert (row["layers"], row["role"], row["stratum"]) == ([], "hint", "withheld")
