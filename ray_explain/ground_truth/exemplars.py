"""Exemplars of features, shard by shard of the corpus, and merged: the same whatever the number of actors."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from transformers import AutoTokenizer

from ray_explain import records, storage
from ray_explain.features.exemplars import Kind, TopWindows, Windows, search
from ray_explain.features.readers import read_sae
from ray_explain.features.sae import SAE
from ray_explain.ground_truth.corpora import read_windows, rows_about
from ray_explain.ground_truth.dictionaries import FEATURES, Windowed, dictionary
from ray_explain.ground_truth.positions import special_prefix
from ray_explain.ground_truth.target import Target
from ray_explain.stages import Result

NEVER_ACTIVE = "never active on the corpus"
SHARD_WINDOWS = 4096
KEPT_BYTES = 2 << 30  # of one actor, for the windows it keeps
_WINDOWS_AT_A_TIME = 64

SHARDS = pa.schema(
    [
        pa.field("layers", pa.list_(pa.int32()), nullable=False),  # read in one pass
        pa.field("start", pa.int64(), nullable=False),  # windows
        pa.field("stop", pa.int64(), nullable=False),
    ]
)

_WINDOW = pa.struct(
    [
        pa.field("kind", pa.string(), nullable=False),  # top | random | near
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.string()), nullable=False),  # they join to the window's text
        pa.field("activations", pa.list_(pa.float32()), nullable=False),
    ]
)
EXEMPLARS = pa.schema(
    [
        *FEATURES,
        pa.field("fired", pa.int64(), nullable=False),  # windows the feature is on in, of those seen
        pa.field("seen", pa.int64(), nullable=False),
        pa.field("windows", pa.list_(_WINDOW), nullable=False),
    ]
)


def shards(features: pa.Table, n_windows: int, *, positions: int, kept: int) -> pa.Table:
    """What the actors of `SearchStage` do one by one: SHARD_WINDOWS windows, on as many layers as fit into memory."""
    counts = {row["values"]: row["counts"] for row in pc.value_counts(features["layer"]).to_pylist()}
    groups: list[list[int]] = [[]]
    room = KEPT_BYTES
    for layer in sorted(counts):
        needed = counts[layer] * kept * positions * 4
        if groups[-1] and needed > room:
            groups.append([])
            room = KEPT_BYTES
        groups[-1].append(layer)
        room -= needed
    rows = [
        {"layers": layers, "start": start, "stop": min(start + SHARD_WINDOWS, n_windows)}
        for start in range(0, n_windows, SHARD_WINDOWS)
        for layers in groups
    ]
    return records.rows_table(rows, SHARDS)


class SearchStage:
    """The best windows of every feature in each shard.

    Config: that of `Target` and of `DictionaryStage`, and `features` (folder of its table), `positions` (tokens of
    the longest window), `exemplars` (how many of each kind), `seed`.
    """

    schema_in: ClassVar[pa.Schema] = SHARDS

    def __init__(self, config: dict[str, Any]) -> None:
        self._config, self._target = config, Target(config)
        self._corpus = Windowed(self._target, config["windows"])
        features = storage.read_table(config["features"], ["layer", "feature_id"])
        self._features = {
            layer: features.filter(pc.field("layer") == layer)["feature_id"].to_pylist()
            for layer in pc.unique(features["layer"]).to_pylist()
        }
        self._saes: dict[int, SAE] = {}

    @property
    def schema_out(self) -> pa.Schema:
        return found_schema(self._config["positions"])

    def __call__(self, table: pa.Table) -> Result:
        return Result(pa.concat_tables(self._of_shard(shard) for shard in table.to_pylist()), [])

    def _of_shard(self, shard: dict[str, Any]) -> pa.Table:
        layers = shard["layers"]
        for old in set(self._saes) - set(layers):
            del self._saes[old]
        found = {layer: self._empty(layer) for layer in layers}
        for start in range(shard["start"], shard["stop"], _WINDOWS_AT_A_TIME):
            numbers = range(start, min(start + _WINDOWS_AT_A_TIME, shard["stop"]))
            for layer, windows in self._read(numbers, layers):
                self._search(layer, windows, found[layer])
        return pa.concat_tables(self._table(layer, found[layer]) for layer in layers)

    def _empty(self, layer: int) -> TopWindows:
        return TopWindows(
            len(self._features[layer]),
            self._config["positions"],
            **self._config["exemplars"],
            seed=self._config["seed"],
            device=self._target.layout.device,
            numbers=self._features[layer],
        )

    def _read(self, numbers: Sequence[int], layers: Sequence[int]) -> Iterator[tuple[int, Windows]]:
        """Of each layer the windows, padded on the right."""
        neurons = self._config["source"] == "neurons"
        read = self._corpus.neurons(numbers, layers) if neurons else self._corpus.residual(numbers, layers)
        positions, ids = self._config["positions"], torch.tensor(list(numbers))
        present = torch.zeros(len(read), positions, dtype=torch.bool)
        for row, (own, _) in enumerate(read):
            present[row, : len(own)] = True
        device = self._target.layout.device
        for at, layer in enumerate(layers):
            residual = torch.zeros(len(read), positions, read[0][1].shape[2], device=device)
            for row, (own, vectors) in enumerate(read):
                residual[row, : len(own)] = vectors[at].float()
            yield layer, Windows(ids.to(device), residual, present.to(device))

    def _search(self, layer: int, windows: Windows, found: TopWindows) -> None:
        if self._config["source"] != "neurons":
            sae = self._sae(layer)
            search(sae, [windows], found, self._features[layer] if sae.activation == "topk" else None)
            return
        values = windows.residual[..., torch.tensor(self._features[layer], device=windows.residual.device)]
        near = values.masked_fill(~windows.present[..., None], -torch.inf).amax(dim=1)
        on = values.relu().masked_fill(~windows.present[..., None], 0)
        found.add(windows.ids, on, near)

    def _sae(self, layer: int) -> SAE:
        """On the target's device, no more of it than is looked for: all layers of a pass are there at once."""
        if layer not in self._saes:
            with dictionary(self._config, layer) as folder:
                sae = read_sae(folder, layer)
                own = sae if sae.activation == "topk" else sae.subset(self._features[layer])
                self._saes[layer] = own.to(self._target.layout.device)
        return self._saes[layer]

    def _table(self, layer: int, found: TopWindows) -> pa.Table:
        own, fired = np.array(self._features[layer]), found.fired.cpu().numpy()
        parts = []
        for kind in get_args(Kind):
            kept = found.kept(kind)
            n = len(kept.key)
            flat = pa.array(kept.activations.reshape(-1), type=pa.float32())
            columns = [
                pa.array(np.full(n, layer, dtype=np.int32)),
                pa.array(own[kept.feature].astype(np.int32)),
                pa.array([kind] * n, type=pa.string()),
                pa.array(kept.key),
                pa.array(kept.window),
                pa.FixedSizeListArray.from_arrays(flat, found.positions),
                pa.array(fired[kept.feature]),
            ]
            parts.append(pa.Table.from_arrays(columns, schema=self.schema_out))
        return pa.concat_tables(parts).sort_by("feature_id")


def found_schema(positions: int) -> pa.Schema:
    """What `SearchStage` makes: a row is a window that is among the best of a feature in one shard."""
    return pa.schema(
        [
            pa.field("layer", pa.int32(), nullable=False),
            pa.field("feature_id", pa.int32(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("key", pa.int64(), nullable=False),  # the higher the better
            pa.field("window", pa.int64(), nullable=False),
            pa.field("activations", pa.list_(pa.float32(), positions), nullable=False),  # padded with 0
            pa.field("fired", pa.int64(), nullable=False),  # windows of the shard that the feature is on in
        ]
    )


class MergeStage:
    """The best windows of each feature over all shards, with their tokens; features that are never on are dropped.

    Config: `model` and `revision` of the target, `found` (folder of `SearchStage`'s table), `windows` (folder of the
    table) and `n_windows`, `exemplars`.
    """

    schema_in: ClassVar[pa.Schema] = FEATURES
    schema_out: ClassVar[pa.Schema] = EXEMPLARS

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        with storage.local_folder(config["model"], weights=False) as folder:
            revision = config.get("revision")
            self._tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
        self._skipped = 0 if special_prefix(self._tokenizer) else 1

    def __call__(self, table: pa.Table) -> Result:
        rows, dropped = [], []
        features = table.to_pylist()
        best = self._best(table)
        tokens = self._tokens({row["window"] for own in best.values() for row in own["rows"]})
        for feature in features:
            own = best.get((feature["layer"], feature["feature_id"]))
            if own is None or not own["fired"]:
                dropped.append((feature["case_id"], NEVER_ACTIVE))
                continue
            windows = [self._window(row, tokens) for row in own["rows"]]
            rows.append(feature | {"fired": own["fired"], "seen": self._config["n_windows"], "windows": windows})
        return Result(records.rows_table(rows, EXEMPLARS), dropped)

    def _best(self, features: pa.Table) -> dict[tuple[int, int], dict[str, Any]]:
        """Of each feature the rows to keep, with their ranks, and the sums over all shards."""
        order = [("layer", "ascending"), ("feature_id", "ascending"), ("kind", "ascending"), ("key", "descending")]
        found = rows_about(self._config["found"], features).combine_chunks().sort_by(order)
        best: dict[tuple[int, int], dict[str, Any]] = {}
        light = found.drop_columns(["activations"]).to_pylist()
        for at, row in enumerate(light):
            own = best.setdefault(
                (row["layer"], row["feature_id"]), {"rows": [], "n": dict.fromkeys(get_args(Kind), 0), "fired": {}}
            )
            rank = own["n"][row["kind"]]
            own["n"][row["kind"]] += 1
            own["fired"][row["window"] // SHARD_WINDOWS] = row["fired"]
            if rank < self._config["exemplars"][row["kind"]]:
                own["rows"].append(row | {"rank": rank, "at": at})
        values = found["activations"].combine_chunks()
        for own in best.values():
            own["fired"] = sum(own["fired"].values())
            own["rows"].sort(key=lambda row: (get_args(Kind).index(row["kind"]), row["rank"]))
            for row in own["rows"]:
                row["activations"] = values[row["at"]].as_py()
        return best

    def _tokens(self, numbers: set[int]) -> dict[int, list[str]]:
        ids = read_windows(self._config["windows"], sorted(numbers))
        return {number: token_texts(self._tokenizer, own[self._skipped :]) for number, own in ids.items()}

    def _window(self, row: dict[str, Any], tokens: dict[int, list[str]]) -> dict[str, Any]:
        own = tokens[row["window"]]
        return {
            "kind": row["kind"],
            "rank": row["rank"],
            "tokens": own,
            "activations": row["activations"][: len(own)],
        }


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """A text for each token; together they are the text of all of them.

    A character that several tokens share belongs to the last of them.
    """
    texts, told = [], 0
    for stop in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        unfinished = whole.endswith("\ufffd") and stop < len(ids)
        texts.append("" if unfinished else whole[told:])
        told = told if unfinished else len(whole)
    return texts
