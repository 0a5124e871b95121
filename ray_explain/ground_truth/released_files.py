"""Folders of the data sets released with the paper, whole: read as effects, and written from them.

A folder holds Parquet files whose names begin with their split, in it or in `data/`, as the hub lays them out.
"""

import json
import random
from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth import released
from ray_explain.ground_truth.features import joined, split_features
from ray_explain.ground_truth.mmlu import read_mmlu
from ray_explain.stages import Result

_FEATURES_AT_A_TIME = 4096
REPEATED = "the same case as before"


def read_folder(
    folder: str, task: str, tokenizer: PreTrainedTokenizerBase, *, d_model: int, n: Mapping[str, int]
) -> Result:
    """The patching or ablation effects of a released data set, at most `n` rows of each split, the first ones.

    `tokenizer` is the target's; `d_model` its width, which the released vectors must have.

    Raises:
        ValueError: there is no Parquet file of a split that is asked for, a column is missing, or the vectors are of
            another target.
    """
    tables, dropped = [], []
    for split in [split for split in records.SPLITS if n.get(split)]:
        table = _split_table(Path(folder), split).slice(0, n[split])
        if task == "patching":
            made = released.read_patching(table, tokenizer, split=split)
            _check_width(made.table, d_model, folder)
        else:
            made = released.read_ablation(table, split=split).effects
        tables.append(made.table)
        dropped += [(f"{split} {place}", reason) for place, reason in made.dropped]
    whole = pa.concat_tables(tables)
    ids = np.array(whole["case_id"].to_pylist())
    kept = np.sort(np.unique(ids, return_index=True)[1])
    dropped += [(str(case), REPEATED) for case in np.delete(ids, kept)]
    return Result(whole.take(pa.array(kept)), dropped)


def read_feature_folder(
    folder: str, layers: Collection[int], *, d_model: int, per_layer: int | None, seed: int
) -> Iterator[Result]:
    """The effects of the released features of these layers, part by part: of each split and layer at most `per_layer`,
    drawn at random.

    The folder is as the release's, but without pickles: `{split}_explanations.json` in it or in `explanations/`, and
    decoders [d_model, d_sae] in `features/layer_{layer}.npy`, of which only the columns at hand are in memory.

    Raises:
        ValueError: there are no labels of these layers, or they or a decoder cannot be read or are of another target.
        FileNotFoundError: a layer's decoder is not there.
    """
    known, repeated = set[tuple[int, int]](), list[tuple[str, str]]()
    found = False
    for split, path in _label_files(Path(folder)):
        own: dict[int, list[Any]] = {}
        for key, label in released.read_labels(path):
            if key in known:
                repeated.append((f"{split} layer {key[0]} feature {key[1]}", REPEATED))
            elif key[0] in layers:
                known.add(key)
                own.setdefault(key[0], []).append((key, label))
        for layer, labels in sorted(own.items()):
            decoder = _decoder(Path(folder), layer, d_model)
            if per_layer is not None and len(labels) > per_layer:
                labels = sorted(random.Random(f"{seed} {split} {layer}").sample(labels, per_layer), key=itemgetter(0))
            for start in range(0, len(labels), _FEATURES_AT_A_TIME):
                some = labels[start : start + _FEATURES_AT_A_TIME]
                made = released.read_features(some, {layer: decoder}, split=split)
                found = True
                yield Result(joined(made.features, made.descriptions), made.dropped + repeated)
                repeated = []
    if not found:
        raise ValueError(
            f"no *_explanations.json with labels of layers {sorted(layers)} in {folder} or its explanations/"
        )


def _label_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Of each split that there is; a pickle, where that is all there is, to be refused by its reader."""
    for split in records.SPLITS:
        places = [below / f"{split}_explanations{end}" for end in (".json", ".pkl") for below in _homes(folder)]
        yield from [(split, place) for place in places if place.exists()][:1]


def _homes(folder: Path) -> tuple[Path, Path]:
    return folder, folder / "explanations"


def _decoder(folder: Path, layer: int, d_model: int) -> np.ndarray:
    path = folder / "features" / f"layer_{layer}.npy"
    decoder: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    if decoder.ndim != 2 or decoder.shape[0] != d_model:
        raise ValueError(f"{path} is {list(decoder.shape)}: directions of this target stand in columns of {d_model}")
    return decoder


def _split_table(folder: Path, split: str) -> pa.Table:
    files = sorted([*folder.glob(f"{split}*.parquet"), *folder.glob(f"data/{split}*.parquet")])
    if not files:
        raise ValueError(f"no {split}*.parquet in {folder} or {folder}/data: set `cases.{split}` to 0, or add it")
    return pa.concat_tables([pq.read_table(file) for file in files], promote_options="default")


def _check_width(effects: pa.Table, d_model: int, folder: str) -> None:
    width = records.vectors_of(effects["vectors"])[0].shape[1]
    if width != d_model:
        raise ValueError(f"the vectors in {folder} are {width} wide, the target's residual stream {d_model}")


def write_folder(
    effects: pa.Table, task: str, folder: str, tokenizer: PreTrainedTokenizerBase, *, mmlu: str | None = None
) -> dict[str, tuple[int, int]]:
    """Effects in the released schema, a file for each split; returns rows written and left out, by split.

    Patching and ablation as Parquet, features as `{split}_explanations.json` and their directions as
    `features/layer_{layer}.npy`. An ablation effect is written with its question of the MMLU file `mmlu`.

    Raises:
        ValueError: ablation effects without the file that their questions come from.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if task == "features":
        return _write_features(effects, Path(folder))
    if task == "ablation" and mmlu is None:
        raise ValueError("the released ablation schema holds MMLU questions: ablation cases of other sources have none")
    told = {}
    for split, here in _by_split(effects):
        if task == "patching":
            made = released.write_patching(here, tokenizer)
        else:
            made = released.write_ablation(here, read_mmlu(str(mmlu))[0], tokenizer)
        pq.write_table(made.table, Path(folder) / f"{split}.parquet")
        told[split] = (made.table.num_rows, len(made.dropped))
    return told


def _by_split(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    for split in dict.fromkeys(table["split"].to_pylist()):
        yield split, table.filter(pc.equal(table["split"], split))


def _write_features(effects: pa.Table, folder: Path) -> dict[str, tuple[int, int]]:
    features, descriptions = split_features(effects)
    told = {}
    for split, here in _by_split(features):
        labels = released.write_labels(here, descriptions)
        (folder / f"{split}_explanations.json").write_text(json.dumps(labels), encoding="utf-8")
        told[split] = (len(labels), here.num_rows - len(labels))
    (folder / "features").mkdir(exist_ok=True)
    for layer, decoder in released.write_directions(features, 1 + max(features["feature_id"].to_pylist())).items():
        np.save(folder / "features" / f"layer_{layer}.npy", decoder)
    return told
