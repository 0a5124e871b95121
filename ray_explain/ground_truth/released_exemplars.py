"""The exemplars of the data sets released with the paper (Li et al. 2025), read as our table and written from it.

Beside `exemplar_config.json` a folder has, for each part of the corpus (train, valid, test) and each layer,
`{part}/layer{layer}/` with `max_acts.npy` [features, saved], the strongest activation of so many windows;
`max_seq_acts.npy` and `max_seq_ids.npy` [features, k, tokens], the activations and token ids of the best k of them,
padded on the left; `max_dataset_ids.npy` [features, k]; the same with `min_` for the weakest; and
`num_tokens_seen.txt`. `random_{part}` has random windows, without what is saved of the others.

A row of the arrays is a feature: those of a layer in the order of the features' lists (`listed_features`), split after
split; or of the one list that the config names in `indices_file`; without any list, a row is the feature's number.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from ray_explain import records
from ray_explain.features.simulate import pad_of
from ray_explain.ground_truth import released
from ray_explain.ground_truth.exemplars import EXEMPLARS, NEVER_ACTIVE, token_texts
from ray_explain.ground_truth.outcomes import NOT_FINITE
from ray_explain.ground_truth.positions import Unusable, special_prefix, usable
from ray_explain.ground_truth.released_files import by_split, listed_features
from ray_explain.stages import Result

NO_EXEMPLARS = "no exemplars are given for it"
NEAR = "a near miss"
OTHER_TOKENS = "its text gives other tokens"
CONFIG = "exemplar_config.json"
_WRITTEN = "written"
_FEATURES_AT_A_TIME = 256  # as Python's objects, whose windows take ten times the memory of the table's
_TOP, _RANDOM = "train", "random_train"
_RANDOM_PARTS = (_RANDOM, "random_valid", "random_test")
_ACTIVATION_TYPES = {"sae": "SAE_RES", "neuron": "MLP"}
_UNKNOWN = {"l0": None, "fvu": None, "dead_fraction": None}  # figures of an SAE that the release does not tell


_Window = tuple[list[int], Float[np.ndarray, " pos"]]  # ids of its tokens, and activations


class _Windows(NamedTuple):
    """Windows of all features of one layer, in their files."""

    acts: Float[np.ndarray, "features k tokens"]  # -inf where there is no token
    ids: Int[np.ndarray, "features k tokens"]


class _Layer(NamedTuple):
    strongest: Float[np.ndarray, "features saved"]
    top: _Windows
    random: _Windows | None


class ReleasedExemplars:
    """The exemplars in a folder, as rows of `exemplars.EXEMPLARS` for the features that are asked for. Arrays stay in
    their files, and only the rows of these features are read.

    Of a feature's windows these are kept: as `top` those of the part train, best first, in which it is on; as `random`
    those of the first `random_` part that there is in which it is off. There are no near misses. Padding on the left
    and the special tokens that the tokenizer puts before a text are left out; activations are clipped at 0, as in the
    paper (4.2). `seen` is `num_seqs`, how many windows were to be read; `fired` counts those of which the strongest
    activation is saved and above 0. The release saves that of the best 10,000: of a feature that is on in more, `fired`
    is the least that it can be.
    """

    def __init__(
        self, folder: str, tokenizer: PreTrainedTokenizerBase, *, top: int, random: int, bare: bool = False
    ) -> None:
        """`tokenizer` is the target's; `top` and `random` say how many windows to keep. With `bare`, a feature of which
        the folder has no exemplars is a row without windows, `seen` 0; without, it is dropped.

        Raises:
            ValueError: there are no exemplars, or it cannot be told which are of which feature.
        """
        self._folder, self._tokenizer, self._bare = Path(folder), tokenizer, bare
        self._prefix, self._pad = special_prefix(tokenizer), pad_of(tokenizer)
        self._sizes = {"top": top, "random": random}
        self._config = self._read_config()
        named = self._config.get("indices_file")
        self._rows, self._sizes_of_layers = _rows_of(listed_features(self._folder, Path(named).stem if named else None))
        self._opened: tuple[int, _Layer | None] | None = None
        self._texts: dict[tuple[int, ...], list[str]] = {}  # a window is often among the best of several features

    def _read_config(self) -> dict[str, Any]:
        path = self._folder / CONFIG
        if not path.exists():
            raise ValueError(
                f"no {CONFIG} in {self._folder}: what describes or scores released features needs their exemplars; "
                "leave `describer`, `simulator` and `detector` out to take the labels as they are"
            )
        config = released.read_json(path)
        if not isinstance(config, dict) or not isinstance(config.get("num_seqs"), int):
            raise ValueError(f"{path} does not say in `num_seqs` how many windows were read")
        return config

    def of(self, features: pa.Table) -> Result:
        """The exemplars of features (a table with the first columns of records.features).

        Dropped are features that are on in none of the windows, and those with an activation that is no number.

        Raises:
            ValueError: arrays cannot be read, do not fit each other or the lists, or hold tokens that the target does
                not have.
        """
        self._texts.clear()
        own = features.select(["case_id", "group", "split", "layer", "source", "feature_id"]).to_pylist()
        rows, dropped = usable(((row["case_id"], row) for row in own), self._row)
        return Result(records.rows_table(rows, EXEMPLARS), dropped)

    def _row(self, feature: dict[str, Any]) -> dict[str, Any]:
        layer, row = self._layer(feature["layer"]), self._row_of(feature)
        top = [] if layer is None or row is None else self._windows(layer.top, row)
        if layer is None or row is None or not top:
            if self._bare:
                return feature | _UNKNOWN | {"fired": 0, "seen": 0, "windows": []}
            raise Unusable(NO_EXEMPLARS)
        windows = self._kept("top", top)
        if not windows:
            raise Unusable(NEVER_ACTIVE)
        windows += self._kept("random", self._windows(layer.random, row)) if layer.random else []
        fired = int((layer.strongest[row] > 0).sum())
        return feature | _UNKNOWN | {"fired": fired, "seen": self._config["num_seqs"], "windows": windows}

    def _row_of(self, feature: dict[str, Any]) -> int | None:
        layer, number = feature["layer"], feature["feature_id"]
        if not self._rows:
            return int(number)
        return self._rows.get((feature["split"] if feature["source"] in released.VECTORS else "", layer, number))

    def _kept(self, kind: str, windows: Sequence[_Window]) -> list[dict[str, Any]]:
        """The first windows of a feature in which it is on, if they are to be top ones, or off."""
        wanted = [(ids, acts) for ids, acts in windows if (acts.max() > 0) == (kind == "top")][: self._sizes[kind]]
        return [
            {"kind": kind, "rank": rank, "tokens": self._tokens(ids), "activations": acts.tolist()}
            for rank, (ids, acts) in enumerate(wanted)
        ]

    def _windows(self, windows: _Windows, row: int) -> list[_Window]:
        """Those of a feature that have a token; none where there is no such row."""
        found = []
        rows = (array[row : row + 1] for array in windows)
        for acts, ids in zip(*(np.array(own).reshape(-1, windows.ids.shape[2]) for own in rows), strict=True):
            absent = (ids == self._pad) | np.isneginf(acts)
            start = len(ids) if absent.all() else int(absent.argmin())
            prefix = tuple(ids[start : start + len(self._prefix)].tolist())
            start += len(prefix) if prefix == self._prefix else 0
            if not np.isfinite(acts[start:]).all():
                raise Unusable(NOT_FINITE)
            if start < len(ids):
                found.append((ids[start:].tolist(), np.clip(acts[start:], 0, None).astype(np.float32)))
        return found

    def _tokens(self, ids: list[int]) -> list[str]:
        size = len(self._tokenizer)
        if unknown := [token for token in ids if not 0 <= token < size]:
            raise ValueError(
                f"token {unknown[0]} in the exemplars of {self._folder}: the target has {size}, is it another one?"
            )
        key = tuple(ids)
        if key not in self._texts:
            self._texts[key] = token_texts(self._tokenizer, ids)
        return self._texts[key]

    def _layer(self, layer: int) -> _Layer | None:
        """The arrays of a layer, None if the folder has none of it; features come layer after layer."""
        if self._opened is None or self._opened[0] != layer:
            self._opened = layer, self._open(layer)
        return self._opened[1]

    def _open(self, layer: int) -> _Layer | None:
        home = self._folder / _TOP / f"layer{layer}"
        if not home.is_dir():
            return None
        strongest, top = released.read_array(home / "max_acts.npy"), _open_windows(home)
        parts = [self._folder / part / f"layer{layer}" for part in _RANDOM_PARTS]
        random = next((_open_windows(part) for part in parts if part.is_dir()), None)
        for windows in (top, random):
            if windows is not None and len(windows.acts) != len(strongest):
                raise ValueError(f"{home}: exemplars of {len(windows.acts)} and of {len(strongest)} features")
        listed = self._sizes_of_layers[layer]
        if self._rows and len(strongest) != listed:
            raise ValueError(
                f"{home} has exemplars of {len(strongest)} features, but {listed} of layer {layer} are listed: name "
                f"the list that they follow in `indices_file` of {self._folder / CONFIG}"
            )
        return _Layer(strongest, top, random)


def _open_windows(folder: Path) -> _Windows:
    acts, ids = (released.read_array(folder / f"max_seq_{name}.npy") for name in ("acts", "ids"))
    if acts.ndim != 3 or acts.shape != ids.shape:
        raise ValueError(f"{folder}: activations {list(acts.shape)}, token ids {list(ids.shape)}: as many of both")
    return _Windows(acts, ids)


def _rows_of(
    lists: Sequence[tuple[str, Sequence[tuple[int, int]]]],
) -> tuple[dict[tuple[str, int, int], int], Counter[int]]:
    """The row of each (split, layer, number), and for a dictionary's features of each ("", layer, number); and how many
    rows each layer has."""
    rows, sizes = dict[tuple[str, int, int], int](), Counter[int]()
    for split, numbers in lists:
        for layer, number in numbers:
            rows[split, layer, number] = sizes[layer]
            rows.setdefault(("", layer, number), sizes[layer])
            sizes[layer] += 1
    return rows, sizes


# -- writing ----------------------------------------------------------------------------------------------------------


def write_exemplars(
    exemplars: pa.Table,
    features: pa.Table,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    about: Mapping[str, Any],
) -> tuple[int, dict[str, int]]:
    """The exemplars (exemplars.EXEMPLARS) of these features, whose lists `write_folder` writes; returns how many
    windows were written, and how many were left out for what reason.

    A window is written as the target read it: behind the special tokens of its tokenizer, of which no activation is
    known (0 stands there). Left out are near misses, for which the release has no place, and windows whose text gives
    other tokens when it is read again, such as those that begin within a word. We keep no windows of negative
    activation: the `min_` arrays, which readers of the release want to be there, hold windows without a token. Saved in
    `max_acts.npy` is the strongest activation of the written windows alone, so `fired` comes back as their number where
    it is more; and `num_tokens_seen.txt` counts as if all windows seen were as long as the longest.

    Args:
        exemplars: In any order; a feature that is not among them has no windows.
        about: Fields of the config that only the caller knows: `hf_model_id`, `hf_dataset_configs`, `seed`.
    """
    shape, told = _shape(exemplars, tokenizer), Counter[str]()
    for layer, cases in _cases_of_layers(features).items():
        encoded = _Encoded(exemplars.filter(pc.equal(exemplars["layer"], layer)), tokenizer)
        rows = [encoded.of.get(case_id, {}) for case_id in cases]
        top, random = ([row.get(kind, []) for row in rows] for kind in ("top", "random"))
        home = Path(folder) / _TOP / f"layer{layer}"
        _write_windows(top, home, shape["k"], shape["seq_len"], encoded.pad)
        _write_strongest(top, home, shape["k"])
        (home / "num_tokens_seen.txt").write_text(str(shape["num_seqs"] * shape["seq_len"]))
        if shape["rand_seqs"]:
            home = Path(folder) / _RANDOM / f"layer{layer}"
            _write_windows(random, home, shape["rand_seqs"], shape["seq_len"], encoded.pad)
        told += encoded.told
    kinds = {_ACTIVATION_TYPES.get(source, "custom") for source in features["source"].to_pylist()}
    told_of = {"activation_type": kinds.pop() if len(kinds) == 1 else "custom", "indices_file": None}
    config = shape | {"num_top_acts_to_save": shape["k"]} | told_of | dict(about)
    (Path(folder) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return told.pop(_WRITTEN, 0), dict(told)


def _shape(exemplars: pa.Table, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The sizes that the config names: most windows of a kind, most tokens of a window, and windows seen."""
    most, longest = Counter[str](), 0
    for part in exemplars.select(["windows"]).to_batches(_FEATURES_AT_A_TIME):
        for windows in part["windows"].to_pylist():
            own = [one for one in windows if one["kind"] != "near"]
            most |= Counter(one["kind"] for one in own)
            longest = max([longest, *(len(one["tokens"]) for one in own)])
    seen = max(exemplars["seen"].to_pylist(), default=0)
    sizes = {"k": max(1, most["top"]), "rand_seqs": most["random"]}
    return {"num_seqs": seen, "seq_len": len(special_prefix(tokenizer)) + longest} | sizes


def _cases_of_layers(features: pa.Table) -> dict[int, list[str]]:
    """The features of each layer in the order of the rows: split after split."""
    found: dict[int, list[str]] = {}
    for _, here in sorted(by_split(features), key=lambda one: records.SPLITS.index(one[0])):
        for layer, case_id in zip(here["layer"].to_pylist(), here["case_id"].to_pylist(), strict=True):
            found.setdefault(layer, []).append(case_id)
    return found


_Rows = Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]  # of each feature its windows: ids and activations


class _Encoded:
    """Windows in tokens of the target. `of`: by case and kind their ids and activations, special tokens before them;
    `told`: how many there are, and how many are left out for each reason."""

    def __init__(self, exemplars: pa.Table, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._prefix, self.pad = tokenizer, list(special_prefix(tokenizer)), pad_of(tokenizer)
        self._ids: dict[tuple[str, ...], list[int] | None] = {}
        self.told = Counter[str]()
        self.of: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
        for case_id, windows in zip(exemplars["case_id"].to_pylist(), exemplars["windows"].to_pylist(), strict=True):
            own = self.of.setdefault(case_id, {})
            for window in windows:
                if (made := self._window(window)) is not None:
                    own.setdefault(window["kind"], []).append(made)

    def _window(self, window: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
        ids = None if window["kind"] == "near" else self._ids_of(tuple(window["tokens"]))
        self.told[NEAR if window["kind"] == "near" else OTHER_TOKENS if ids is None else _WRITTEN] += 1
        if ids is None:
            return None
        acts = [0.0] * len(self._prefix) + window["activations"]
        return np.array(self._prefix + ids, np.int32), np.array(acts, np.float32)

    def _ids_of(self, tokens: tuple[str, ...]) -> list[int] | None:
        """None where the text gives other tokens, or one that is read as padding stands first."""
        if tokens not in self._ids:
            ids = self._tokenizer("".join(tokens), add_special_tokens=False, verbose=False)["input_ids"]
            same = token_texts(self._tokenizer, ids) == list(tokens) and ids[:1] != [self.pad]
            self._ids[tokens] = ids if same else None
        return self._ids[tokens]


def _write_strongest(rows: _Rows, home: Path, k: int) -> None:
    strongest = np.full((len(rows), k), -np.inf, np.float32)
    for own, windows in zip(strongest, rows, strict=True):
        own[: len(windows)] = [acts.max() for _, acts in windows]
    np.save(home / "max_acts.npy", strongest)
    np.save(home / "min_acts.npy", np.full_like(strongest, np.inf))


def _write_windows(rows: _Rows, home: Path, k: int, tokens: int, pad: int) -> None:
    """Windows of each feature, best first, as `max_` arrays, and none at all as `min_` ones."""
    home.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), k, tokens)
    for kind, absent in (("min", np.inf), ("max", -np.inf)):
        ids = _new_array(home / f"{kind}_seq_ids.npy", shape, np.int32, pad)
        acts = _new_array(home / f"{kind}_seq_acts.npy", shape, np.float32, absent)
        _new_array(home / f"{kind}_dataset_ids.npy", shape[:2], np.int32, 0)
        for row, windows in enumerate(rows if kind == "max" else []):
            for place, (own, values) in enumerate(windows):
                ids[row, place, tokens - len(own) :], acts[row, place, tokens - len(own) :] = own, values


def _new_array(path: Path, shape: tuple[int, ...], dtype: Any, value: float) -> np.ndarray:
    """In its file: those of a large dictionary are larger than memory."""
    made: np.ndarray = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    made[...] = value
    return made
