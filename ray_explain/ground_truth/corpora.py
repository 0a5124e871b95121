"""A corpus as windows of the target's tokens: numbered alike in every run, whoever reads them."""

import gzip
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.ground_truth.jsonl import json_object
from ray_explain.ground_truth.positions import Unusable
from ray_explain.stages import Result

NO_TEXT = "a line or row without the text field (`corpus.field`)"
SHORTEST = 8  # tokens of a text's last window; what is shorter says too little
_TEXTS_AT_A_TIME = 256
_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".txt", ".txt.gz")

WINDOWS = pa.schema(
    [
        pa.field("window", pa.int64(), nullable=False),  # its number in the corpus
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),  # ids of the target's, no special ones
    ]
)


def windows(path: str, field: str, tokenizer: PreTrainedTokenizerBase, *, n: int, tokens: int) -> Result:
    """The first `n` windows of `tokens` tokens of the corpus at `path`.

    `path` is a file, or a folder of files in the order of their names, local or remote: Parquet or JSON lines with the
    text in `field`, or plain text with an empty line between texts. A window never holds two texts; a text's last
    window may be shorter. Lines that cannot be read are dropped.

    Raises:
        ValueError: no file there, of another kind, or fewer than two windows in it.
        OSError: a file cannot be read.
    """
    dropped: list[tuple[str, str]] = []
    made = windows_of_texts(texts(path, field, dropped), tokenizer, n=n, tokens=tokens)
    if made.num_rows < 2:
        least = f"the corpus {path} gives {made.num_rows} windows of {SHORTEST} to {tokens} tokens"
        if dropped:
            place, reason = dropped[0]
            raise ValueError(f"{least}; {len(dropped)} lines or rows gave none, the first: {place}: {reason}")
        raise ValueError(f"{least}: give more")
    return Result(made, dropped)


def windows_of_texts(given: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, n: int, tokens: int) -> pa.Table:
    """As `windows`, for texts at hand."""
    rows: list[dict[str, Any]] = []
    left = iter(given)
    while len(rows) < n and (some := list(islice(left, _TEXTS_AT_A_TIME))):
        for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            parts = [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
            long = [part for part in parts if len(part) >= min(SHORTEST, tokens)]
            rows += [{"window": len(rows) + i, "tokens": part} for i, part in enumerate(long)]
    return records.rows_table(rows[:n], WINDOWS)


def texts(path: str, field: str, dropped: list[tuple[str, str]]) -> Iterator[str]:
    """The texts of a corpus, in order; (place, reason) of each line without one goes to `dropped`.

    Raises: as `windows`.
    """
    for file in _files(path):
        if file.endswith(".parquet"):
            yield from _of_parquet(file, field, dropped)
        elif ".json" in file.rsplit("/", 1)[-1]:
            yield from _of_lines(file, field, dropped)
        else:
            yield from _of_text(file)


@contextmanager
def opened(file: str) -> Iterator[io.BufferedIOBase]:
    """A local or remote file, unpacked where its name ends in .gz.

    Raises:
        OSError: it cannot be read.
    """
    system, path = storage.filesystem(file)
    with system.open_input_file(path) as raw:
        stream = io.BufferedReader(raw)
        yield gzip.GzipFile(fileobj=stream) if file.endswith(".gz") else stream


def read_windows(folder: str, numbers: Sequence[int]) -> dict[int, list[int]]:
    """The tokens of some windows of a table, by number."""
    found = rows_where(folder, ds.field("window").isin(pa.array(numbers, type=pa.int64())))
    return dict(zip(found["window"].to_pylist(), found["tokens"].to_pylist(), strict=True))


def rows_where(folder: str, condition: pc.Expression) -> pa.Table:
    """The rows of a table in a folder that a condition holds for; the rest of it is not kept in memory."""
    system, path = storage.filesystem(folder)
    data = ds.dataset(path, filesystem=system, format="parquet", exclude_invalid_files=True)
    return data.to_table(filter=condition)


def rows_about(folder: str, features: pa.Table, beside: Sequence[int] = (0,)) -> pa.Table:
    """The rows of a table of features that are about these (layer and number), or of numbers so far `beside` theirs."""
    parts = []
    for layer in pc.unique(features["layer"]).to_pylist():
        numbers = features.filter(pc.field("layer") == layer)["feature_id"].to_pylist()
        wanted = pa.array(sorted({number + far for number in numbers for far in beside}), type=pa.int32())
        parts.append((ds.field("layer") == layer) & ds.field("feature_id").isin(wanted))
    return rows_where(folder, reduce(or_, parts, ds.scalar(False)))


def _files(path: str) -> list[str]:
    if path.endswith(_SUFFIXES):
        if not storage.exists(path):
            raise ValueError(f"there is no corpus at {path}")
        return [path]
    is_file = not storage.is_remote(path) and Path(path).is_file()
    names = [] if is_file else storage.list_files(path)
    found = [f"{path}/{name}" for name in names if name.endswith(_SUFFIXES)]
    if not found:
        raise ValueError(f"no corpus at {path}: it is a file, or a folder of files, ending in {', '.join(_SUFFIXES)}")
    return found


def _of_parquet(file: str, field: str, dropped: list[tuple[str, str]]) -> Iterator[str]:
    system, path = storage.filesystem(file)
    with system.open_input_file(path) as raw:
        parquet = pq.ParquetFile(raw)
        if field not in parquet.schema_arrow.names:
            raise ValueError(f"{file} has no column {field!r}; it has {parquet.schema_arrow.names}: set `corpus.field`")
        place = 0
        for batch in parquet.iter_batches(batch_size=1024, columns=[field]):
            for text in batch.column(0).to_pylist():
                if isinstance(text, str):
                    yield text
                else:
                    dropped.append((f"{file} row {place}", NO_TEXT))
                place += 1


def _of_lines(file: str, field: str, dropped: list[tuple[str, str]]) -> Iterator[str]:
    with opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json_object(line).get(field)
            except Unusable as reason:
                dropped.append((f"{file} line {number}", str(reason)))
                continue
            if isinstance(text, str):
                yield text
            else:
                dropped.append((f"{file} line {number}", NO_TEXT))


def _of_text(file: str) -> Iterator[str]:
    with opened(file) as stream:
        parts = re.split(r"\n\s*\n", stream.read().decode("utf-8", errors="replace"))
    yield from (part for part in parts if part.strip())
