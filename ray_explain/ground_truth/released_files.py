"""Folders of the data sets released with the paper, whole: read as effects, and written from them.

A folder holds Parquet files whose names begin with their split, in it or in `data/`, as the hub lays them out.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.ground_truth import released
from ray_explain.ground_truth.features import split_features
from ray_explain.ground_truth.mmlu import read_mmlu
from ray_explain.stages import Result
from ray_explain.world.facts import SPLITS

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
    for split in [split for split in SPLITS if n.get(split)]:
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
    for split in dict.fromkeys(effects["split"].to_pylist()):
        here = effects.filter(pc.equal(effects["split"], split))
        if task == "patching":
            made = released.write_patching(here, tokenizer)
        else:
            made = released.write_ablation(here, read_mmlu(str(mmlu))[0], tokenizer)
        pq.write_table(made.table, Path(folder) / f"{split}.parquet")
        told[split] = (made.table.num_rows, len(made.dropped))
    return told


def _write_features(effects: pa.Table, folder: Path) -> dict[str, tuple[int, int]]:
    features, descriptions = split_features(effects)
    told = {}
    for split in dict.fromkeys(features["split"].to_pylist()):
        here = features.filter(pc.equal(features["split"], split))
        labels = released.write_labels(here, descriptions)
        (folder / f"{split}_explanations.json").write_text(json.dumps(labels), encoding="utf-8")
        told[split] = (len(labels), here.num_rows - len(labels))
    (folder / "features").mkdir(exist_ok=True)
    for layer, decoder in released.write_directions(features, 1 + max(features["feature_id"].to_pylist())).items():
        np.save(folder / "features" / f"layer_{layer}.npy", decoder)
    return told
