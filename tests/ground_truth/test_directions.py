"""One direction, one group: found on whatever layer, it is in one split."""

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.ground_truth.directions import grouped_by_direction

D = 16


def features(vectors: np.ndarray) -> pa.Table:
    n = len(vectors)
    columns = {
        "case_id": [f"{i:04d}" for i in range(n)],
        "group": [f"own {i}" for i in range(n)],
        "split": ["train"] * n,
        "layer": [i % 4 for i in range(n)],
        "source": ["sae"] * n,
        "feature_id": list(range(n)),
        "vectors": records.vectors_array([row[None] for row in vectors.astype(np.float32)], D),
    }
    return records.conform(pa.table(columns), records.features(D))


def groups(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["case_id"].to_pylist(), table["group"].to_pylist()))


def test_features_of_one_direction_share_a_group_whatever_their_norm() -> None:
    found = groups(grouped_by_direction(features(np.concatenate([np.eye(D), 3 * np.eye(D)])), seed=0))
    assert all(found[f"{i:04d}"] == found[f"{i + D:04d}"] == f"direction {i:04d}" for i in range(D))
    assert len(set(found.values())) == D


def test_opposite_directions_are_two() -> None:
    found = groups(grouped_by_direction(features(np.stack([np.eye(D)[0], -np.eye(D)[0]])), seed=0))
    assert len(set(found.values())) == 2


def test_what_a_third_one_connects_is_one_group() -> None:
    angles = np.radians([0, 40, 80])  # neighbours have a cosine of .77, the ends of .17
    vectors = np.zeros((3, D))
    vectors[:, 0], vectors[:, 1] = np.cos(angles), np.sin(angles)
    assert len(set(groups(grouped_by_direction(features(vectors), seed=0)).values())) == 1


def test_splits_follow_groups_and_not_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    table = features(np.concatenate([rng.normal(size=(200, D))] * 2))
    made = grouped_by_direction(table, seed=0)
    by_group: dict[str, set[str]] = {}
    for group, split in zip(made["group"].to_pylist(), made["split"].to_pylist()):
        by_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in by_group.values())
    assert set().union(*by_group.values()) == set(records.SPLITS)
    order = rng.permutation(table.num_rows)
    assert groups(grouped_by_direction(table.take(order), seed=0)) == groups(made)


def test_no_features_stay_none() -> None:
    assert grouped_by_direction(features(np.zeros((0, D))), seed=0).num_rows == 0
