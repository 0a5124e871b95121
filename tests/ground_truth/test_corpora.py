import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_explain import storage
from ray_explain.ground_truth import corpora
from ray_explain.ground_truth.corpora import NO_TEXT, read_windows, rows_about, texts, windows
from ray_explain.ground_truth.jsonl import NOT_AN_OBJECT, NOT_JSON
from ray_explain.ground_truth.positions import HALF_CHARACTER
from ray_explain.world.facts import World
from ray_explain.world.tokenizer import world_tokenizer

TEXTS = ["anna lives in paris .", "bob works for acme .", "carol was born in rome ."]


@pytest.fixture(scope="module")
def tokenizer():
    return world_tokenizer(World())


@pytest.fixture
def corpus(tmp_path):
    world = World()
    names = world.entities["person"][:30]
    lines = [" ".join(names[i : i + 20]) for i in range(10)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz", "a.parquet", ""])
def test_every_kind_of_corpus_gives_the_same_texts(tmp_path, name):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / (name or "part-0.jsonl")
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": TEXTS, "id": [1, 2, 3]}), path)
    elif ".txt" in name:
        path.write_bytes((gzip.compress if name.endswith("gz") else bytes)("\n\n".join(TEXTS).encode()))
    else:
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    dropped = []
    assert list(texts(str(path if name else tmp_path), "text", dropped)) == TEXTS
    assert dropped == []


def test_lines_without_a_text_are_dropped_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one"}\nnot json\n[1]\n{"body": "two"}\n\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "four"}\n'
    )
    dropped = []
    assert list(texts(str(path), "text", dropped)) == ["one", "four"]
    assert [reason for _, reason in dropped] == [NOT_JSON, NOT_AN_OBJECT, NO_TEXT, NO_TEXT, HALF_CHARACTER]
    assert dropped[0][0].endswith("a.jsonl line 2")


def test_a_wrong_field_or_no_file_is_told(tmp_path, tokenizer):
    pq.write_table(pa.table({"body": TEXTS}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; it has \['body'\]: set `corpus.field`"):
        windows(str(tmp_path / "a.parquet"), "text", tokenizer, n=5, tokens=8)
    (tmp_path / "a.jsonl").write_text('{"body": "one two"}\n' * 3)
    with pytest.raises(ValueError, match=r"3 lines or rows gave none, the first: .*a.jsonl line 1: .*corpus.field"):
        windows(str(tmp_path / "a.jsonl"), "text", tokenizer, n=5, tokens=8)
    (tmp_path / "a.csv").write_text("text\none two\n")
    with pytest.raises(ValueError, match=r"no corpus at .*a.csv: it is a file, or a folder of files, ending in"):
        windows(str(tmp_path / "a.csv"), "text", tokenizer, n=5, tokens=8)
    with pytest.raises(ValueError, match="no corpus at"):
        windows(str(tmp_path / "nothing.jsonl"), "text", tokenizer, n=5, tokens=8)
    with pytest.raises(ValueError, match=r"ending in \.parquet, \.jsonl"):
        windows(str(tmp_path / "nothing"), "text", tokenizer, n=5, tokens=8)


def test_windows_are_whole_texts_cut_in_order_and_never_hold_two(corpus, tokenizer):
    made = windows(str(corpus), "text", tokenizer, n=1000, tokens=8).table.to_pylist()
    lines = corpus.read_text().splitlines()
    ids = [tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] for line in lines]
    by_hand = [own[start : start + 8] for own in ids for start in (0, 8)]  # the last 4 of 20 are too short
    assert [row["tokens"] for row in made] == by_hand
    assert [row["window"] for row in made] == list(range(20))
    few = windows(str(corpus), "text", tokenizer, n=7, tokens=8).table.to_pylist()
    assert few == made[:7]


def test_windows_do_not_depend_on_how_many_texts_are_read_at_a_time(corpus, tokenizer, monkeypatch):
    whole = windows(str(corpus), "text", tokenizer, n=15, tokens=8).table
    monkeypatch.setattr(corpora, "_TEXTS_AT_A_TIME", 3)
    assert windows(str(corpus), "text", tokenizer, n=15, tokens=8).table.equals(whole)


def test_windows_are_read_back_by_number(tmp_path, corpus, tokenizer):
    table = windows(str(corpus), "text", tokenizer, n=20, tokens=8).table
    storage.write_table(table, str(tmp_path / "table" / "part.parquet"), row_group_size=4)
    (tmp_path / "table" / "manifest.json").write_text("{}")
    found = read_windows(str(tmp_path / "table"), [17, 2])
    assert found == {number: table["tokens"][number].as_py() for number in (2, 17)}


def test_of_a_table_of_features_those_asked_for_are_read_and_not_what_lies_between_two_layers(tmp_path):
    rows = [{"layer": layer, "feature_id": number} for layer in (0, 1) for number in range(6) for _ in range(2)]
    table = pa.Table.from_pylist(rows, pa.schema([("layer", pa.int32()), ("feature_id", pa.int32())]))
    storage.write_table(table, f"{tmp_path}/table.parquet", row_group_size=4)
    asked = pa.Table.from_pylist([{"layer": 0, "feature_id": 5}, {"layer": 1, "feature_id": 0}], table.schema)
    assert rows_about(str(tmp_path), asked).to_pylist() == [rows[10], rows[11], rows[12], rows[13]]
    beside = rows_about(str(tmp_path), asked, beside=(-1, 1)).to_pylist()
    assert beside == [rows[8], rows[9], rows[14], rows[15]]
    assert rows_about(str(tmp_path), asked.slice(2)).num_rows == 0
