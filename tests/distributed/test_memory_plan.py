"""The plan of a training step's memory holds against what a process really takes."""

import pytest

from tests.benchmarks.bench_memory import measured, planned


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "train"),
    [
        ("20M", {"zero_stage": 0}),
        ("60M", {"zero_stage": 2, "precision": "bfloat16"}),
        ("130M", {"zero_stage": 3}),
        ("60M", {"zero_stage": 1, "lora": {"rank": 64}}),
    ],
)
def test_planned_memory_is_within_a_fifth_of_what_is_measured(size: str, train: dict) -> None:
    assert planned(size, train).total == pytest.approx(measured(size, train), rel=0.2)
