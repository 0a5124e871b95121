"""Answers without any explainer: the commonest one, and that of the most similar training question."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from ray_explain import records
from ray_explain.evaluation.answers import normalise
from ray_explain.evaluation.embeddings import unit_rows

MAJORITY, MAJORITY_BY = "majority", "majority layer x role"
NEAREST, NEAREST_BY = "nearest neighbour", "nearest neighbour per layer"
BASELINES = (MAJORITY, MAJORITY_BY, NEAREST, NEAREST_BY)
_TRAIN_ROWS, _TEST_ROWS = 4096, 1024  # looked at together, to bound memory


def baselines(train: pa.Table, test: pa.Table) -> list[pa.Table]:
    """The answers of every baseline that questions of this task allow; without vectors nothing is nearest."""
    found = [majority(train, test), majority_by_layer_role(train, test)]
    if _holds_vectors(train) and _holds_vectors(test):
        found += [nearest_neighbour(train, test, per_layer=per_layer) for per_layer in (False, True)]
    return found


def majority(train: pa.Table, test: pa.Table) -> pa.Table:
    """For every test question the same: the answer that is right for most of the training questions."""
    return _answers(test, [_commonest(_right(train))] * test.num_rows, MAJORITY)


def majority_by_layer_role(train: pa.Table, test: pa.Table) -> pa.Table:
    """As `majority`, among the training questions of the same layers and role; among all where there are none."""
    cells: dict[Hashable, list[list[str]]] = {}
    for cell, right in zip(_cells(train, "role"), _right(train), strict=True):
        cells.setdefault(cell, []).append(right)
    answer = {cell: _commonest(those) for cell, those in cells.items()}
    overall = _commonest(_right(train))
    return _answers(test, [answer.get(cell, overall) for cell in _cells(test, "role")], MAJORITY_BY)


def nearest_neighbour(train: pa.Table, test: pa.Table, *, per_layer: bool) -> pa.Table:
    """For each test question, the answer of the training question whose vector has the largest cosine with its own.

    A question with several vectors is taken at their mean. With `per_layer` only training questions of the same
    layers are searched; where there are none, all. The first of equally near ones is taken. The search is exact, in
    chunks: beside the tables it takes some hundred MB at most for vectors 4,096 wide.

    Raises:
        ValueError: questions hold no vector.
    """
    train_blocks, test_matrix = _blocks(train, "training"), np.concatenate(_blocks(test, "test"))
    nearest = np.empty(test.num_rows, dtype=np.int64)
    train_cells, test_cells = (_rows_by(_cells(table)) if per_layer else {} for table in (train, test))
    everything = np.arange(train.num_rows)
    for cell, rows in test_cells.items() if per_layer else [((), np.arange(test.num_rows))]:
        nearest[rows] = _most_similar(train_blocks, train_cells.get(cell, everything), test_matrix, rows)
    texts = train["answer"].take(pa.array(nearest)).to_pylist()
    return _answers(test, texts, NEAREST_BY if per_layer else NEAREST)


def _most_similar(
    train: Sequence[Float[np.ndarray, "block d_model"]],
    candidates: Int[np.ndarray, " c"],
    test: Float[np.ndarray, "m d_model"],
    rows: Int[np.ndarray, " r"],
) -> Int[np.ndarray, " r"]:
    """For each of the test `rows`, which of the `candidates`, rows of the blocks of `train`, has the largest cosine."""
    best = np.full(len(rows), -np.inf, dtype=np.float32)
    nearest = np.zeros(len(rows), dtype=np.int64)
    for numbers, vectors in _chunks(train, candidates):
        unit = unit_rows(vectors)
        for first in range(0, len(rows), _TEST_ROWS):
            part = slice(first, first + _TEST_ROWS)
            cosines = unit_rows(test[rows[part]]) @ unit.T
            at = cosines.argmax(axis=1)
            value = cosines[np.arange(len(at)), at]
            better = value > best[part]
            best[part] = np.where(better, value, best[part])
            nearest[part] = np.where(better, numbers[at], nearest[part])
    return nearest


def _chunks(
    blocks: Sequence[np.ndarray], rows: Int[np.ndarray, " n"]
) -> Iterator[tuple[Int[np.ndarray, " chunk"], Float[np.ndarray, "chunk d_model"]]]:
    """Some of the `rows` (sorted) at a time, and their vectors."""
    start = 0
    for block in blocks:
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + len(block))]
        for first in range(0, len(inside), _TRAIN_ROWS):
            chunk = inside[first : first + _TRAIN_ROWS]
            yield chunk, block[chunk - start]
        start += len(block)


def _blocks(questions: pa.Table, what: str) -> list[Float[np.ndarray, "block d_model"]]:
    """One vector per question, in blocks that are views of the table's own memory where each has exactly one."""
    blocks = []
    for chunk in questions["vectors"].chunks:
        lengths = chunk.value_lengths().to_numpy(zero_copy_only=False)
        if not lengths.all():
            raise ValueError(f"{int((lengths == 0).sum())} {what} questions hold no vector: nothing is nearest to them")
        flat = chunk.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, chunk.type.value_type.list_size)
        if (lengths > 1).any():
            flat = np.add.reduceat(flat, np.cumsum(lengths) - lengths, axis=0) / lengths[:, None].astype(np.float32)
        blocks.append(flat)
    return blocks


def _holds_vectors(questions: pa.Table) -> bool:
    return bool(questions.num_rows) and pc.min(pc.list_value_length(questions["vectors"])).as_py() > 0


def _right(questions: pa.Table) -> list[list[str]]:
    """Of each question, every right answer."""
    if not questions.num_rows:
        raise ValueError("no training questions: a baseline answers what is common among them")
    return questions["answers"].to_pylist()


def _commonest(right: Sequence[Sequence[str]]) -> str:
    """The answer that is an exact match for most of the questions; ties go by alphabet."""
    plain = {text: normalise(text) for texts in right for text in texts}
    counts = Counter(key for texts in right for key in {plain[text] for text in texts})
    most = max(counts.values())
    return min(text for text, key in plain.items() if counts[key] == most)


def _cells(questions: pa.Table, *columns: str) -> list[Hashable]:
    layers = [tuple(layers) for layers in questions["layers"].to_pylist()]
    return list(zip(layers, *(questions[name].to_pylist() for name in columns), strict=True))


def _rows_by(cells: Sequence[Hashable]) -> dict[Hashable, np.ndarray]:
    rows: dict[Hashable, list[int]] = {}
    for row, cell in enumerate(cells):
        rows.setdefault(cell, []).append(row)
    return {cell: np.array(there) for cell, there in rows.items()}


def _answers(questions: pa.Table, texts: Sequence[str], name: str) -> pa.Table:
    n = questions.num_rows
    columns = {
        "question_id": questions["question_id"],
        "explainer": pa.array([name] * n, pa.string()),
        "control": pa.array(["none"] * n, pa.string()),
        "text": pa.array(texts, pa.string()),
        "logprob": pa.nulls(n, pa.float32()),
        "n_tokens": pa.array([0] * n, pa.int32()),
    }
    return records.conform(pa.table(columns), records.ANSWERS)
