"""Tables have their columns, and vectors come back as they went in."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_explain import records

SCHEMA = pa.schema([pa.field("a", pa.int32(), nullable=False), pa.field("b", pa.string())])


def test_conform_puts_columns_in_order_and_type() -> None:
    table = records.conform(pa.table({"b": ["x", None], "a": [1, 2]}), SCHEMA)
    assert table.schema == SCHEMA
    assert table.to_pylist() == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"a": [1]}, "missing \\['b'\\]"),
        ({"a": [1], "b": ["x"], "c": [0]}, "unexpected \\['c'\\]"),
        ({"a": [None], "b": ["x"]}, "1 nulls"),
        ({"a": ["one"], "b": ["x"]}, "types"),
    ],
)
def test_conform_refuses_what_is_not_the_table(columns: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        records.conform(pa.table(columns), SCHEMA)


def test_vectors_survive_parquet_slices_and_chunks(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 5)).astype(np.float32) for n in (2, 0, 1, 3)]
    table = pa.table({"vectors": records.vectors_array(rows, 5)})
    assert table.schema.field("vectors").type == records.vectors_type(5)
    pq.write_table(table, tmp_path / "t.parquet")
    read = pq.read_table(tmp_path / "t.parquet")
    found = records.vectors_of(pa.concat_tables([read, read.slice(2)])["vectors"])
    assert len(found) == 6
    for one, other in zip(found, rows + rows[2:], strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_vectors_at_all_are_a_column_too() -> None:
    assert records.vectors_of(records.vectors_array([], 4)) == []
    assert [row.shape for row in records.vectors_of(records.vectors_array([np.zeros((0, 4))], 4))] == [(0, 4)]


def test_a_vector_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must be"):
        records.vectors_array([np.zeros((1, 3))], 4)


def test_an_id_depends_on_content_alone() -> None:
    assert records.content_id({"a": 1, "b": [2]}) == records.content_id({"b": [2], "a": 1})
    assert records.content_id("a", "b") != records.content_id("ab")
    with pytest.raises(TypeError):
        records.content_id(object())
