import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.evaluation.answers import normalise
from ray_explain.questions import prompting
from ray_explain.questions.prompting import shots_label, shown_examples
from ray_explain.questions.wordings import CHANGED, UNCHANGED

D = 3


def table(n, task="patching", wording="paper_chat/patching/1", first=0):
    """`n` questions with one vector each; every third changes."""
    rows = [
        {
            "question_id": f"q{i}",
            "case_id": f"c{i}",
            "group": f"g{i // 2}",
            "split": "test",
            "task": task,
            "prompt": f"what of <vector> in text {i}",
            "answer": f"answer {i}",
            "answers": [f"answer {i}"],
            "layers": [0],
            "role": "",
            "stratum": "",
            "changed": None if task == "features" else i % 3 == 0,
            "wording": wording,
        }
        for i in range(first, first + n)
    ]
    schema = records.questions(D)
    columns = {f.name: pa.array([row.get(f.name) for row in rows], f.type) for f in schema if f.name != "vectors"}
    columns["vectors"] = records.vectors_array([np.full((1, D), i, np.float32) for i in range(first, first + n)], D)
    return records.conform(pa.table(columns), schema)


def prompted(questions, training, *, shots, seed):
    rows = pa.array(shown_examples(training, shots=shots, seed=seed), pa.int64())
    return prompting.prompted(questions, training.take(rows))


def test_zero_shot_says_how_to_answer_and_keeps_all_else():
    asked = table(4)
    made = prompted(asked, table(9, first=10), shots=0, seed=0)
    assert made.drop_columns(["prompt"]).equals(asked.drop_columns(["prompt"]))
    prompt = made["prompt"][2].as_py()
    assert prompt.endswith("\n\nwhat of <vector> in text 2")
    assert "remain unchanged from <<<X>>>." in prompt and "most likely output would change to <<<X>>>." in prompt


@pytest.mark.parametrize(("task", "content"), [("patching", " Rome"), ("ablation", "Answer: Rome")])
def test_who_answers_as_told_and_is_right_says_the_sentence_that_is_scored_as_right(task, content):
    prompt = prompted(table(1, task=task), table(3, task=task, first=10), shots=0, seed=0)["prompt"][0].as_py()
    said = [line.replace("X", "Rome") for line in prompt.splitlines() if "<<<" in line]
    right = [sentence.format(content=content) for sentence in (UNCHANGED, CHANGED)]
    assert [normalise(sentence) for sentence in said] == [normalise(sentence) for sentence in right]


@pytest.mark.parametrize("shots", [2, 4])
def test_shots_are_answered_training_questions_with_their_vectors_in_reading_order(shots):
    made = prompted(table(3), table(9, first=10), shots=shots, seed=0)
    for row, own in zip(made.to_pylist(), records.vectors_of(made["vectors"])):
        assert row["prompt"].count("<vector>") == len(own) == shots + 1
        shown = [part.split("text ")[1].split("\n") for part in row["prompt"].split("\n\n")[1:]]
        assert [float(number) for number, *_ in shown] == own[:, 0].tolist()
        assert all(answer == [f"answer {number}"] for number, *answer in shown[:-1])
        changed = [int(number) % 3 == 0 for number, *_ in shown[:-1]]
        assert sum(changed) == shots / 2


def test_shots_are_the_same_for_all_questions_and_another_seed_draws_others():
    def shown(seed):
        made = prompted(table(3), table(30, first=10), shots=4, seed=seed)
        return {prompt.rpartition("\n\n")[0] for prompt in made["prompt"].to_pylist()}

    assert len(shown(0)) == 1 and shown(0) != shown(1) and shown(0) == shown(0)


def test_brief_questions_stay_on_one_line_with_words_the_small_models_know():
    made = prompted(
        table(1, wording="brief/patching/1"), table(4, wording="brief/patching/1", first=10), shots=1, seed=0
    )
    prompt = made["prompt"][0].as_py()
    assert "\n" not in prompt and prompt.startswith("answer with one : ")


def test_features_have_no_verdict_to_balance_and_few_questions_are_all_shown():
    features = table(2, task="features", wording="paper/features/1")
    made = prompted(features, table(3, task="features", wording="paper/features/1", first=10), shots=8, seed=0)
    assert made["prompt"][0].as_py().count("<vector>") == 4
    assert "<<<" not in made["prompt"][0].as_py()


def test_labels():
    assert [shots_label(n) for n in (0, 4)] == ["zero-shot", "4-shot"]
