import pyarrow as pa
import pytest

from ray_explain.ground_truth.balance import balanced

ROWS = [
    *[("train", 0, "final", True)] * 5,
    *[("train", 0, "final", False)] * 2,
    *[("train", 1, "final", True)] * 3,
    *[("test", 0, "final", False)] * 4,
]


def table_of(rows: list[tuple], start: int = 0) -> pa.Table:
    columns = zip(*((f"case {start + i}", *row) for i, row in enumerate(rows)))
    return pa.table(dict(zip(["case_id", "split", "first_layer", "role", "changed"], map(list, columns))))


def test_every_cell_of_a_split_has_as_many_cases_as_its_smallest() -> None:
    made = balanced(table_of(ROWS))
    assert made.before == {
        "split=test first_layer=0 role=final changed=false": 4,
        "split=train first_layer=0 role=final changed=false": 2,
        "split=train first_layer=0 role=final changed=true": 5,
        "split=train first_layer=1 role=final changed=true": 3,
    }
    assert made.after == {name: 4 if "test" in name else 2 for name in made.before}
    assert made.table.num_rows == sum(made.after.values())


def test_cells_can_be_cut_to_a_size_that_the_smallest_do_not_reach() -> None:
    made = balanced(table_of(ROWS), ["changed"], at_most=3)
    assert made.after == {
        "split=test changed=false": 3,
        "split=train changed=false": 2,
        "split=train changed=true": 3,
    }


def test_which_cases_are_kept_does_not_depend_on_the_order_of_the_table() -> None:
    table = table_of(ROWS)
    backwards = table.take(list(range(len(ROWS)))[::-1])
    kept = balanced(table).table["case_id"].to_pylist()
    assert kept == sorted(kept, key=lambda name: int(name.split()[1]))
    assert set(kept) == set(balanced(backwards).table["case_id"].to_pylist())
    assert set(kept) != set(balanced(table, seed=1).table["case_id"].to_pylist())


def test_a_column_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="cannot balance by relation"):
        balanced(table_of(ROWS), ["relation"])


def test_an_empty_table_stays_empty() -> None:
    made = balanced(table_of(ROWS).slice(0, 0))
    assert (made.table.num_rows, made.before, made.after) == (0, {}, {})
