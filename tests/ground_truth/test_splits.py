from collections import Counter

import pyarrow as pa
import pytest

from ray_explain.ground_truth.splits import split_of, training_rows


def test_a_group_is_in_the_same_split_in_every_run() -> None:
    cities = ("Rome", "Paris", "Berlin", "Oslo", "Madrid", "Wien")
    assert [split_of(city) for city in cities] == ["test", "train", "validation", "test", "test", "test"]


def test_splits_have_about_their_shares() -> None:
    counts = Counter(split_of(f"group {i}") for i in range(5000))
    assert abs(counts["test"] / 5000 - 0.25) < 0.03
    assert abs(counts["validation"] / 5000 - 0.1) < 0.03


def test_another_salt_deals_anew() -> None:
    groups = [f"group {i}" for i in range(200)]
    assert [split_of(g) for g in groups] != [split_of(g, salt="1") for g in groups]


def questions(groups: int, per_group: int = 3) -> pa.Table:
    names = [f"group {i}" for i in range(groups)] * per_group
    splits = ["test" if name.endswith("7") else "train" for name in names]
    return pa.table({"group": names, "split": splits, "row": range(len(names))})


def test_a_smaller_share_of_the_training_data_is_part_of_a_larger_one() -> None:
    table = questions(100)
    rows = {f: set(training_rows(table, f)["row"].to_pylist()) for f in (0.1, 0.3, 0.5, 1.0)}
    assert rows[0.1] < rows[0.3] < rows[0.5] < rows[1.0]
    assert [len(rows[f]) for f in rows] == [9 * 3, 27 * 3, 45 * 3, 90 * 3]


def test_a_share_holds_whole_groups_of_the_training_split_in_their_order() -> None:
    share = training_rows(questions(40), 0.5).to_pydict()
    assert set(share["split"]) == {"train"}
    assert Counter(Counter(share["group"]).values()) == {3: 18}
    assert share["row"] == sorted(share["row"])


def test_a_share_does_not_depend_on_the_order_of_the_table() -> None:
    table = questions(40)
    turned = table.take(list(reversed(range(table.num_rows))))
    assert sorted(training_rows(table, 0.2)["row"].to_pylist()) == sorted(training_rows(turned, 0.2)["row"].to_pylist())


def test_the_smallest_share_is_one_group() -> None:
    assert training_rows(questions(40), 1e-6).num_rows == 3


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_share_of_nothing_or_more_than_all_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        training_rows(questions(4), fraction)
