from collections import Counter

import pytest

from ray_explain.ground_truth.splits import split_of


def test_a_group_is_in_the_same_split_in_every_run() -> None:
    cities = ("Rome", "Paris", "Berlin", "Oslo", "Madrid", "Wien")
    assert [split_of(city) for city in cities] == ["test", "train", "validation", "test", "test", "test"]


def test_splits_have_about_their_shares() -> None:
    counts = Counter(split_of(f"group {i}", validation=0.2, test=0.3) for i in range(5000))
    assert abs(counts["test"] / 5000 - 0.3) < 0.03
    assert abs(counts["validation"] / 5000 - 0.2) < 0.03


def test_another_salt_deals_anew() -> None:
    groups = [f"group {i}" for i in range(200)]
    assert [split_of(g) for g in groups] != [split_of(g, salt="1") for g in groups]


def test_a_larger_test_share_keeps_the_test_groups() -> None:
    groups = [f"group {i}" for i in range(500)]
    small = {g for g in groups if split_of(g, test=0.1) == "test"}
    assert small < {g for g in groups if split_of(g, test=0.3) == "test"}


@pytest.mark.parametrize(("validation", "test"), [(-0.1, 0.2), (0.5, 0.5), (0.2, -0.1)])
def test_shares_that_leave_no_training_are_refused(validation: float, test: float) -> None:
    with pytest.raises(ValueError, match="shares of validation"):
        split_of("Rome", validation=validation, test=test)
