"""Neuronpedia's bulk exports of explanations, joined to the features of an SAE by layer and number.

An export (https://neuronpedia-datasets.s3.us-east-1.amazonaws.com/v1/{model}/{source}/) has folders `explanations`,
`activations` and `features` of batch-*.jsonl.gz, and files that describe the whole: source.jsonl, release.jsonl, ... A
line of explanations has `layer` (the source, such as "19-llamascope-res-131k"), `index` (as text), `description` and
`explanationModelName`; one of activations `layer`, `index`, `tokens`, `values` and `maxValueTokenIndex`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
from scipy.stats import binomtest

from ray_explain import records, storage
from ray_explain.errors import BadInput
from ray_explain.ground_truth import public_files
from ray_explain.ground_truth.corpora import opened, rows_about
from ray_explain.ground_truth.jsonl import json_object
from ray_explain.ground_truth.positions import Unusable
from ray_explain.stages import Result

NO_FEATURE = "a line without layer and index"
NO_DESCRIPTION = "an empty description"
REPEATED = "the same description again"
UNKNOWN = "an id that the SAE does not have"
UNKNOWN_LAYER = "a layer that the target does not have"
OFFSETS = (-2, -1, 0, 1, 2)
ENOUGH = 20  # features, below which agreement says nothing
LEAST_AGREEMENT = 0.1  # of top tokens; unrelated features share fewer
CERTAIN = 1e-3  # p-value from which another offset is taken for the right one
_SUFFIXES = (".jsonl", ".jsonl.gz")
_SHORTEST_WORD = 3

LABELS = pa.schema(
    [
        pa.field("layer", pa.int32(), nullable=False),
        pa.field("feature_id", pa.int32(), nullable=False),
        pa.field("description", pa.string(), nullable=False),
        pa.field("origin", pa.string(), nullable=False),  # the model that wrote it
        pa.field("top_tokens", pa.list_(pa.string()), nullable=False),  # of the feature, if the export has them
    ]
)


def labels(path: str, layers: Sequence[int], n_layers: int) -> Result:
    """The descriptions of an export for these layers, ordered by layer and feature; lines that give none are dropped.

    `path` is one file, or a folder with the explanations, and activations if there are any, somewhere below it: local,
    s3:// or https:// (of a public bucket). "{layer}" in it stands for the numbers of the layers.

    Raises:
        BadInput: no export there, or several sources (SAEs) of one layer.
    """
    if "{layer}" in path:  # one by one: the descriptions of all layers are gigabytes as Python's objects
        parts = [labels(path.replace("{layer}", str(layer)), [layer], n_layers) for layer in sorted(layers)]
        return Result(pa.concat_tables(part.table for part in parts), [lost for part in parts for lost in part.dropped])
    files, dropped = _files(path), list[tuple[str, str]]()
    lines = _rows([file for file in files if "/activations/" not in file], dropped)
    found = _descriptions(lines, path, layers, n_layers, dropped)
    tokens = _top_tokens([file for file in files if "/activations/" in file], set(layers), dropped)
    rows = [
        {
            "layer": layer,
            "feature_id": number,
            "description": text,
            "origin": found[layer, number, text],
            "top_tokens": sorted(tokens.get((layer, number), ())),
        }
        for layer, number, text in sorted(found)
    ]
    return Result(records.rows_table(rows, LABELS), dropped)


def _descriptions(
    lines: Iterable[tuple[str, dict[str, Any]]],
    path: str,
    layers: Sequence[int],
    n_layers: int,
    dropped: list[tuple[str, str]],
) -> dict[tuple[int, int, str], str]:
    """Layer, feature and description -> the model that wrote it."""
    found: dict[tuple[int, int, str], str] = {}
    sources: dict[int, str] = {}
    for place, row in lines:
        layer, number = _feature(row)
        text = row.get("description")
        if layer is None or number is None:
            dropped.append((place, NO_FEATURE))
        elif layer >= n_layers:
            dropped.append((place, UNKNOWN_LAYER))
        elif layer not in layers:
            continue
        elif not isinstance(text, str) or not text.strip():
            dropped.append((place, NO_DESCRIPTION))
        elif (layer, number, text.strip()) in found:
            dropped.append((place, REPEATED))
        else:
            source = str(row["layer"])
            if sources.setdefault(layer, source) != source:
                several = f"{sources[layer]!r} and {source!r}"
                raise BadInput(f"the export {path} has layer {layer} of several SAEs, {several}: keep one of them")
            found[layer, number, text.strip()] = str(row.get("explanationModelName") or "neuronpedia")
    return found


def check_alignment(exemplars: Iterable[pa.Table], folder: str) -> dict[str, float]:
    """Whether the export's features are ours: the share of features whose top tokens it names, as its ids say and with
    ids that are off by one or two. Each part of the exemplars is read and let go before the next.

    What it names are its own top tokens, or else the words of its descriptions.

    Raises:
        BadInput: another offset agrees better, or its top tokens agree with none of ours.
    """
    hits: dict[int, list[bool]] = {offset: [] for offset in OFFSETS}
    of_tokens = False
    for part in exemplars:
        named: dict[tuple[int, int], set[str]] = {}
        for row in rows_about(folder, part, OFFSETS).to_pylist():
            of_tokens = of_tokens or bool(row["top_tokens"])
            named.setdefault((row["layer"], row["feature_id"]), set()).update(_named(row))
        for feature in part.select(["layer", "feature_id", "windows"]).to_pylist():
            own, at = _ours(feature["windows"]), (feature["layer"], feature["feature_id"])
            near = {offset: named.get((at[0], at[1] + offset)) for offset in OFFSETS}
            if own and None not in near.values():
                for offset, words in near.items():
                    hits[offset].append(bool(own & (words or set())))
    n = len(hits[0])
    if n < ENOUGH:
        return {"aligned features": n}
    agreement = {offset: sum(hits[offset]) / n for offset in OFFSETS}
    _refuse_misaligned(hits, agreement, of_tokens)
    return {"aligned features": n} | {f"agreement at offset {o}": round(agreement[o], 4) for o in OFFSETS}


def _refuse_misaligned(hits: dict[int, list[bool]], agreement: dict[int, float], of_tokens: bool) -> None:
    best = max(OFFSETS, key=lambda offset: agreement[offset])
    better = sum(a and not b for a, b in zip(hits[best], hits[0], strict=True))
    worse = sum(b and not a for a, b in zip(hits[best], hits[0], strict=True))
    what = f"top tokens agree for {agreement[0]:.0%} of {len(hits[0])} features"
    if better > worse and binomtest(better, better + worse, alternative="greater").pvalue < CERTAIN:
        raise BadInput(
            f"the export's ids are off by {best}: {what} as they are, and for {agreement[best]:.0%} when {best} is "
            "added; was it made from this SAE, with features counted from 0?"
        )
    if of_tokens and agreement[0] < LEAST_AGREEMENT:
        raise BadInput(f"the export is of other features: {what}; give the export of this SAE and layer")


def _ours(windows: Sequence[dict[str, Any]]) -> set[str]:
    """The tokens on which a feature is highest in its top windows."""
    tops = [window for window in windows if window["kind"] == "top"]
    peaks = [max(range(len(top["tokens"])), key=top["activations"].__getitem__) for top in tops]
    return {word for top, peak in zip(tops, peaks, strict=True) if (word := _plain(top["tokens"][peak]))}


def _named(row: dict[str, Any]) -> set[str]:
    if row["top_tokens"]:
        return {word for token in row["top_tokens"] if (word := _plain(token))}
    return {word for word in re.findall(r"\w+", row["description"].lower()) if len(word) >= _SHORTEST_WORD}


def _plain(token: str) -> str:
    return token.replace("\u0120", " ").replace("\u2581", " ").strip().lower()  # byte-level and SentencePiece spaces


def _top_tokens(
    files: Sequence[str], layers: set[int], dropped: list[tuple[str, str]]
) -> dict[tuple[int, int], set[str]]:
    found: dict[tuple[int, int], set[str]] = {}
    for place, row in _rows(files, dropped):
        layer, number = _feature(row)
        tokens, peak = row.get("tokens"), row.get("maxValueTokenIndex")
        if layer is None or number is None or not isinstance(tokens, list) or not isinstance(peak, int):
            dropped.append((place, NO_FEATURE))
        elif layer in layers and 0 <= peak < len(tokens):
            found.setdefault((layer, number), set()).add(str(tokens[peak]))
    return found


def _feature(row: dict[str, Any]) -> tuple[int | None, int | None]:
    layer, number = re.match(r"\d+", str(row.get("layer", ""))), str(row.get("index", ""))
    return int(layer.group()) if layer else None, int(number) if number.isdigit() else None


def _rows(files: Sequence[str], dropped: list[tuple[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for file in files:
        with public_files.opened(file) if public_files.is_web(file) else opened(file) as lines:
            try:
                for number, line in enumerate(lines, start=1):
                    place = f"{file} line {number}"
                    try:
                        row = json_object(line) if line.strip() else {}
                    except Unusable as reason:
                        dropped.append((place, str(reason)))
                        continue
                    if row:
                        yield place, row
            except (EOFError, OSError) as error:
                raise BadInput(f"{file} is truncated or damaged ({error}): fetch it again") from error


def _files(path: str) -> list[str]:
    if path.endswith(_SUFFIXES):
        if not public_files.is_web(path) and not storage.exists(path):
            raise BadInput(f"there is no Neuronpedia export at {path}")
        return [path if public_files.is_web(path) else storage.absolute(path)]
    names = _below(path)
    # A folder of batches alone is one of explanations; a whole source holds other files beside them.
    whole = [name for name in names if "/explanations/" in name or "/activations/" in name]
    if not names:
        raise BadInput(f"no Neuronpedia export at {path}: a folder with explanations/batch-*.jsonl.gz, or one file")
    return whole or names


def _below(path: str) -> list[str]:
    if public_files.is_web(path):
        return [name for name in public_files.files_below(path) if name.endswith(_SUFFIXES)]
    system, root = storage.filesystem(path)
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    base = storage.absolute(path).rstrip("/")
    return sorted(base + info.path[len(root) :] for info in found if info.path.endswith(_SUFFIXES))
