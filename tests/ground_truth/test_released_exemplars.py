"""Exemplars and vectors in the layout of the paper's release, made by hand, read and written."""

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from ray_explain import records
from ray_explain.ground_truth import released
from ray_explain.ground_truth.exemplars import EXEMPLARS, NEVER_ACTIVE, token_texts
from ray_explain.ground_truth.features import joined
from ray_explain.ground_truth.outcomes import NOT_FINITE
from ray_explain.ground_truth.released_exemplars import (
    NEAR,
    NO_EXEMPLARS,
    OTHER_TOKENS,
    ReleasedExemplars,
    write_exemplars,
)
from ray_explain.ground_truth.released_files import read_feature_folder, write_folder

BEGIN, PAD = 0, 1  # of the tokenizers of these tests; the second is their end-of-text token, they have no padding
TOP = ["Rome lies in Italy.", "Paris 日本 lies", "Berlin", "a blue boat € ö"]
OFF = ["Lily had a red ball.", "Tom"]
ABOUT = {"hf_model_id": "some/target", "hf_dataset_configs": [{"hf_dataset_id": "some/texts"}], "seed": 64}
SIZES = {"top": 2, "random": 1}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text)["input_ids"]]


def arrays(rows: Sequence[Sequence[str]], tokenizer: PreTrainedTokenizerFast, width: int, seed: int) -> dict[str, Any]:
    """`max_` arrays of windows of these texts, padded on the left; a feature is on in those of a `seed` above 0."""
    generator, k = np.random.default_rng(seed), max(map(len, rows))
    ids = np.full((len(rows), k, width), PAD, np.int32)
    acts = np.full((len(rows), k, width), -np.inf, np.float32)
    for row, texts in enumerate(rows):
        for place, text in enumerate(texts):
            own = ids_of(tokenizer, text)
            values = generator.random(len(own)) * (seed > 0)
            values[: own[0] == BEGIN] = 0
            ids[row, place, width - len(own) :], acts[row, place, width - len(own) :] = own, values
    return {"seq_ids": ids, "seq_acts": acts, "dataset_ids": np.zeros((len(rows), k), np.int32)}


def none_of(own: dict[str, Any]) -> dict[str, Any]:
    """`min_` arrays where no window of negative activation was kept."""
    return own | {"seq_ids": np.full_like(own["seq_ids"], PAD), "seq_acts": np.full_like(own["seq_acts"], np.inf)}


def save(folder: Path, own: dict[str, Any], *, strongest: bool) -> None:
    folder.mkdir(parents=True)
    for kind, made in (("max", own), ("min", none_of(own))):
        for name, array in made.items():
            np.save(folder / f"{kind}_{name}.npy", array)
        if strongest:
            best = made["seq_acts"].max(axis=2)
            np.save(folder / f"{kind}_acts.npy", best)


def release(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A set of four vectors of width 4: of layer 0 the first and the third, of layer 1 the others; each with two top
    windows and a random one."""
    folder.mkdir(parents=True)
    np.save(folder / "test_vectors.npy", np.random.default_rng(1).normal(size=(4, 4)).astype(np.float32))
    (folder / "test_indices.json").write_text(json.dumps([[0, 0], [1, 1], [0, 2], [1, 3]]))
    width = max(len(ids_of(tokenizer, text)) for text in TOP + OFF)
    for layer in range(2):
        top, off = [TOP[:2], TOP[1:3]] if layer else [TOP[2:], TOP[:2]], [OFF[:1], OFF[1:]]
        save(folder / "train" / f"layer{layer}", arrays(top, tokenizer, width, 1 + layer), strongest=True)
        (folder / "train" / f"layer{layer}" / "num_tokens_seen.txt").write_text(str(500 * width))
        save(folder / "random_train" / f"layer{layer}", arrays(off, tokenizer, width, 0), strongest=False)
    own = {"num_seqs": 500, "seq_len": width, "k": 2, "num_top_acts_to_save": 2, "rand_seqs": 1}
    told = {"activation_type": "custom", "indices_file": None}
    (folder / "exemplar_config.json").write_text(json.dumps(ABOUT | own | told))
    return folder


def vectors_in(folder: Path, layers: Sequence[int] = (0, 1), **changes: Any) -> pa.Table:
    settings: dict[str, Any] = {"d_model": 4, "per_layer": None, "seed": 0, "vectors": "difference"}
    parts = read_feature_folder(str(folder), layers, **{**settings, "unlabelled": True, **changes})
    return pa.concat_tables(part.table for part in parts)


def exemplars_in(
    folder: Path, tokenizer: PreTrainedTokenizerFast, features: pa.Table, **changes: Any
) -> tuple[pa.Table, list[str]]:
    made = ReleasedExemplars(str(folder), tokenizer, **{**SIZES, **changes}).of(features)
    return made.table, [reason for _, reason in made.dropped]


def content(folder: Path) -> dict[str, Any]:
    """Of each file in a folder what it says, arrays with their type."""

    def of(path: Path) -> Any:
        if path.suffix == ".npy":
            array = np.load(path)
            return str(array.dtype), array.tolist()
        return json.loads(path.read_text())

    return {str(path.relative_to(folder)): of(path) for path in folder.rglob("*") if path.is_file()}


def test_released_vectors_and_exemplars_come_back_as_they_were(
    either_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, again = release(tmp_path / "release", either_tokenizer), tmp_path / "again"
    effects = vectors_in(folder)
    exemplars, dropped = exemplars_in(folder, either_tokenizer, effects)
    assert dropped == [] and effects.num_rows == exemplars.num_rows == 4
    in_order = effects.take(pa.array([0, 2, 1, 3]))  # read layer by layer
    assert write_folder(in_order, "features", str(again), either_tokenizer) == {"test": (4, 0)}
    assert write_exemplars(exemplars, in_order, str(again), either_tokenizer, about=ABOUT) == (12, {})
    assert content(again) == content(folder)


def test_released_exemplars_are_windows_of_the_targets_tokens(
    either_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = release(tmp_path / "release", either_tokenizer)
    exemplars, _ = exemplars_in(folder, either_tokenizer, vectors_in(folder))
    assert exemplars.schema == EXEMPLARS
    rows = {row["feature_id"]: row for row in exemplars.to_pylist()}
    assert [(rows[i]["layer"], rows[i]["source"], rows[i]["fired"], rows[i]["seen"]) for i in range(4)] == [
        (layer, "difference", 2, 500) for layer in (0, 1, 0, 1)
    ]
    told = {i: [(w["kind"], w["rank"], "".join(w["tokens"])) for w in rows[i]["windows"]] for i in rows}
    assert told[0] == [("top", 0, TOP[2]), ("top", 1, TOP[3]), ("random", 0, OFF[0])]
    assert told[2] == [("top", 0, TOP[0]), ("top", 1, TOP[1]), ("random", 0, OFF[1])]
    assert told[3] == [("top", 0, TOP[1]), ("top", 1, TOP[2]), ("random", 0, OFF[1])]
    acts = np.load(folder / "train" / "layer1" / "max_seq_acts.npy")[1, 0]
    window = rows[3]["windows"][0]
    assert window["tokens"].count("") >= 4, "two characters of three bytes, a token each"
    np.testing.assert_array_equal(window["activations"], acts[len(acts) - len(window["tokens"]) :])
    assert rows[0]["windows"][2]["activations"] == [0.0] * len(rows[0]["windows"][2]["tokens"])


@pytest.fixture
def ours(either_tokenizer: PreTrainedTokenizerFast) -> tuple[pa.Table, pa.Table]:
    """Labelled features of an SAE in two splits, one of them without exemplars, and exemplars with near misses."""
    decoders = {layer: np.random.default_rng(layer).normal(size=(4, 3)).astype(np.float32) for layer in (0, 1)}
    label = {"chosen_label": "cats", "all_labels": ["cats"], "all_label_scores": {"cats": 0.5}}
    parts = []
    for split, keys in [("test", [(1, 0), (0, 1)]), ("train", [(0, 2), (1, 2), (0, 0)])]:
        read = released.read_features([(key, label) for key in keys], decoders, split=split)
        parts.append(joined(read.features, read.descriptions))
    effects = pa.concat_tables(parts)
    rows = [
        {name: row[name] for name in ("case_id", "group", "split", "layer", "source", "feature_id")}
        | {"l0": None, "fvu": None, "dead_fraction": None, "fired": 2, "seen": 700}
        | {"windows": windows(either_tokenizer, i)}
        for i, row in enumerate(effects.to_pylist()[:-1])
    ]
    return effects, records.rows_table(rows, EXEMPLARS)


def windows(tokenizer: PreTrainedTokenizerFast, seed: int) -> list[dict[str, Any]]:
    generator, found = np.random.default_rng(seed), []
    for kind, texts in (("top", TOP[seed % 3 :][:2]), ("random", OFF[:1]), ("near", OFF[1:])):
        for rank, text in enumerate(texts):
            tokens = token_texts(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])
            values = generator.random(len(tokens)).astype(np.float32) * (kind == "top")
            found.append({"kind": kind, "rank": rank, "tokens": tokens, "activations": values.tolist()})
    return found


def without_near(exemplars: pa.Table) -> list[dict[str, Any]]:
    return [row | {"windows": [w for w in row["windows"] if w["kind"] != "near"]} for row in exemplars.to_pylist()]


def test_our_exemplars_come_back_from_the_released_layout_but_for_near_misses(
    ours: tuple[pa.Table, pa.Table], either_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    effects, exemplars = ours
    write_folder(effects, "features", str(tmp_path), either_tokenizer, listed=True)
    assert write_exemplars(exemplars, effects, str(tmp_path), either_tokenizer, about=ABOUT) == (12, {NEAR: 4})
    again = vectors_in(tmp_path, vectors=None)
    read, dropped = exemplars_in(tmp_path, either_tokenizer, again)
    by_case = {row["case_id"]: row for row in read.to_pylist()}
    assert by_case == {row["case_id"]: row for row in without_near(exemplars)}
    assert dropped == [NO_EXEMPLARS], "a feature without windows has a row, but none on it"
    config = json.loads((tmp_path / "exemplar_config.json").read_text())
    told = {"activation_type": "SAE_RES", "num_seqs": 700, "k": 2, "rand_seqs": 1, "hf_model_id": "some/target"}
    assert told.items() <= config.items()


def test_our_vectors_come_back_from_the_released_layout(
    either_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    generator, parts = np.random.default_rng(0), []
    label = {"chosen_label": "cats", "all_labels": ["cats"], "all_label_scores": {"cats": 0.5}}
    for split, layers in [("train", (1, 0, 0)), ("test", (1, 0))]:
        vectors = generator.normal(size=(4, len(layers))).astype(np.float32)
        labels = [((layer, i), label if split == "train" and i != 1 else None) for i, layer in enumerate(layers)]
        read = released.read_features(labels, {0: vectors, 1: vectors}, split=split, source="activation")
        parts.append(joined(read.features, read.descriptions))
    effects = pa.concat_tables(parts)
    assert write_folder(effects, "features", str(tmp_path), either_tokenizer) == {"train": (3, 0), "test": (2, 0)}
    again = vectors_in(tmp_path, vectors="activation")
    assert {row["case_id"]: row for row in again.to_pylist()} == {row["case_id"]: row for row in effects.to_pylist()}
    assert not (tmp_path / "features").exists() and not (tmp_path / "test_explanations.json").exists()
    for name in ("case_id", "group"):
        assert len(set(again[name].to_pylist())) == 5, "each split numbers its vectors anew"


def test_a_window_whose_text_gives_other_tokens_is_left_out_and_counted(
    ours: tuple[pa.Table, pa.Table], either_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    effects, exemplars = ours
    rows = exemplars.to_pylist()
    first = rows[0]["windows"][0]
    letters = [letter for token in first["tokens"] for letter in token]
    assert len(letters) > len(first["tokens"])
    first |= {"tokens": letters, "activations": [1.0] * len(letters)}
    write_folder(effects, "features", str(tmp_path), either_tokenizer, listed=True)
    told = write_exemplars(records.rows_table(rows, EXEMPLARS), effects, str(tmp_path), either_tokenizer, about=ABOUT)
    assert told == (11, {NEAR: 4, OTHER_TOKENS: 1})
    read, _ = exemplars_in(tmp_path, either_tokenizer, vectors_in(tmp_path, vectors=None))
    [own] = [row for row in read.to_pylist() if row["case_id"] == rows[0]["case_id"]]
    kept = [w["tokens"] for w in own["windows"] if w["kind"] == "top"]
    assert kept == [rows[0]["windows"][1]["tokens"]] and own["windows"][0]["rank"] == 0


def test_how_often_a_feature_is_on_is_at_least_how_many_windows_are_saved(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = release(tmp_path / "release", tokenizer)
    np.save(folder / "train" / "layer0" / "max_acts.npy", np.array([[3.0, 2.0, 0.5, 0.0], [1.0, 0.5, -1.0, -2.0]]))
    exemplars, _ = exemplars_in(folder, tokenizer, vectors_in(folder, [0]))
    assert exemplars["fired"].to_pylist() == [3, 2] and exemplars["seen"].to_pylist() == [500] * 2


def change(path: Path, at: Any, value: float) -> None:
    array = np.load(path)
    array[at] = value
    np.save(path, array)


def test_a_random_window_in_which_the_feature_is_on_is_not_kept(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = release(tmp_path / "release", tokenizer)
    change(folder / "random_train" / "layer0" / "max_seq_acts.npy", (0, 0, -1), 0.25)
    exemplars, _ = exemplars_in(folder, tokenizer, vectors_in(folder, [0]))
    kinds = [[window["kind"] for window in row["windows"]] for row in exemplars.to_pylist()]
    assert kinds == [["top", "top"], ["top", "top", "random"]]


def test_activations_are_clipped_and_a_feature_that_is_on_in_no_window_is_dropped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = release(tmp_path / "release", tokenizer)
    change(folder / "train" / "layer0" / "max_seq_acts.npy", (0, slice(None), slice(None)), -2.0)
    change(folder / "train" / "layer0" / "max_seq_acts.npy", (1, 0, -1), -2.0)
    exemplars, dropped = exemplars_in(folder, tokenizer, vectors_in(folder, [0]))
    assert dropped == [NEVER_ACTIVE]
    assert exemplars["windows"][0].as_py()[0]["activations"][-1] == 0


def test_padding_is_told_by_its_token_or_by_its_activation(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    features = vectors_in(folder, [1])
    before, _ = exemplars_in(folder, tokenizer, features)
    home = folder / "train" / "layer1"
    acts, ids = (np.load(home / f"max_seq_{name}.npy") for name in ("acts", "ids"))
    assert np.isneginf(acts).any()
    np.save(home / "max_seq_acts.npy", np.where(np.isneginf(acts), 7, acts))
    assert exemplars_in(folder, tokenizer, features)[0].equals(before)
    np.save(home / "max_seq_acts.npy", acts)
    np.save(home / "max_seq_ids.npy", np.where(np.isneginf(acts), 99, ids))
    assert exemplars_in(folder, tokenizer, features)[0].equals(before)


def test_activations_that_are_no_numbers_drop_their_feature(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    change(folder / "train" / "layer0" / "max_seq_acts.npy", (0, 1, -2), np.nan)
    exemplars, dropped = exemplars_in(folder, tokenizer, vectors_in(folder))
    assert exemplars.num_rows == 3 and dropped == [NOT_FINITE]


def first_texts(folder: Path, tokenizer: PreTrainedTokenizerFast, features: pa.Table) -> list[str]:
    return ["".join(row[0]["tokens"]) for row in exemplars_in(folder, tokenizer, features)[0]["windows"].to_pylist()]


def test_rows_follow_the_list_that_the_config_names_or_the_features_numbers(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = release(tmp_path / "release", tokenizer)
    features = vectors_in(folder)
    texts = first_texts(folder, tokenizer, features)
    config = json.loads((folder / "exemplar_config.json").read_text())
    (folder / "train_layer_feature_idxs.json").write_text(json.dumps([[0, 0]] * 3))
    with pytest.raises(ValueError, match=r"of 2 features, but 5 of layer 0 are listed: name the list .*indices_file"):
        exemplars_in(folder, tokenizer, features)
    for name in ("/their/home/test_indices.json", "test_indices.pkl"):
        (folder / "exemplar_config.json").write_text(json.dumps(config | {"indices_file": name}))
        assert first_texts(folder, tokenizer, features) == texts
    (folder / "exemplar_config.json").write_text(json.dumps(config | {"indices_file": "test_layer_feature_idxs.json"}))
    with pytest.raises(
        ValueError, match=r"no test_layer_feature_idxs.json in .*: it tells which exemplars are of what"
    ):
        exemplars_in(folder, tokenizer, features)
    (folder / "exemplar_config.json").write_text(json.dumps(config))
    (folder / "train_layer_feature_idxs.json").unlink()
    (folder / "test_indices.json").unlink()
    found, dropped = exemplars_in(folder, tokenizer, features)
    assert found["feature_id"].to_pylist() == [0, 1] and dropped == [NO_EXEMPLARS] * 2


def test_features_without_exemplars_are_dropped_or_bare(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    features = vectors_in(folder)
    (folder / "train" / "layer1").rename(folder / "train" / "layer7")
    exemplars, dropped = exemplars_in(folder, tokenizer, features)
    assert exemplars["layer"].to_pylist() == [0, 0] and dropped == [NO_EXEMPLARS] * 2
    exemplars, dropped = exemplars_in(folder, tokenizer, features, bare=True)
    assert [len(windows) for windows in exemplars["windows"].to_pylist()] == [3, 3, 0, 0] and dropped == []
    assert exemplars["seen"].to_pylist() == [500, 500, 0, 0]


def test_only_as_many_windows_are_kept_as_are_wanted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    exemplars, _ = exemplars_in(folder, tokenizer, vectors_in(folder), top=1, random=0)
    assert [len(windows) for windows in exemplars["windows"].to_pylist()] == [1] * 4


def test_exemplars_that_cannot_be_used_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    features = vectors_in(folder)

    def refused(told: str, name: str, made: Any) -> None:
        path = folder / name
        before = path.read_bytes()
        if isinstance(made, str):
            path.write_text(made)
        elif made is None:
            path.unlink()
        else:
            np.save(path, made, allow_pickle=True)
        with pytest.raises(ValueError, match=told):
            exemplars_in(folder, tokenizer, features)
        path.write_bytes(before)

    layer = "train/layer0"
    ids = np.load(folder / layer / "max_seq_ids.npy")
    refused("no exemplar_config.json in .*leave `describer`", "exemplar_config.json", None)
    refused("does not say in `num_seqs`", "exemplar_config.json", "{}")
    refused(r"exemplar_config.json is not JSON", "exemplar_config.json", "{")
    refused("is not JSON", "test_indices.json", "[[0, 1")
    refused(r"is not a list of \[layer, number\]", "test_indices.json", "[3, 4]")
    refused("no array of numbers", f"{layer}/max_seq_ids.npy", np.array([{"a": 1}], dtype=object))
    refused("no array of numbers", f"{layer}/max_acts.npy", "text")
    refused("as many of both", f"{layer}/max_seq_ids.npy", ids[:, :, 1:])
    refused("exemplars of 2 and of 3 features", f"{layer}/max_acts.npy", np.zeros((3, 2)))
    for token in (5000, -5):
        wrong = np.where(ids > 50, token, ids)
        refused(rf"token {token} in the exemplars of .*: the target has \d+", f"{layer}/max_seq_ids.npy", wrong)
    assert exemplars_in(folder, tokenizer, features)[0].num_rows == 4


def test_only_the_rows_of_the_wanted_features_are_read(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = release(tmp_path / "release", tokenizer)
    features, home = vectors_in(folder, [0]), folder / "train" / "layer0"
    (folder / "test_indices.json").unlink()
    for name in ("max_seq_ids", "max_seq_acts"):
        few = np.load(home / f"{name}.npy")
        np.save(home / f"{name}.npy", np.concatenate([few, np.repeat(few[:1], 9_998, axis=0)]))
    np.save(home / "max_acts.npy", np.ones((10_000, 2), np.float32))
    (folder / "random_train").rename(folder / "other")
    read = ReleasedExemplars(str(folder), tokenizer, **SIZES)
    tracemalloc.start()
    made = read.of(features)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made.table.num_rows == 2
    assert peak < (home / "max_seq_acts.npy").stat().st_size / 4
