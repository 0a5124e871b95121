import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import jsonl, positions
from ray_explain.ground_truth.pairs import Change
from ray_explain.ground_truth.splits import split_of

PATCH: dict[str, Any] = {
    "base_prompt": "Rome lies in",
    "source_prompt": "Paris lies in",
    "base_span": [5, 9],
    "source_span": [6, 10],
}
REMOVAL: dict[str, Any] = {"prompt": "Hint: B. Paris lies in", "span": [0, 9]}
ALL = dict.fromkeys(records.SPLITS, 99)


def written(folder: Path, lines: list[Any]) -> Path:
    """Texts as they are, everything else as JSON."""
    file = folder / "cases.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_a_patching_line_gives_a_case_for_each_block(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told = PATCH | {"group": "Rome", "split": "test", "role": "subject_last", "base_truth": "Italy", "stratum": "lies"}
    made = jsonl.patching_cases(written(tmp_path, [told]), tokenizer, blocks=[(0, 1), (2, 2)], n=ALL)
    first, second = made.table.to_pylist()
    assert [(row["first_layer"], row["last_layer"]) for row in (first, second)] == [(0, 1), (2, 2)]
    for side in ("base", "source"):
        ids = tokenizer(first[f"{side}_prompt"])["input_ids"]
        assert tokenizer.decode([ids[at] for at in first[f"{side}_positions"]]) == " lies"
    named = [first[name] for name in ("group", "split", "role", "stratum", "base_truth", "source_truth")]
    assert named == ["Rome", "test", "subject_last", "lies", "Italy", None]


def test_a_line_may_say_what_is_done_and_where(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = written(tmp_path, [PATCH, PATCH | {"kind": "zero"}, PATCH | {"site": "mlp_out", "kind": "add"}])
    rows = jsonl.patching_cases(file, tokenizer, blocks=[(0, 1)], n=ALL, change=Change("attn_out", "mean")).table
    said = list(zip(rows["site"].to_pylist(), rows["kind"].to_pylist()))
    assert said == [("attn_out", "mean"), ("attn_out", "zero"), ("mlp_out", "add")]
    assert len(set(rows["case_id"].to_pylist())) == 3


def test_lines_about_one_prompt_are_one_group_and_so_in_one_split(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    others = (
        {"base_span": [10, 12], "source_span": [11, 13]},
        {"source_prompt": "Berlin lies in", "source_span": [7, 11]},
        {"base_prompt": "Oslo lies in"},
    )
    file = written(tmp_path, [PATCH, *(PATCH | other for other in others)])
    rows = jsonl.patching_cases(file, tokenizer, blocks=[(0, 1)], n=ALL).table.to_pylist()
    *same, other = sorted(rows, key=lambda row: row["base_prompt"], reverse=True)
    assert len(same) == 3 and len({row["group"] for row in same}) == 1 and other["group"] != same[0]["group"]
    assert all(row["split"] == split_of(row["group"]) for row in rows)
    grouped = written(tmp_path, [line | {"group": "g"} for line in (PATCH, REMOVAL)])
    assert jsonl.ablation_cases(grouped, n=ALL).table["split"].to_pylist() == [split_of("g")]


def test_removals_that_share_a_prompt_whole_or_without_its_span_are_one_group(tmp_path: Path) -> None:
    hints = [REMOVAL | {"prompt": f"Hint: {letter}. Paris lies in"} for letter in "BC"]  # without it both are the same
    others = [{"prompt": "Hint: D. Rome", "span": [0, 9]}, {"prompt": "Paris lies in", "span": [0, 5]}]
    lines = [hints[1], others[0], REMOVAL | {"span": [6, 9]}, hints[0], others[1]]
    by_prompt = {}
    for some in (lines, lines[::-1]):
        rows = jsonl.ablation_cases(written(tmp_path, some), n=ALL).table.to_pylist()
        assert len(rows) == 5 and all(row["split"] == split_of(row["group"]) for row in rows)
        by_prompt[some is lines] = {row["prompt"]: row["group"] for row in rows}
    groups = by_prompt[True]
    assert groups == by_prompt[False] and len(set(groups.values())) == 2
    assert list(groups.values()).count(groups[others[0]["prompt"]]) == 1


def test_an_ablation_line_gives_a_case(tmp_path: Path) -> None:
    (row,) = jsonl.ablation_cases(
        written(tmp_path, [REMOVAL | {"kind": "hint", "truth": "B"}]), n=ALL
    ).table.to_pylist()
    assert (row["span_start"], row["span_end"], row["kind"], row["truth"], row["stratum"]) == (0, 9, "hint", "B", "all")


def without(line: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != name}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", jsonl.NOT_JSON),
        ("[1, 2]", jsonl.NOT_AN_OBJECT),
        (without(PATCH, "source_prompt"), jsonl.NO_TEXT),
        (PATCH | {"base_prompt": 7}, jsonl.NO_TEXT),
        (without(PATCH, "base_span"), jsonl.NO_SPAN),
        (PATCH | {"base_span": [0, 1, 2]}, jsonl.NO_SPAN),
        (PATCH | {"base_span": [0, True]}, jsonl.NO_SPAN),
        (PATCH | {"base_span": [0, 99]}, positions.OUTSIDE),
        (PATCH | {"base_span": [4, 5]}, positions.NO_TOKEN),
        (PATCH | {"base_prompt": ""}, positions.EMPTY_PROMPT),
        (PATCH | {"base_span": [5, 12]}, jsonl.UNMATCHED),
        (PATCH | {"split": "dev"}, jsonl.NO_SPLIT),
        (PATCH | {"group": ["a"]}, jsonl.NO_STRING),
        (PATCH | {"group": " "}, jsonl.NO_GROUP),
    ],
)
def test_a_bad_patching_line_is_dropped_by_its_number(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: Any, reason: str
) -> None:
    file = written(tmp_path, [PATCH, "", line, PATCH | {"base_span": [10, 12], "source_span": [11, 13]}])
    made = jsonl.patching_cases(file, tokenizer, blocks=[(0, 1)], n=ALL)
    assert made.dropped == [("line 3", reason)]
    assert made.table.num_rows == 2


def test_a_bad_ablation_line_is_dropped_by_its_number(tmp_path: Path) -> None:
    bad = [REMOVAL | {"span": [0, 900]}, REMOVAL | {"span": "0-9"}, without(REMOVAL, "prompt")]
    made = jsonl.ablation_cases(written(tmp_path, [*bad, REMOVAL]), n=ALL)
    assert made.dropped == [("line 1", positions.OUTSIDE), ("line 2", jsonl.NO_SPAN), ("line 3", jsonl.NO_TEXT)]
    assert made.table.num_rows == 1


def test_bytes_that_are_no_text_are_a_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "bytes.jsonl"
    file.write_bytes(json.dumps(REMOVAL).encode() + b'\n{"prompt": "\xff\xfe"}\n')
    made = jsonl.ablation_cases(file, n=ALL)
    assert made.dropped == [("line 2", jsonl.NOT_UTF8)]


def test_a_packed_file_is_told_from_broken_json(tmp_path: Path) -> None:
    file = tmp_path / "packed.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(REMOVAL).encode()))
    assert ("line 1", jsonl.NOT_UTF8) in jsonl.ablation_cases(file, n=ALL).dropped


HALF = json.dumps(REMOVAL | {"prompt": "Hint: \ud800. Paris lies in"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (HALF, positions.HALF_CHARACTER),
        (HALF.replace("ud800", "uDFFF"), positions.HALF_CHARACTER),
        (json.dumps(REMOVAL | {"group": "\ud800"}), positions.HALF_CHARACTER),
        ('{"prompt":' + "[" * 100_000 + "]" * 100_000 + "}", jsonl.TOO_DEEP),
        ('{"prompt": "abc def", "span": [0, ' + "9" * 5000 + "]}", jsonl.LONG_NUMBER),
        ('{"prompt": "abc def", "span": [0, ' + "9" * 30 + "]}", positions.OUTSIDE),
        (b'{"prompt": "Hint: \xed\xa0\x80", "span": [0, 4]}', jsonl.NOT_UTF8),  # a surrogate written as UTF-8
    ],
)
def test_json_that_python_or_a_tokenizer_cannot_take_is_a_bad_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, line: str | bytes, reason: str
) -> None:
    file = tmp_path / "poison.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    file.write_bytes(json.dumps(REMOVAL).encode() + b"\n" + line)
    made = jsonl.ablation_cases(file, n=ALL)
    assert (made.table.num_rows, made.dropped) == (1, [("line 2", reason)])
    patch = line.replace(b'"prompt"', b'"base_prompt"').replace(b'"span"', b'"source_prompt": "Rome is", "base_span"')
    file.write_bytes(json.dumps(PATCH).encode() + b"\n" + patch.replace(b"]}", b'], "source_span": [0, 4]}'))
    made = jsonl.patching_cases(file, tokenizer, blocks=[(0, 0)], n=ALL)
    assert (made.table.num_rows, made.dropped) == (1, [("line 2", reason)])


def test_whole_characters_written_as_surrogate_pairs_stay(tmp_path: Path) -> None:
    prompt = "Hint: \N{WHITE SMILING FACE}\U0001f600. Paris lies in"
    (row,) = jsonl.ablation_cases(written(tmp_path, [REMOVAL | {"prompt": prompt}]), n=ALL).table.to_pylist()
    assert row["prompt"] == prompt


def test_a_case_that_comes_again_is_dropped_and_the_first_ones_are_kept(tmp_path: Path) -> None:
    other = REMOVAL | {"span": [10, 15]}
    lines = [line | {"split": "train"} for line in (REMOVAL, REMOVAL, other)]
    made = jsonl.ablation_cases(written(tmp_path, lines), n={"train": 5})
    assert (made.table.num_rows, [reason for _, reason in made.dropped]) == (2, [jsonl.REPEATED])
    made = jsonl.ablation_cases(written(tmp_path, lines), n={"train": 1})
    assert made.table["span_start"].to_pylist() == [0]
