"""Folders of the data sets released with the paper, whole: read as effects, and written from them.

A folder holds `{split}.parquet` or `{split}-*.parquet`, in it or in `data/`, as the hub lays them out.
"""

import json
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.ground_truth import released
from ray_explain.ground_truth.features import joined, split_features
from ray_explain.ground_truth.mmlu import read_mmlu
from ray_explain.stages import READ, Result

_FEATURES_AT_A_TIME = 4096
_ROWS_AT_A_TIME = 1024  # 16 MiB of vectors 4,096 wide
REPEATED = "the same case as before"


def read_folder(
    folder: str, task: str, tokenizer: PreTrainedTokenizerBase, *, d_model: int, n: Mapping[str, int]
) -> Iterator[Result]:
    """The patching or ablation effects of a released data set, part by part: at most `n` rows of each split, the first
    ones. Each part tells how many rows there are to be read in all.

    `tokenizer` is the target's; `d_model` its width, which the released vectors must have.

    Raises:
        ValueError: there is no Parquet file of a split that is asked for, a column is missing, or the vectors are of
            another target.
    """
    files = {split: _split_files(Path(folder), split) for split in records.SPLITS if n.get(split)}
    size = sum(min(n[split], sum(map(_n_rows, own))) for split, own in files.items())
    known = set[str]()
    for split, own in files.items():
        for first, table in _first_rows(own, n[split]):
            try:
                if task == "patching":
                    made = released.read_patching(table, tokenizer, split=split, d_model=d_model, first=first)
                else:
                    made = released.read_ablation(table, split=split, first=first).effects
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from error
            kept, repeated = _new(made.table, known)
            dropped = [(f"{split} {place}", reason) for place, reason in made.dropped]
            yield Result(kept, dropped + repeated, {READ: size})


def _first_rows(files: Sequence[Path], n: int) -> Iterator[tuple[int, pa.Table]]:
    """The first `n` rows of these files, so many at a time that their vectors take little memory; each table with the
    number of its first row."""
    at = 0
    for file in files:
        for table in storage.file_batches(str(file), _ROWS_AT_A_TIME):
            if at < n:
                yield at, table.slice(0, n - at)
            at += table.num_rows
            if at >= n:
                return


def _n_rows(file: Path) -> int:
    return pq.read_metadata(file).num_rows


def _new(table: pa.Table, known: set[str]) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The rows whose case is not `known`, where all go, and those that are dropped for it."""
    kept, repeated = [], []
    for row, case in enumerate(table["case_id"].to_pylist()):
        if case in known:
            repeated.append((case, REPEATED))
        else:
            kept.append(row)
            known.add(case)
    return table.take(pa.array(kept, pa.int64())) if repeated else table, repeated


def read_feature_folder(
    folder: str, layers: Collection[int], *, d_model: int, per_layer: int | None, seed: int
) -> Iterator[Result]:
    """The effects of the released features of these layers, part by part: of each split and layer at most `per_layer`,
    drawn at random. Each part tells how many labels there are to be read in all.

    The folder is as the release's, but without pickles: `{split}_explanations.json` in it or in `explanations/`, and
    decoders [d_model, d_sae] in `features/layer_{layer}.npy`, of which only the columns at hand are in memory.

    Raises:
        ValueError: there are no labels of these layers, or they or a decoder cannot be read or are of another target.
        FileNotFoundError: a layer's decoder is not there.
    """
    groups, repeated = _labels(Path(folder), layers)
    if not groups:
        raise ValueError(
            f"no *_explanations.json with labels of layers {sorted(layers)} in {folder} or its explanations/"
        )
    for (split, layer), labels in groups.items():
        if per_layer is not None and len(labels) > per_layer:
            drawn = random.Random(f"{seed} {split} {layer}").sample(labels, per_layer)
            groups[split, layer] = sorted(drawn, key=itemgetter(0))
    size = sum(map(len, groups.values())) + len(repeated)
    for (split, layer), labels in groups.items():
        decoder = _decoder(Path(folder), layer, d_model)
        for start in range(0, len(labels), _FEATURES_AT_A_TIME):
            some = labels[start : start + _FEATURES_AT_A_TIME]
            made = released.read_features(some, {layer: decoder}, split=split)
            yield Result(joined(made.features, made.descriptions), made.dropped + repeated, {READ: size})
            repeated = []


def _labels(folder: Path, layers: Collection[int]) -> tuple[dict[tuple[str, int], list[Any]], list[tuple[str, str]]]:
    """The labels of each split and layer in their order, and (place, reason) of those that were there before."""
    known, repeated = set[tuple[int, int]](), list[tuple[str, str]]()
    groups: dict[tuple[str, int], list[Any]] = {}
    for split, path in _label_files(folder):
        own: dict[int, list[Any]] = {}
        for key, label in released.read_labels(path):
            if key in known:
                repeated.append((f"{split} layer {key[0]} feature {key[1]}", REPEATED))
            elif key[0] in layers:
                known.add(key)
                own.setdefault(key[0], []).append((key, label))
        groups |= {(split, layer): labels for layer, labels in sorted(own.items())}
    return groups, repeated


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


def _split_files(folder: Path, split: str) -> list[Path]:
    names = f"{split}.parquet", f"{split}-*.parquet"  # not `{split}*`: that is `train_full` too
    files = sorted(file for name in names for home in (folder, folder / "data") for file in home.glob(name))
    if not files:
        raise ValueError(f"no {' or '.join(names)} in {folder} or {folder}/data: set `cases.{split}` to 0, or add it")
    return files


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
