import copy
import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ray_explain.ground_truth import counterfact
from ray_explain.ground_truth.counterfact import Fact, counterfact_cases, counterfact_pairs, read_counterfact
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.positions import HALF_CHARACTER, prompt_tokens, words_of_tokens
from ray_explain.questions.patching import patching_questions
from tests.ground_truth.conftest import GEMMA_CHAT, LLAMA_CHAT, saved, with_template

FIRST = ("Emilio", "Eli", "Rome", "Paris", "Berlin", "Lily", "Tom", "Boat", "Ball", "Red", "Blue", "Lussu")
LAST = ("Lussu", "Maor", "Italy", "Respond", "Hint")
LANGUAGES = ("Italian", "French", "German", "Korean", "Hindi", "Tamil")
NAMES = [f"{first} {last}" for first in FIRST for last in LAST]
LINES = [
    {
        "case_id": i,
        "template": "{} speaks" if i % 2 else "The language of {} is",
        "subject": name,
        "target_true": LANGUAGES[i % 6],
        "target_new": LANGUAGES[(i + 1) % 6],
    }
    for i, name in enumerate(NAMES)
]


def original(line: dict[str, Any]) -> dict[str, Any]:
    """The same record as the original release writes it."""
    rewrite = {
        "prompt": line["template"],
        "relation_id": "P1412",
        "target_true": {"str": line["target_true"], "id": "Q1"},
        "target_new": {"str": line["target_new"], "id": "Q2"},
        "subject": line["subject"],
    }
    return {"case_id": line["case_id"], "requested_rewrite": rewrite, "paraphrase_prompts": []}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "counterfact.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return file


def test_both_releases_give_the_same_facts(path: Path, tmp_path: Path) -> None:
    whole = tmp_path / "counterfact.json"
    whole.write_text(json.dumps([original(line) for line in LINES]))
    lines, dropped = read_counterfact(path)
    facts, dropped_too = read_counterfact(whole)
    assert dropped == dropped_too == []
    assert [fact._replace(relation="") for fact in facts] == [fact._replace(relation="") for fact in lines]
    assert {fact.relation for fact in facts} == {"P1412"}
    assert lines[1].statement == "Emilio Maor speaks"
    assert lines[0].statement[slice(*lines[0].subject_span)] == "Emilio Lussu"


def test_spaces_around_an_answer_are_no_part_of_it(path: Path, tmp_path: Path) -> None:
    spaced = tmp_path / "spaced.jsonl"  # as files that are made for completions write them
    spaced.write_text("".join(json.dumps(one | {"target_true": f" {one['target_true']}"}) + "\n" for one in LINES))
    assert read_counterfact(spaced) == read_counterfact(path)


def test_records_that_are_no_facts_are_dropped_by_their_place(tmp_path: Path) -> None:
    good = json.dumps(LINES[0])
    bad = [
        "{",
        "[1]",
        json.dumps(LINES[1] | {"template": "no place for a subject"}),
        json.dumps(LINES[1] | {"target_true": 5}),
        json.dumps({name: value for name, value in LINES[1].items() if name != "subject"}),
        json.dumps(LINES[1] | {"subject": " "}),
    ]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join([good, "", *bad, good]))
    facts, dropped = read_counterfact(file)
    assert len(facts) == 2
    assert [place for place, _ in dropped] == ["line 3", "line 4", "line 5", "line 6", "line 7", "line 8"]
    assert dict(dropped)["line 5"] == counterfact.NOT_A_FACT
    whole = tmp_path / "bad.json"
    whole.write_text(json.dumps([original(LINES[0]), {"requested_rewrite": None}, 7]))
    assert read_counterfact(whole)[1] == [("record 1", counterfact.NOT_A_FACT), ("record 2", counterfact.NOT_A_FACT)]
    whole.write_text(json.dumps({"not": "a list"}))
    with pytest.raises(ValueError, match=r"bad\.json .* holds a dict: a \.json file holds one list of records"):
        read_counterfact(whole)
    file.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1] | {"subject": "Eli \ud800 Maor"}))
    assert read_counterfact(file)[1] == [("line 2", HALF_CHARACTER)]
    whole.write_text(json.dumps([original(LINES[0]), original(LINES[1] | {"subject": "Eli \ud800 Maor"})]))
    assert read_counterfact(whole)[1] == [("record 1", counterfact.NOT_A_FACT)]


def test_a_byte_order_mark_before_the_records_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps([original(LINES[0])]).encode())
    assert [fact.subject for fact in read_counterfact(file)[0]] == [LINES[0]["subject"]]


@pytest.mark.parametrize("content", ["lines", "[" * 100_000, "[" + "9" * 5000 + "]", ""])
def test_a_json_file_that_is_no_list_of_records_is_told_with_its_path_and_the_two_forms(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "facts.json"
    file.write_text("\n".join(map(json.dumps, LINES)) if content == "lines" else content)
    with pytest.raises(ValueError, match=r"facts\.json is no CounterFact file .*one list of records.*end in \.jsonl"):
        read_counterfact(file)


def test_pairs_share_their_wording_and_differ_in_subject_and_answer(
    path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    facts, _ = read_counterfact(path)
    by_statement = {fact.statement: fact for fact in facts}
    pairs, dropped = counterfact_pairs(facts, tokenizer, form="completion", seed=0)
    assert len(pairs) + len(dropped) == len(facts)
    splits = defaultdict(set)
    for pair in pairs:
        base, source = by_statement[pair.base.text], by_statement[pair.source.text]
        assert base.template == source.template
        assert base.subject != source.subject
        assert base.answers[0] != source.answers[0]
        assert (pair.base.truth, pair.source.truth) == (base.answers[0], source.answers[0])
        splits[base.subject].add(pair.split)
        splits[source.subject].add(pair.split)
    assert all(len(own) == 1 for own in splits.values())  # a subject is in one split, as base and as source
    assert {split for own in splits.values() for split in own} == {"train", "validation", "test"}


def test_a_subject_is_never_its_own_source(tokenizer: PreTrainedTokenizerFast) -> None:
    facts = [Fact("{} speaks", "Eli Maor", "{} speaks", (answer, "Dutch")) for answer in LANGUAGES]
    pairs, dropped = counterfact_pairs(facts, tokenizer, form="completion", seed=0)
    assert pairs == []
    assert [reason for _, reason in dropped] == [counterfact.NO_PARTNER] * len(LANGUAGES)


def test_pairs_are_the_same_in_every_run_and_others_with_another_seed(
    path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    one, again, other = (
        counterfact_cases(path, tokenizer, blocks=[(0, 1), (2, 2)], n={"train": 40, "test": 10}, seed=seed).table
        for seed in (3, 3, 4)
    )
    assert one.equals(again) and not one.equals(other)
    assert one.num_rows == 50


def test_the_choice_form_is_the_papers_and_its_roles_are_on_the_options(
    path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    facts, _ = read_counterfact(path)
    pairs, _ = counterfact_pairs(facts, tokenizer, form="choice", seed=0)
    for pair in pairs:
        suffix = pair.base.text.removeprefix(pair.base.text.split("\n")[0])
        assert pair.source.text.endswith(suffix)
        options = suffix.removeprefix("\n\nRespond with one of ").removesuffix(
            " or unknown and nothing else.\n\nResponse:"
        )
        assert len(set(options.split(" or "))) == 5 == len(options.split(" or "))
        assert "\n" not in options
        named = [(role, pair.base.text[slice(*span)]) for role, span in pair.base.named]
        assert [text for _, text in named] == options.split(" or ")
        assert dict(named)["option_base"] == pair.base.truth
        assert dict(named)["option_source"] == pair.source.truth
        assert [role for role, _ in named].count("option_other") == 3
        assert pair.base.text[: pair.base.statement_end] == pair.base.text.split("\n")[0]
    cases = counterfact_cases(path, tokenizer, blocks=[(0, 2)], n={"train": 400}, form="choice").table.to_pylist()
    assert {"option_base", "option_source", "option_other", "subject_last", "final"} < {case["role"] for case in cases}
    for case in cases:
        ids = tokenizer(case["base_prompt"])["input_ids"]
        said = tokenizer.decode([ids[case["base_positions"][0]]]).strip()
        if case["role"] == "option_base":
            assert case["base_truth"].endswith(said)
        if case["role"] == "option_source":
            assert case["source_truth"].endswith(said)
        if case["role"] == "final":
            assert said == ":"


def test_the_chat_form_is_a_user_turn_without_full_stop(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    facts, _ = read_counterfact(path)
    pairs, _ = counterfact_pairs(facts, tokenizer, form="chat", seed=0)
    for pair in pairs:
        assert pair.base.text.startswith("<|begin|>[user]")
        assert pair.base.text.endswith(" or unknown and nothing else\n[assistant]")
        assert pair.base.text[slice(*pair.base.subject)] in NAMES
    cases = counterfact_cases(path, tokenizer, blocks=[(0, 2)], n={"train": 50}, form="chat").table
    assert cases.num_rows == 50


def test_questions_about_chats_name_the_tokens_that_are_patched(
    path: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, tmp_path: Path
) -> None:
    """A rendered chat begins with the begin-of-text token: a second one before it would shift all of them."""
    cases = counterfact_cases(path, tokenizer, blocks=[(0, 2)], n={"train": 50}, form="chat").table
    longer = copy.deepcopy(model)
    longer.config.max_position_embeddings = 512  # a chat is longer than what others read
    effects = PatchingStage(saved(longer, tokenizer, tmp_path / "target"))(cases).table
    asked = patching_questions(effects, partial(words_of_tokens, tokenizer), wording="brief", seed=0).table
    assert asked.num_rows > 0
    for effect, question in zip(effects.to_pylist(), asked["prompt"].to_pylist()):
        tokens = prompt_tokens(tokenizer, effect["base_prompt"])
        (position,) = effect["base_positions"]
        start, end = tokens.offsets[position]
        assert f"token {position} <<<{effect['base_prompt'][start:end].strip()}>>>" in question


@pytest.mark.parametrize("template", [LLAMA_CHAT, GEMMA_CHAT])
def test_templates_that_trim_keep_statements_that_begin_with_a_space(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str
) -> None:
    file = tmp_path / "spaced.jsonl"
    spaced = [line | {"template": f" {line['template']}", "subject": f" {line['subject']}"} for line in LINES]
    file.write_text("\n".join(map(json.dumps, spaced)))
    facts, _ = read_counterfact(file)
    pairs, dropped = counterfact_pairs(facts, with_template(tokenizer, template), form="chat", seed=0)
    assert {reason for _, reason in dropped} == {counterfact.NO_PARTNER} and len(pairs) + len(dropped) == len(LINES)
    assert {pair.base.text[slice(*pair.base.subject)] for pair in pairs} < set(NAMES)


def test_statements_that_the_template_changes_are_dropped(path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    changing = with_template(tokenizer, "{{ messages[-1]['content'] | replace('speaks', 'talks') }}")
    made = counterfact_cases(path, changing, blocks=[(0, 2)], n={"train": 9}, form="chat")
    assert made.table.num_rows == 9
    assert {reason for _, reason in made.dropped} == {counterfact.NOT_SHOWN, counterfact.NO_PARTNER}
    assert all("The language of" in text for text in made.table["base_prompt"].to_pylist())


def test_facts_without_partner_or_options_are_dropped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    lines = [LINES[0], LINES[0] | {"subject": "Someone Else", "target_true": "Italian"}]
    lines += [
        line | {"template": "{} says", "target_true": f"a{i % 2}", "target_new": "b"} for i, line in enumerate(LINES)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    made = counterfact_cases(file, tokenizer, blocks=[(0, 0)], n={"train": 999}, form="choice")
    reasons = [reason for _, reason in made.dropped]
    assert made.table.num_rows == 0
    assert set(reasons) == {counterfact.NO_PARTNER, counterfact.TOO_FEW_ANSWERS}
    assert len(reasons) == len(lines)
