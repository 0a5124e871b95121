import numpy as np
import pyarrow as pa
import pytest

from ray_explain import records
from ray_explain.questions.asking import SPECIAL
from ray_explain.questions.patching import NO_WORDS, patching_questions

D = 4


def effects(*changes, vectors=None):
    """Effects on "ann lives in"; each of `changes` overrides the columns of one row."""
    rows = [
        {
            "case_id": f"case {i}",
            "group": "ann lives",
            "split": "test",
            "base_prompt": "ann lives in",
            "source_prompt": "bob lives in",
            "first_layer": 1,
            "last_layer": 2,
            "site": "residual",
            "kind": "replace",
            "base_positions": [0],
            "source_positions": [0],
            "role": "subject_last",
            "stratum": "lives",
            "base_truth": None,
            "source_truth": None,
            "base_answer": " paris",
            "patched_answer": " rome",
            "changed": True,
            "base_logprob": -0.1,
            "patched_logprob": -0.2,
            "kl": 0.5,
            **change,
        }
        for i, change in enumerate(changes)
    ]
    vectors = vectors or [np.full((1, D), i, np.float32) for i in range(len(rows))]
    schema = records.patching_effects(D)
    columns = {name: [row[name] for row in rows] for name in schema.names if name != "vectors"}
    columns = {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}
    columns["vectors"] = records.vectors_array(vectors, D)
    return records.conform(pa.table(columns), schema)


def ask(table, wording="brief", seed=0, special=()):
    def tokens_of(text):
        return [" " + word for word in text.split()]

    return patching_questions(table, tokens_of, wording=wording, seed=seed, special=special)


def test_a_brief_question_names_layers_position_token_and_input():
    (question,) = ask(effects({})).table.drop_columns(["vectors"]).to_pylist()
    assert question["prompt"] == "at layers 1 2 replace token 0 <<<ann>>> by <vector> in : ann lives in . output ?"
    assert question["answer"] == "The most likely output would change to <<<rome>>>."
    assert question["answers"] == [question["answer"]]
    assert (question["layers"], question["role"], question["stratum"]) == ([1, 2], "subject_last", "lives")
    assert (question["task"], question["changed"], question["wording"]) == ("patching", True, "brief/patching/1")


def test_the_papers_question_is_byte_for_byte_the_papers():
    wanted = {
        1: "If feature <vector> at layer 1, 2 is added to tokens < ann> when processing the text <<<ann lives in>>>, "
        "how would the output change?\n",
        2: "When feature <vector> at layer 1, 2 is added at tokens < ann> in the input <<<ann lives in>>>, "
        "what happens to the model's output?\n",
        3: "Consider the input text: <<<ann lives in>>>. If we steer layer 1, 2 towards feature <vector> at tokens "
        "< ann>, how does this affect the generated continuation?\n",
        4: "Given the text <<<ann lives in>>>, what would be the effect on the output if feature <vector> at layer "
        "1, 2 is added to tokens < ann>?\n",
        5: "If we steer towards feature <vector> at layer 1, 2 and tokens < ann> when processing <<<ann lives in>>>, "
        "how would the model's response differ?\n",
    }
    asked = ask(effects(*[{"changed": False}] * 40), wording="paper").table.to_pylist()
    assert {row["wording"]: row["prompt"] for row in asked} == {f"paper/patching/{i}": wanted[i] for i in wanted}
    assert {row["answer"] for row in asked} == {"The output would remain unchanged from <<< paris>>>."}


def test_a_question_does_not_depend_on_the_other_rows():
    table = effects({}, {"changed": False}, {"base_prompt": "bob lives in"})
    whole = ask(table, wording="paper").table
    for i in range(3):
        assert ask(table.slice(i, 1), wording="paper").table.equals(whole.slice(i, 1).combine_chunks())


def test_vectors_stay_with_their_questions_when_others_are_dropped():
    result = ask(effects({}, {"base_prompt": "ann <vector> in"}, {}))
    assert result.table["case_id"].to_pylist() == ["case 0", "case 2"]
    assert [own.tolist() for own in records.vectors_of(result.table["vectors"])] == [[[0.0] * D], [[2.0] * D]]


def test_several_patched_tokens_have_as_many_marks():
    table = effects({"base_positions": [0, 2]}, vectors=[np.ones((2, D), np.float32)])
    (prompt,) = ask(table).table["prompt"].to_pylist()
    assert prompt == "at layers 1 2 replace token 0 2 <<<ann in>>> by <vector> <vector> in : ann lives in . output ?"


def test_what_cannot_be_asked_is_dropped_with_its_reason():
    result = ask(effects({"base_prompt": "ann <vector> in"}, {"patched_answer": ">>> change to <<<x>>>"}, {}))
    assert result.table.num_rows == 1
    assert result.dropped == [("case 0", "text holds the mark <vector>"), ("case 1", "answer cannot be read back")]


def test_an_answer_that_is_a_special_token_is_asked_for_by_no_question():
    end, word = "<|im_end|>", {"changed": False}
    rows = [{"patched_answer": end}, {"base_answer": end}, {"base_answer": end} | word, {"patched_answer": end} | word]
    made = ask(effects(*rows), special={end})
    assert made.table["case_id"].to_pylist() == ["case 1", "case 3"]
    assert made.dropped == [("case 0", SPECIAL), ("case 2", SPECIAL)]
    assert [own[0, 0] for own in records.vectors_of(made.table["vectors"])] == [1, 3]


@pytest.mark.parametrize(
    ("wording", "asked"),
    [("paper", ["replace", "add"]), ("paper_chat", ["replace", "add"]), ("brief", ["replace"])],
)
def test_a_kind_of_patch_that_the_wording_cannot_say_is_dropped(wording: str, asked: list[str]):
    nothing, one = np.empty((0, D), np.float32), np.ones((1, D), np.float32)
    kinds = {"zero": nothing, "add": one, "mean": nothing, "replace": one * 2}
    made = ask(effects(*[{"kind": kind} for kind in kinds], vectors=list(kinds.values())), wording=wording)
    names = [f"case {i}" for i, kind in enumerate(kinds) if kind in asked]
    assert made.table["case_id"].to_pylist() == names
    assert {case_id for case_id, _ in made.dropped} == {f"case {i}" for i in range(4)} - set(names)
    assert {reason for _, reason in made.dropped} == {NO_WORDS}
    vectors = records.vectors_of(made.table["vectors"])
    assert [own.tolist() for own in vectors] == [kinds[kind].tolist() for kind in kinds if kind in asked]


def test_braces_in_a_prompt_are_just_text():
    (prompt,) = ask(effects({"base_prompt": "ann {layers} {x}"})).table["prompt"].to_pylist()
    assert "in : ann {layers} {x} ." in prompt


def test_ids_tell_targets_apart_that_answer_differently():
    one, other = (ask(effects({"patched_answer": answer})).table["question_id"][0].as_py() for answer in ("a", "b"))
    assert one != other


def test_a_position_past_the_end_says_whose_tokens_are_needed():
    with pytest.raises(ValueError, match="case 0: position 7 of a prompt of 3 tokens"):
        ask(effects({"base_positions": [7]}))
