import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import released
from ray_explain.ground_truth.mmlu import Item
from ray_explain.ground_truth.patching import PatchingStage
from ray_explain.ground_truth.released_files import REPEATED, read_folder, write_folder
from tests.ground_truth.conftest import make_case, patching_table
from tests.ground_truth.test_released import BASE, SOURCE, released_hint

DESCRIPTIONS = pa.list_(
    pa.struct([records.DESCRIPTIONS.field(name) for name in ("description", "origin", "score", "gold")])
)
N = {"train": 10, "validation": 0, "test": 10}


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
    made = read_folder(str(tmp_path), "patching", tokenizer, d_model=32, n=N)
    same = ["split", "base_prompt", "first_layer", "base_positions", "vectors", "patched_answer", "changed"]
    assert made.table.select(same).equals(effects.select(same))
    assert made.dropped == []
    few = read_folder(str(tmp_path), "patching", tokenizer, d_model=32, n=N | {"train": 1})
    assert few.table["split"].to_pylist() == ["train", "test", "test"]


def test_the_hubs_layout_is_read_and_repeated_rows_are_counted(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    table = released.write_patching(effects, tokenizer).table
    (tmp_path / "data").mkdir()
    for i, part in enumerate([table, table.slice(0, 2)]):
        pq.write_table(part, tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    made = read_folder(str(tmp_path), "patching", tokenizer, d_model=32, n={"train": 100})
    assert made.table.num_rows == 6
    assert [reason for _, reason in made.dropped] == [REPEATED] * 2


def test_vectors_of_another_target_are_refused(
    effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_folder(effects, "patching", str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match="are 32 wide, the target's residual stream 64"):
        read_folder(str(tmp_path), "patching", tokenizer, d_model=64, n=N)


def test_a_split_without_a_file_is_named(effects: pa.Table, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_folder(effects.slice(0, 4), "patching", str(tmp_path), tokenizer)
    with pytest.raises(ValueError, match=r"no test\*\.parquet in .*set `cases.test` to 0"):
        read_folder(str(tmp_path), "patching", tokenizer, d_model=32, n=N)


def test_ablation_effects_are_written_with_their_questions(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    items = [Item("geography", i, f"Where is {i}?", ("Italy", "France", "Spain", "Peru"), "ABCD"[i]) for i in range(3)]
    rows = [released_hint(tokenizer, item, "B") for item in items]
    pq.write_table(pa.Table.from_pylist(rows, schema=released.ABLATION), tmp_path / "test.parquet")
    effects = read_folder(str(tmp_path), "ablation", tokenizer, d_model=32, n=N | {"train": 0}).table
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


def test_features_are_written_as_labels_and_decoders(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    told = [{"description": "cats", "origin": "world", "score": 0.5, "gold": True}]
    read = released.read_vectors(np.eye(4, dtype=np.float32)[:2], [(0, 1), (1, 3)], source="difference", split="train")
    effects = read.append_column("descriptions", pa.array([told, []], type=DESCRIPTIONS))
    assert write_folder(effects, "features", str(tmp_path), tokenizer) == {"train": (1, 1)}
    assert [key for key, _ in released.read_labels(tmp_path / "train_explanations.json")] == [(0, 1)]
    decoder = np.load(tmp_path / "features" / "layer_1.npy")
    np.testing.assert_array_equal(decoder, np.array([[0] * 4, [0, 0, 0, 1], [0] * 4, [0] * 4]))
