"""Folders of the data sets released with the paper, whole: read as effects, and written from them.

A folder holds `{split}.parquet` or `{split}-*.parquet`, in it or in `data/`, as the hub lays them out.
"""

import json
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.ground_truth import released
from ray_explain.ground_truth.features import joined, split_features
from ray_explain.ground_truth.jsonl import REPEATED
from ray_explain.ground_truth.mmlu import read_mmlu
from ray_explain.stages import READ, Result

Key = tuple[int, int]
"""Layer and number of a feature."""
_FEATURES_AT_A_TIME = 4096
_ROWS_AT_A_TIME = 1024  # 16 MiB of vectors 4,096 wide


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


class _Features(NamedTuple):
    """What a folder has of one split."""

    split: str
    source: str
    labels: list[tuple[Key, dict[str, Any] | None]]  # None: listed without one
    vectors: np.ndarray | None = None  # [n, d_model]; None where decoders hold the directions

    def directions(self, folder: Path, layer: int, d_model: int) -> np.ndarray:
        """In columns. Raises: as `_decoder`."""
        return _decoder(folder, layer, d_model) if self.vectors is None else self.vectors.T


def read_feature_folder(
    folder: str,
    layers: Collection[int],
    *,
    d_model: int,
    per_layer: int | None,
    seed: int,
    vectors: str | None = None,
    unlabelled: bool = False,
) -> Iterator[Result]:
    """The effects of the released features of these layers, part by part: of each split and layer at most `per_layer`,
    drawn at random. Each part tells how many features there are to be read in all.

    The folder is as the release's, but without pickles: `{split}_explanations.json` in it or in `explanations/`, and
    decoders [d_model, d_sae] in `features/layer_{layer}.npy`, of which only the columns at hand are in memory.

    Args:
        vectors: What the folder's vectors are, `activation` or `difference`. Then the features of a split that has
            `{split}_vectors.npy` are those of its `{split}_indices.json`, and labels of that split are theirs.
        unlabelled: Whether features without a label are wanted too: vectors, and where a split has no labels what its
            `{split}_layer_feature_idxs.json` lists.

    Raises:
        ValueError: there are no such features of these layers; or a file cannot be read, is of another target or a
            pickle; or there is not one index for each vector.
        FileNotFoundError: a layer's decoder, or the indices of vectors, are not there.
    """
    home = Path(folder)
    splits = {own.split: own for own in _splits(home, d_model, vectors, unlabelled)}
    groups, repeated = _by_layer(splits.values(), layers)
    if not any(label or unlabelled for labels in groups.values() for _, label in labels):
        raise ValueError(_nothing(home, layers, vectors))
    for (split, layer), labels in groups.items():
        if per_layer is not None and len(labels) > per_layer:
            drawn = random.Random(f"{seed} {split} {layer}").sample(labels, per_layer)
            groups[split, layer] = sorted(drawn, key=itemgetter(0))
    size = sum(map(len, groups.values())) + len(repeated)
    for (split, layer), labels in groups.items():
        directions = splits[split].directions(home, layer, d_model)
        for start in range(0, len(labels), _FEATURES_AT_A_TIME):
            some = labels[start : start + _FEATURES_AT_A_TIME]
            made = released.read_features(some, {layer: directions}, split=split, source=splits[split].source)
            yield Result(joined(made.features, made.descriptions), made.dropped + repeated, {READ: size})
            repeated = []


def _splits(folder: Path, d_model: int, vectors: str | None, unlabelled: bool) -> Iterator[_Features]:
    for split in records.SPLITS:
        labels = _first_of(folder, f"{split}_explanations", ".json", ".pkl")
        listed = _first_of(folder, f"{split}_layer_feature_idxs", ".json", ".pkl")
        if vectors and (own := _vectors_file(folder, split)):
            yield _vectors(folder, split, released.read_vectors(own, d_model), vectors, labels)
        elif labels:
            yield _Features(split, "sae", list(released.read_labels(labels)))
        elif unlabelled and listed:
            yield _Features(split, "sae", [(key, None) for key in released.read_numbers(listed)])


def _vectors(folder: Path, split: str, vectors: np.ndarray, source: str, labels: Path | None) -> _Features:
    path = folder / f"{split}_indices.json"
    numbers = released.read_numbers(path)
    if len(numbers) != len(vectors):
        raise ValueError(f"{path} has {len(numbers)} indices for {len(vectors)} vectors: one [layer, row] for each")
    told = dict(released.read_labels(labels)) if labels else {}
    return _Features(split, source, [(key, told.get(key)) for key in numbers], vectors)


def _vectors_file(folder: Path, split: str) -> Path | None:
    """A pickle, where that is all there is, to be refused by its reader; as `_first_of` gives one."""
    return _first_of(folder, f"{split}_vectors", ".npy", ".pt")


def _first_of(folder: Path, name: str, *ends: str) -> Path | None:
    places = (below / f"{name}{end}" for end in ends for below in (folder, folder / "explanations"))
    return next((place for place in places if place.exists()), None)


def _by_layer(
    splits: Iterable[_Features], layers: Collection[int]
) -> tuple[dict[tuple[str, int], list[Any]], list[tuple[str, str]]]:
    """The labels of each split and layer in their order, and (place, reason) of those that were there before. Each
    split numbers its vectors anew; a dictionary's feature belongs to the first split that has it."""
    known, repeated = set[tuple[str, Key]](), list[tuple[str, str]]()
    groups: dict[tuple[str, int], list[Any]] = {}
    for own in splits:
        found: dict[int, list[Any]] = {}
        for key, label in own.labels:
            one = ("" if own.vectors is None else own.split, key)
            if one in known:
                repeated.append((f"{own.split} layer {key[0]} feature {key[1]}", REPEATED))
            elif key[0] in layers:
                known.add(one)
                found.setdefault(key[0], []).append((key, label))
        groups |= {(own.split, layer): labels for layer, labels in sorted(found.items())}
    return groups, repeated


def _nothing(folder: Path, layers: Collection[int], vectors: str | None) -> str:
    """Why there is nothing to read, and the way out."""
    told = f"no *_explanations.json with labels of layers {sorted(layers)} in {folder} or its explanations/"
    if not any(_vectors_file(folder, split) for split in records.SPLITS):
        return told
    if vectors is None:
        return f"{told}; for its vectors, say what they are: `vectors: activations` or `differences`"
    return f"{told}: to its vectors belongs a `describer`, which needs exemplars in the folder, or add labels"


def _decoder(folder: Path, layer: int, d_model: int) -> np.ndarray:
    path = folder / "features" / f"layer_{layer}.npy"
    decoder = released.read_array(path)
    if decoder.ndim != 2 or decoder.shape[0] != d_model:
        raise ValueError(f"{path} is {list(decoder.shape)}: directions of this target stand in columns of {d_model}")
    return decoder


def listed_features(folder: Path, named: str | None = None) -> list[tuple[str, list[Key]]]:
    """(split, its (layer, number)s) of each list of features in the folder, or of the one `named` alone: indices of
    vectors, or `{split}_layer_feature_idxs.json`.

    Raises:
        ValueError: there is none of that name, or a list is a pickle or otherwise unreadable.
    """
    found = []
    for split in records.SPLITS:
        names = [name for name in (f"{split}_indices", f"{split}_layer_feature_idxs") if named in (None, name)]
        paths = [path for name in names if (path := _first_of(folder, name, ".json", ".pkl"))]
        found += [(split, released.read_numbers(path)) for path in paths[:1]]
    if named and not found:
        raise ValueError(f"no {named}.json in {folder} or its explanations/: it tells which exemplars are of what")
    return found


def _split_files(folder: Path, split: str) -> list[Path]:
    names = f"{split}.parquet", f"{split}-*.parquet"  # not `{split}*`: that is `train_full` too
    files = sorted(file for name in names for home in (folder, folder / "data") for file in home.glob(name))
    if not files:
        raise ValueError(f"no {' or '.join(names)} in {folder} or {folder}/data: set `cases.{split}` to 0, or add it")
    return files


def write_folder(
    effects: pa.Table,
    task: str,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mmlu: str | None = None,
    listed: bool = False,
) -> dict[str, tuple[int, int]]:
    """Effects in the released schema, a file for each split; returns rows written and left out, by split.

    Patching and ablation as Parquet. Features as `{split}_explanations.json`, and their directions: those of a
    dictionary as columns of `features/layer_{layer}.npy`, of which those without a label are left out unless they are
    `listed` in `{split}_layer_feature_idxs.json`; activations and differences, all of them, as rows of
    `{split}_vectors.npy`, each numbered by its row, with `{split}_indices.json`. An ablation effect is written with its
    question of the MMLU file `mmlu`.

    Raises:
        ValueError: ablation effects without the file that their questions come from; as `released_numbers`.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if task == "features":
        return _write_features(effects, Path(folder), listed)
    if task == "ablation" and mmlu is None:
        raise ValueError("the released ablation schema holds MMLU questions: ablation cases of other sources have none")
    told = {}
    for split, here in by_split(effects):
        if task == "patching":
            made = released.write_patching(here, tokenizer)
        else:
            made = released.write_ablation(here, read_mmlu(str(mmlu))[0], tokenizer)
        pq.write_table(made.table, Path(folder) / f"{split}.parquet")
        told[split] = (made.table.num_rows, len(made.dropped))
    return told


def by_split(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The rows of each split that has some."""
    for split in dict.fromkeys(table["split"].to_pylist()):
        yield split, table.filter(pc.equal(table["split"], split))


def _write_features(effects: pa.Table, folder: Path, listed: bool) -> dict[str, tuple[int, int]]:
    features, descriptions = split_features(effects)
    told, decoded = {}, []
    for split, here in by_split(features):
        labels, numbers = released.write_labels(here, descriptions), released.released_numbers(here)
        is_vectors = released.are_vectors(here)
        if labels or not is_vectors:
            _write_json(labels, folder / f"{split}_explanations.json")
        if is_vectors:
            vectors = np.concatenate(records.vectors_of(here["vectors"]))
            np.save(folder / f"{split}_vectors.npy", vectors[np.argsort([number for _, number in numbers])])
            _write_json(numbers, folder / f"{split}_indices.json")
        else:
            decoded.append(here)
            if listed:
                _write_json(numbers, folder / f"{split}_layer_feature_idxs.json")
        written = len(numbers) if is_vectors or listed else len(labels)
        told[split] = (written, here.num_rows - written)
    if decoded:
        _write_decoders(pa.concat_tables(decoded), folder / "features")
    return told


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_decoders(features: pa.Table, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for layer, decoder in released.write_directions(features, 1 + max(features["feature_id"].to_pylist())).items():
        np.save(folder / f"layer_{layer}.npy", decoder)
