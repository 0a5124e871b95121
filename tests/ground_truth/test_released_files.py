import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import released, released_files
from ray_explain.ground_truth.features import split_features
from ray_explain.ground_truth.jsonl import REPEATED
from ray_explain.ground_truth.mmlu import Item
from ray_explain.ground_truth.outcomes import NOT_FINITE
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.released_files import read_feature_folder, read_folder, write_folder
from ray_explain.questions.features import features_questions
from ray_explain.stages import READ, Result
from tests.ground_truth.conftest import make_case, patching_table
from tests.ground_truth.test_released import BASE, SOURCE, released_hint

DESCRIPTIONS = pa.list_(
    pa.struct([records.DESCRIPTIONS.field(name) for name in ("description", "origin", "score", "gold")])
)
N = {"train": 10, "validation": 0, "test": 10}


def read_whole(folder: Path, task: str, tokenizer: PreTrainedTokenizerFast, **settings: Any) -> Result:
    parts = list(read_folder(str(folder), task, tokenizer, **settings))
    (size,) = {part.measured[READ] for part in parts}
    table, dropped = pa.concat_tables(part.table for part in parts), [one for part in parts for one in part.dropped]
    assert table.num_rows + len(dropped) == size
    return Result(table, dropped)


@pytest.fixture
def effects(config: dict[str, Any]) -> pa.Table:
    cases = [
        make_case(BASE, SOURCE, at, at, block=(layer, layer), split=split)
        for layer, split in [(0, "train"), (1, "train"), (2, "test")]
        for at in (3, 9)
    ]
    return PatchingStage(config)(patching_table(cases)).table


def test_patching_effects_come_back_from_a_folder_with_their_splits(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert write_folder(effects, "patching", str(tmp_path), tokenizer) == {"train": (4, 0), "test": (2, 0)}
    made = read_whole(tmp_path, "patching", tokenizer, d_model=32, n=N)
    same = ["split", "base_prompt", "first_layer", "base_positions", "vectors", "patched_answer", "changed"]
    assert made.table.select(same).equals(effects.select(same))
    assert made.dropped == []
    few = read_whole(tmp_path, "patching", tokenizer, d_model=32, n=N | {"train": 1})
    assert few.table["split"].to_pylist() == ["train", "test", "test"]


def test_the_hubs_layout_is_read_and_repeated_rows_are_counted(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = released.write_patching(effects, tokenizer).table
    (tmp_path / "data").mkdir()
    for i, part in enumerate([table, table.slice(0, 2)]):
        pq.write_table(part, tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    made = read_whole(tmp_path, "patching", tokenizer, d_model=32, n={"train": 100})
    assert made.table.num_rows == 6
    assert [reason for _, reason in made.dropped] == [REPEATED] * 2


def test_files_of_a_split_whose_name_only_begins_alike_are_not_read(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = released.write_patching(effects, tokenizer).table
    (tmp_path / "data").mkdir()
    pq.write_table(table.slice(0, 1), tmp_path / "train.parquet")
    pq.write_table(table.slice(1, 1), tmp_path / "data" / "train-00000-of-00001.parquet")
    for name in ("train_full.parquet", "data/train_full-00000-of-00001.parquet"):
        pq.write_table(table.slice(2), tmp_path / name)
    made = read_whole(tmp_path, "patching", tokenizer, d_model=32, n={"train": 100})
    assert (made.table.num_rows, made.dropped) == (2, [])


def test_a_data_set_is_read_alike_however_many_rows_at_a_time(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = released.write_patching(effects, tokenizer).table.to_pylist()
    rows[2]["layer"] = []
    table = pa.Table.from_pylist(rows, schema=released.PATCHING)
    for i, part in enumerate([table.slice(0, 4), table.slice(3)]):
        pq.write_table(part, tmp_path / f"train-{i}.parquet", row_group_size=3)
    settings: dict[str, Any] = {"d_model": 32, "n": {"train": 6}}
    whole = read_whole(tmp_path, "patching", tokenizer, **settings)
    assert whole.table.num_rows == 4
    assert [place for place, reason in whole.dropped if reason == released.NO_BLOCK] == ["train row 2"]
    assert [reason for _, reason in whole.dropped].count(REPEATED) == 1
    monkeypatch.setattr(released_files, "_ROWS_AT_A_TIME", 2)
    parts = list(read_folder(str(tmp_path), "patching", tokenizer, **settings))
    assert len(parts) > 2 and max(part.table.num_rows for part in parts) <= 2
    again = read_whole(tmp_path, "patching", tokenizer, **settings)
    told = [name for name in whole.table.column_names if not name.endswith("logprob") and name != "kl"]  # NaN
    assert again.table.select(told).equals(whole.table.select(told)) and again.dropped == whole.dropped


def test_vectors_of_another_target_are_refused(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_folder(effects, "patching", str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="are 32 wide, the target's residual stream 64"):
        read_whole(tmp_path, "patching", tokenizer, d_model=64, n=N)


def test_a_split_without_a_file_is_named(effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_folder(effects.slice(0, 4), "patching", str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match=r"no test\.parquet or test-\*\.parquet in .*set `cases.test` to 0"):
        read_whole(tmp_path, "patching", tokenizer, d_model=32, n=N)


def test_ablation_effects_are_written_with_their_questions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    items = [Item("geography", i, f"Where is {i}?", ("Italy", "France", "Spain", "Peru"), "ABCD"[i]) for i in range(3)]
    rows = [released_hint(tokenizer, item, "B") for item in items]
    pq.write_table(pa.Table.from_pylist(rows, schema=released.ABLATION), tmp_path / "test.parquet")
    effects = read_whole(tmp_path, "ablation", tokenizer, d_model=32, n=N | {"train": 0}).table
    mmlu = tmp_path / "mmlu.jsonl"
    lines = [
        {"subject": i.subject, "question": i.question, "choices": i.choices, "answer": i.answer} for i in items[:2]
    ]
    mmlu.write_text("\n".join(json.dumps(line) for line in lines))
    folder = tmp_path / "out"
    assert write_folder(effects, "ablation", str(folder), tokenizer, mmlu=str(mmlu)) == {"test": (2, 1)}
    assert pq.read_table(folder / "test.parquet").to_pylist() == rows[:2]
    with pytest.raises(ValueError, match="holds MMLU questions"):
        write_folder(effects, "ablation", str(folder), tokenizer)


def released_features(folder: Path) -> None:
    """Layers 0 and 1 of a target of width 4, six features each: five in train, in test the other and one again."""
    generator = np.random.default_rng(0)
    (folder / "explanations").mkdir(parents=True)
    (folder / "features").mkdir()
    for layer in range(2):
        np.save(folder / "features" / f"layer_{layer}.npy", generator.normal(size=(4, 6)).astype(np.float32))

    def label(layer: int, number: int) -> dict[str, Any]:
        texts = [f"about {layer} {number}", "something else"]
        return {"chosen_label": texts[0], "all_labels": texts, "all_label_scores": {texts[0]: 0.1, texts[1]: 0.9}}

    for split, numbers in [("train", range(5)), ("test", (5, 0))]:
        labels = [[[layer, f"f{number}"], label(layer, number)] for layer in range(2) for number in numbers]
        (folder / "explanations" / f"{split}_explanations.json").write_text(json.dumps(labels))


def read_all(folder: Path, layers: list[int] | None = None, **changes: Any) -> tuple[pa.Table, list[str]]:
    settings: dict[str, Any] = {"d_model": 4, "per_layer": None, "seed": 0, **changes}
    parts = list(read_feature_folder(str(folder), layers or [0, 1], **settings))
    return pa.concat_tables(part.table for part in parts), [why for part in parts for _, why in part.dropped]


def test_released_features_are_read_with_their_splits_directions_and_chosen_labels(tmp_path: Path) -> None:
    released_features(tmp_path)
    table, dropped = read_all(tmp_path)
    rows = table.to_pylist()
    assert [(row["split"], row["layer"], row["feature_id"]) for row in rows] == [
        *[("train", layer, number) for layer in range(2) for number in range(5)],
        *[("test", layer, 5) for layer in range(2)],
    ]
    assert dropped == [REPEATED] * 2, "a feature of the training split is in no other"
    decoder = np.load(tmp_path / "features" / "layer_1.npy")
    np.testing.assert_array_equal(rows[7]["vectors"][0], decoder[:, 2])
    questions = features_questions(*split_features(table), wording="paper", seed=0).table
    assert questions["answer"].to_pylist()[7] == "about 1 2", "the chosen label, not the one of the best score"
    assert questions["answers"].to_pylist()[7] == ["about 1 2", "something else"]
    some, _ = read_all(tmp_path, [1], per_layer=2)
    assert some["layer"].to_pylist() == [1] * 3 and some["split"].to_pylist() == ["train"] * 2 + ["test"]


def test_released_features_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    released_features(tmp_path)
    with pytest.raises(ValueError, match=r"layer_0.npy is \[4, 6\]: directions of this target .* columns of 32"):
        read_all(tmp_path, d_model=32)
    with pytest.raises(ValueError, match=r"no \*_explanations.json with labels of layers \[7\]"):
        read_all(tmp_path, [7])
    decoder = np.load(tmp_path / "features" / "layer_0.npy")
    decoder[2, 3] = np.nan
    np.save(tmp_path / "features" / "layer_0.npy", decoder)
    table, dropped = read_all(tmp_path, [0])
    assert table["feature_id"].to_pylist() == [0, 1, 2, 4, 5] and dropped.count(NOT_FINITE) == 1
    for path in (tmp_path / "explanations").iterdir():
        path.rename(path.with_suffix(".pkl"))
    with pytest.raises(ValueError, match="is a pickle, which can run code when it is opened"):
        read_all(tmp_path)


def test_features_are_written_as_labels_and_decoders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told = [{"description": "cats", "origin": "world", "score": 0.5, "gold": True}]
    decoders = dict.fromkeys((0, 1), np.eye(4))
    read = released.read_features([((0, 1), None), ((1, 3), None)], decoders, split="train")
    effects = read.features.append_column("descriptions", pa.array([told, []], type=DESCRIPTIONS))
    assert write_folder(effects, "features", str(tmp_path), tokenizer) == {"train": (1, 1)}
    assert [key for key, _ in released.read_labels(tmp_path / "train_explanations.json")] == [(0, 1)]
    decoder = np.load(tmp_path / "features" / "layer_1.npy")
    np.testing.assert_array_equal(decoder, np.array([[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]]))
    assert not (tmp_path / "train_layer_feature_idxs.json").exists()
    assert write_folder(effects, "features", str(tmp_path), tokenizer, listed=True) == {"train": (2, 0)}
    assert released.read_numbers(tmp_path / "train_layer_feature_idxs.json") == [(0, 1), (1, 3)]


def released_vectors(folder: Path) -> np.ndarray:
    """Five vectors of width 4 of the test split: three of layer 0, two of layer 1, out of order."""
    folder.mkdir(exist_ok=True)
    vectors = np.random.default_rng(2).normal(size=(5, 4)).astype(np.float32)
    np.save(folder / "test_vectors.npy", vectors)
    (folder / "test_indices.json").write_text(json.dumps([[1, 4], [0, 0], [0, 2], [1, 1], [0, 3]]))
    return vectors


def test_vectors_that_were_read_keep_their_rows_when_they_are_written(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    vectors, again = released_vectors(tmp_path), tmp_path / "again"
    table, _ = read_all(tmp_path, vectors="difference", unlabelled=True)
    write_folder(table, "features", str(again), tokenizer)
    np.testing.assert_array_equal(np.load(again / "test_vectors.npy"), vectors)
    assert read_all(again, vectors="difference", unlabelled=True)[0].equals(table)


def test_released_vectors_are_read_where_it_is_told_what_they_are(tmp_path: Path) -> None:
    vectors = released_vectors(tmp_path)
    table, dropped = read_all(tmp_path, vectors="activation", unlabelled=True)
    assert dropped == [] and set(table["split"].to_pylist()) == {"test"}
    keys = list(zip(table["layer"].to_pylist(), table["feature_id"].to_pylist()))
    assert keys == [(0, 0), (0, 2), (0, 3), (1, 4), (1, 1)]
    np.testing.assert_array_equal(np.concatenate(records.vectors_of(table["vectors"])), vectors[[0, 2, 3, 4, 1]])
    assert table["source"].to_pylist() == ["activation"] * 5 and len(set(table["group"].to_pylist())) == 5
    assert table["descriptions"].to_pylist() == [[]] * 5
    some, _ = read_all(tmp_path, [0], vectors="activation", unlabelled=True, per_layer=2)
    assert some["layer"].to_pylist() == [0, 0]


def test_labels_of_a_split_that_has_vectors_are_theirs(tmp_path: Path) -> None:
    """An explainer is trained on an SAE's features, and tried on vectors."""
    released_features(tmp_path)
    before, _ = read_all(tmp_path)
    vectors = released_vectors(tmp_path)
    assert read_all(tmp_path)[0].equals(before), "unless it is told what they are, vectors are not looked at"
    table, dropped = read_all(tmp_path, vectors="difference", unlabelled=True)
    assert dropped == [] and table["source"].to_pylist() == ["sae"] * 10 + ["difference"] * 5
    assert table.slice(0, 10).equals(before.slice(0, 10))
    numbers, told = (table[name].to_pylist()[10:] for name in ("feature_id", "descriptions"))
    own = dict(zip(numbers, told))
    assert [one["description"] for one in own[0]] == ["about 0 0", "something else"] and own[2] == []
    np.testing.assert_array_equal(table["vectors"][10].as_py()[0], vectors[0])


def test_features_of_a_list_without_labels_are_read_where_labels_are_not_needed(tmp_path: Path) -> None:
    released_features(tmp_path)
    before, _ = read_all(tmp_path)
    (tmp_path / "train_layer_feature_idxs.json").write_text(json.dumps([[0, 3]]))
    (tmp_path / "validation_layer_feature_idxs.json").write_text(json.dumps([[1, 3], [0, "f5"]]))
    assert read_all(tmp_path)[0].equals(before)
    (tmp_path / "explanations" / "test_explanations.json").unlink()
    table, dropped = read_all(tmp_path, unlabelled=True)
    assert table["split"].to_pylist() == ["train"] * 10 + ["validation"] and dropped == [REPEATED]
    assert table["feature_id"][10].as_py() == 5 and table["descriptions"][10].as_py() == []


def test_released_vectors_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    vectors = released_vectors(tmp_path)
    wanted: dict[str, Any] = {"vectors": "activation", "unlabelled": True}
    with pytest.raises(ValueError, match=r"no \*_explanations.json .*for its vectors, say what they are: `vec"):
        read_all(tmp_path)
    with pytest.raises(ValueError, match="to its vectors belongs a `describer`, which needs exemplars in the folder"):
        read_all(tmp_path, vectors="activation")
    with pytest.raises(ValueError, match=r"test_vectors.npy is \[5, 4\]: vectors of this target stand in rows of 32"):
        read_all(tmp_path, **wanted, d_model=32)
    with pytest.raises(ValueError, match=r"no \*_explanations.json with labels of layers \[7\]"):
        read_all(tmp_path, [7], **wanted)
    np.save(tmp_path / "test_vectors.npy", vectors[:4])
    with pytest.raises(ValueError, match=r"has 5 indices for 4 vectors: one .* for each"):
        read_all(tmp_path, **wanted)
    vectors[2, 1] = np.nan
    np.save(tmp_path / "test_vectors.npy", vectors)
    table, dropped = read_all(tmp_path, **wanted)
    assert table.num_rows == 4 and dropped == [NOT_FINITE]
    np.save(tmp_path / "test_vectors.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"test_vectors.npy is no array of numbers"):
        read_all(tmp_path, **wanted)
    (tmp_path / "test_vectors.npy").rename(tmp_path / "test_vectors.pt")
    with pytest.raises(ValueError, match=r"is a pickle, which can run code .* torch.load\(path\).float\(\).numpy\(\)"):
        read_all(tmp_path, **wanted)
