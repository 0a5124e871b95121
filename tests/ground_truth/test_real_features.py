"""SAEs and descriptions on a real small model and real text."""

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ray_explain import records, storage
from ray_explain.ground_truth import corpora
from ray_explain.ground_truth.describers import DescribeStage
from ray_explain.ground_truth.dictionaries import DictionaryStage
from ray_explain.ground_truth.exemplars import MergeStage, SearchStage, shards
from ray_explain.ground_truth.target import Target

SIZES = {"top": 10, "random": 10, "near": 0}
N_WINDOWS, POSITIONS = 600, 32


@pytest.fixture(scope="module")
def made(data: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Exemplars of a small SAE of the middle layer."""
    folder, model = tmp_path_factory.mktemp("features"), str(data / "models" / "stories260k")
    place = {"model": model, "revision": None, "dtype": "float32"}
    tokenizer = Target(place).tokenizer
    windows = corpora.windows(str(data / "tinystories.txt"), "text", tokenizer, n=N_WINDOWS, tokens=POSITIONS)
    storage.write_table(windows.table, f"{folder}/windows/table.parquet", row_group_size=64)
    config: dict[str, Any] = place | {
        "windows": f"{folder}/windows",
        "n_windows": N_WINDOWS,
        "source": "sae",
        "sae": None,
        "folder": f"{folder}/dictionaries",
        **{
            "per_layer": None,
            "d_sae": 128,
            "k": 6,
            "steps": 200,
            "seed": 0,
            "labels": None,
            "vectors": None,
            "split": None,
        },
        "exemplars": SIZES,
        "positions": POSITIONS,
    }
    features = DictionaryStage(config)(pa.table({"layer": pa.array([2], type=pa.int32())})).table
    assert 0 < features["fvu"][0].as_py() < 0.6 and features["dead_fraction"][0].as_py() < 0.3
    storage.write_table(features, f"{folder}/features/part.parquet")
    search = SearchStage(config | {"features": f"{folder}/features"})
    found = search(shards(features, N_WINDOWS, positions=POSITIONS, kept=20)).table
    storage.write_table(records.conform(found, search.schema_out), f"{folder}/found/part.parquet")
    return MergeStage(config | {"found": f"{folder}/found"})(features).table


def test_what_a_feature_responds_to_is_the_same_in_all_its_top_windows(made: pa.Table) -> None:
    """Tokens at the peaks of a feature agree, as those of its random windows do not."""
    agreement: dict[str, list[float]] = {"top": [], "random": []}
    for feature in made.to_pylist():
        for kind, shares in agreement.items():
            own = [window for window in feature["windows"] if window["kind"] == kind]
            if len(own) == SIZES["top"]:
                peaks = [window["tokens"][_peak(window, kind)] for window in own]
                shares.append(Counter(peaks).most_common(1)[0][1] / len(peaks))
    top, chance = (sum(shares) / len(shares) for shares in agreement.values())
    assert len(agreement["top"]) > 60
    assert top > 0.4 and top > 1.5 * chance


def _peak(window: dict[str, Any], kind: str) -> int:
    activations = window["activations"]
    return activations.index(max(activations)) if kind == "top" else len(activations) // 2


def test_windows_show_the_stories_text(made: pa.Table, data: Path) -> None:
    text = " ".join((data / "tinystories.txt").read_text().split())
    for feature in made.slice(0, 5).to_pylist():
        for window in feature["windows"][:3]:
            assert " ".join("".join(window["tokens"]).split()) in text


def test_a_real_local_model_describes_or_is_counted(made: pa.Table, data: Path) -> None:
    section = {"kind": "local", "path": str(data / "models" / "stories260k"), "revision": None, "dtype": "float32"}
    stage = DescribeStage({"describer": section | {"batch_size": 8}, "candidates": 1})
    described = stage(made.slice(0, 12))
    assert described.table.num_rows + len(described.dropped) == 12
    for own in described.table["descriptions"].to_pylist():
        assert own[0]["origin"].endswith("stories260k") and any(map(str.isalnum, own[0]["description"]))
