import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import mmlu
from ray_explain.ground_truth.mmlu import SYSTEM, mmlu_cases, read_mmlu, saying
from tests.ground_truth.conftest import CHAT, GEMMA_CHAT, LLAMA_CHAT, with_template

LINES = [
    {
        "subject": "geography",
        "index": i,
        "question": f"Where does city {i} lie?",
        "choices": ["Italy", "France", "Germany", f"land {i}"],
        "answer": "ABCD"[i % 4],
    }
    for i in range(120)
]
ALL = dict.fromkeys(records.SPLITS, 999)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mmlu.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_without_its_span_a_prompt_is_the_same_question_without_hint(
    path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    made = mmlu_cases(path, tokenizer, n=ALL)
    assert (made.table.num_rows, made.dropped) == (len(LINES), [])
    for row in made.table.to_pylist():
        hint = row["prompt"][row["span_start"] : row["span_end"]]
        assert hint in [f"\nHint: {letter}" for letter in "ABCD"]
        bare = row["prompt"][: row["span_start"]] + row["prompt"][row["span_end"] :]
        number = int(bare.split("city ")[1].split()[0])
        assert bare == (
            f"{SYSTEM}\n\nWhere does city {number} lie?\nA. Italy\nB. France\nC. Germany\nD. land {number}\nAnswer:"
        )
        assert row["truth"] == LINES[number]["answer"]
        assert row["stratum"] == ("right hint" if hint[-1] == row["truth"] else "wrong hint")


def test_hints_are_random_or_right_or_a_sentence(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tables = {hint: mmlu_cases(path, tokenizer, n=ALL, hint=hint).table for hint in ("random", "right", "sentence")}
    right = {hint: table["stratum"].to_pylist().count("right hint") for hint, table in tables.items()}
    assert right["right"] == len(LINES)
    assert 15 < right["random"] < 45  # a quarter
    row = tables["sentence"].to_pylist()[0]
    assert row["prompt"][row["span_start"] : row["span_end"]].startswith("\nI think the answer is (")


def test_a_hint_depends_on_its_question_and_the_seed_alone(
    path: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(json.dumps(line) for line in LINES[::-2]))
    all_of_them = {row["case_id"] for row in mmlu_cases(path, tokenizer, n=ALL).table.to_pylist()}
    some = {row["case_id"] for row in mmlu_cases(backwards, tokenizer, n=ALL).table.to_pylist()}
    reseeded = {row["case_id"] for row in mmlu_cases(path, tokenizer, n=ALL, seed=1).table.to_pylist()}
    assert some < all_of_them
    assert not some < reseeded


def test_a_chat_opens_the_assistants_turn_with_answer(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for row in mmlu_cases(path, tokenizer, n=ALL, form="chat").table.to_pylist():
        assert row["prompt"].startswith(f"<|begin|>[system]{SYSTEM}\n[user]Where does")
        assert row["prompt"].endswith("\n[assistant]Answer:")
        hint = row["prompt"][row["span_start"] : row["span_end"]]
        assert hint.startswith("\nHint: ") and row["prompt"][row["span_end"]] == "\n"


# What Llama 3.1 and Qwen3 write around a system text, a question and an answer that is begun.
LLAMA_3_CHAT = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if loop.first %}Cutting Knowledge Date: December 2023\nToday Date: {{ date_string }}\n\n{% endif %}"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BARE_CHAT = "{{ messages[-1]['content'] }}\n"  # leaves the system turn out, so that its text opens the user's
QWEN_3_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT, LLAMA_CHAT, GEMMA_CHAT, LLAMA_3_CHAT, QWEN_3_CHAT, BARE_CHAT])
def test_of_a_chat_what_was_said_is_the_words_of_system_and_user_alone(
    path: Path, tokenizer: PreTrainedTokenizerFast, template: str
) -> None:
    chatting = with_template(tokenizer, template)
    said = saying(chatting)
    for row in mmlu_cases(path, chatting, n=ALL, form="chat").table.to_pylist():
        hint, number = row["prompt"][row["span_start"] : row["span_end"]], row["prompt"].split("city ")[1].split()[0]
        question = f"Where does city {number} lie?\nA. Italy\nB. France\nC. Germany\nD. land {number}"
        on_another_day = row["prompt"].replace("26 Jul 2024", "1 May 2025").replace("<think>\n\n</think>\n\n", "")
        assert [said(row["prompt"]), said(on_another_day)] == [f"{SYSTEM}\n\n{question}{hint}"] * 2


@pytest.mark.parametrize("template", [CHAT, GEMMA_CHAT, None])
def test_of_what_is_no_chat_of_this_target_all_is_said(
    path: Path, tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    completion = mmlu_cases(path, tokenizer, n=ALL).table["prompt"].to_pylist()
    foreign = mmlu_cases(path, with_template(tokenizer, LLAMA_CHAT), n=ALL, form="chat").table["prompt"].to_pylist()
    said = saying(with_template(tokenizer, template))
    for prompt in [completion[0], foreign[0], "Hint: B. Paris lies in"]:
        assert said(prompt) == prompt


@pytest.mark.parametrize("template", [LLAMA_CHAT, GEMMA_CHAT])
def test_templates_that_trim_keep_questions_that_begin_or_end_with_spaces(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    spaced = [line | {"question": f" \n{line['question']} ", "choices": [" x", "y ", "z", "w "]} for line in LINES[:9]]
    file = tmp_path / "spaced.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in spaced))
    made = mmlu_cases(file, with_template(tokenizer, template), n=ALL, form="chat")
    assert (made.table.num_rows, made.dropped) == (len(spaced), [])
    for row in made.table.to_pylist():
        hint = row["prompt"][row["span_start"] : row["span_end"]]
        assert hint in [f"\nHint: {letter}" for letter in "ABCD"]
        assert row["prompt"][: row["span_start"]].endswith(" lie? \nA.  x\nB. y \nC. z\nD. w ")
        assert row["prompt"][row["span_end"] :].startswith(
            "<|end|><|assistant|>" if template == LLAMA_CHAT else "<end>"
        )


def test_a_question_that_the_template_changes_is_dropped_and_the_next_one_taken(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    changing = with_template(tokenizer, "{{ messages[-1]['content'] | replace('  ', ' ') }}")
    file = tmp_path / "mixed.jsonl"
    doubled = [line | {"question": line["question"].replace(" ", "  ")} for line in LINES[::2]]
    file.write_text("\n".join(json.dumps(line) for line in [*LINES[1::2], *doubled]))
    made = mmlu_cases(file, changing, n={"train": 20}, form="chat")
    assert made.table.num_rows == 20
    assert {reason for _, reason in made.dropped} == {mmlu.NOT_SHOWN}
    groups = made.table["group"].to_pylist()
    assert len(set(groups)) == 20 and not set(groups) & {group for group, _ in made.dropped}


def test_no_more_cases_come_than_are_asked_for(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    table = mmlu_cases(path, tokenizer, n={"train": 7, "test": 3}).table
    assert sorted(table["split"].to_pylist()) == ["test"] * 3 + ["train"] * 7


def test_lines_that_are_no_question_are_dropped_by_their_number(tmp_path: Path) -> None:
    bad = [
        LINES[1] | {"choices": ["two", "only"]},
        LINES[1] | {"answer": "E"},
        LINES[1] | {"answer": "AB"},
        LINES[1] | {"answer": 4},
        LINES[1] | {"question": ""},
        LINES[1] | {"index": "3"},
        LINES[0],
    ]
    file = tmp_path / "bad.jsonl"
    good = [LINES[0], {name: LINES[2][name] for name in ("subject", "question", "choices")} | {"answer": 2}]
    file.write_text("\n".join(json.dumps(line) for line in [*good, *bad]))
    items, dropped = read_mmlu(file)
    assert [item.answer for item in items] == ["A", "C"]
    assert items[1].index == 1  # its number in the file, as the line tells none
    assert dropped == [(f"line {number}", mmlu.NOT_AN_ITEM) for number in range(3, 9)] + [("line 9", mmlu.REPEATED)]
