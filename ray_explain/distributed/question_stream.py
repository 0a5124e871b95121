"""The questions of a training as tokens, from Parquet through Ray Data into the worker that takes them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import PreTrainedTokenizerBase

from ray_explain import records, storage
from ray_explain.explainer.examples import Question, Refused, encode
from ray_explain.explainer.markers import Markers
from ray_explain.ground_truth.splits import training_rows
from ray_explain.questions.rows import questions_of, without_vectors

_ROWS_PER_TASK = 8192  # a second or two of work


class Piece(TypedDict):
    """A file of questions and which of its rows are to be learned."""

    file: str
    rows: list[int]  # ascending


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What turns questions into tokens.

    Args:
        blind: All numbers of the vectors are 0.
        with_vectors: Whether whoever reads keeps vectors; else only their number comes along.
    """

    tokenizer: PreTrainedTokenizerBase
    markers: Markers
    max_tokens: int
    d_target: int
    blind: bool
    with_vectors: bool

    @property
    def schema(self) -> pa.Schema:
        """`refused` says why a question cannot be learned; null where it can."""
        tokens = pa.list_(pa.int32())
        plain = {"question_id": pa.string(), "task": pa.string(), "refused": pa.string()}
        numbers = {"input_ids": tokens, "n_prompt": pa.int32(), "n_vectors": pa.int32(), "layers": tokens}
        return pa.schema(plain | numbers | {"vectors": records.vectors_type(self.d_target)})

    def table(self, questions: Iterator[Question]) -> pa.Table:
        """Rows of `schema`, one for each question."""
        rows, vectors = list[dict[str, Any]](), list[np.ndarray]()
        nothing = np.zeros((0, self.d_target), np.float32)
        for question in questions:
            row = {"question_id": question.question_id, "task": question.task}
            own = nothing
            try:
                example = encode(
                    without_vectors(question) if self.blind else question,
                    self.tokenizer,
                    self.markers,
                    max_tokens=self.max_tokens,
                    d_model=self.d_target,
                )
            except Refused as refusal:
                row["refused"] = refusal.reason
            else:
                own, names = example.vectors, ("input_ids", "n_prompt", "layers")
                row |= {name: getattr(example, name) for name in names} | {"n_vectors": len(own)}
            rows.append(row)
            vectors.append(own if self.with_vectors else nothing)
        table = pa.Table.from_pylist(rows, schema=self.schema.remove(self.schema.get_field_index("vectors")))
        return table.append_column(self.schema.field("vectors"), records.vectors_array(vectors, self.d_target))

    def read(self, piece: Piece) -> Iterator[pa.Table]:
        """The rows of a piece, a few at a time, in their order."""
        rows, first = np.asarray(piece["rows"]), 0
        for table in storage.file_batches(piece["file"]):
            here = rows[(first <= rows) & (rows < first + table.num_rows)] - first
            yield self.table(questions_of(table.take(pa.array(here))))
            first += table.num_rows


def pieces_of(folder: str, fraction: float) -> list[Piece]:
    """The questions of the training split in a folder, `fraction` of them, in their order.

    Raises:
        FileNotFoundError: there is no Parquet file.
    """
    files = [f"{folder}/{name}" for name in storage.list_files(folder, ".parquet")]
    tables = []
    for number, keys in enumerate(_keys(folder)):
        columns = {"file": np.full(keys.num_rows, number), "row": np.arange(keys.num_rows)}
        tables.append(pa.table(columns | {name: keys[name] for name in keys.column_names}))
    chosen = training_rows(pa.concat_tables(tables), fraction)
    row, file = chosen["row"].to_numpy(), chosen["file"].to_numpy()
    rows = [np.sort(row[file == number]).tolist() for number in range(len(files))]
    return [Piece(file=name, rows=own) for name, own in zip(files, rows, strict=True) if own]


@storage.patient
def _keys(folder: str) -> list[pa.Table]:
    return list(storage.read_tables(folder, ["split", "group"]))


def read_here(encoding: Encoding, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    """Tables of `encoding.schema`, made in this process."""
    for piece in pieces:
        yield from encoding.read(piece)


def read_through_ray(encoding: Encoding, pieces: Sequence[Piece]) -> Iterator[pa.Table]:
    """As `read_here`, the same rows in the same order, made by tasks of Ray Data on this machine.

    They reserve no core: the workers of trainings may have all of them, and wait for their questions meanwhile.
    """
    n_tasks = min(len(pieces), -(-sum(len(piece["rows"]) for piece in pieces) // _ROWS_PER_TASK))
    if not n_tasks:
        return
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    made = ray.data.from_items(list(pieces), override_num_blocks=n_tasks).map_batches(
        partial(_read_block, shared=ray.put(encoding)),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=0,
        concurrency=own_cores(),
        scheduling_strategy=here,
    )
    made.context.execution_options.preserve_order = True
    yield from made.iter_batches(batch_size=None, batch_format="pyarrow")


def own_cores() -> int:
    """This worker's part of the machine's cores; on a machine with GPUs most of them idle while the workers compute."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"]))


def _read_block(block: pa.Table, shared: ray.ObjectRef) -> Iterator[pa.Table]:
    return read_here(_encoding(shared), block.to_pylist())


@lru_cache(maxsize=1)
def _encoding(shared: ray.ObjectRef) -> Encoding:
    """A process unpacks the tokenizer once, not with every task."""
    return ray.get(shared)
