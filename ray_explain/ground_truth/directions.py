"""Features that are one direction, found on several layers: they belong to one group, or the test would leak."""

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.sparse import csr_matrix, vstack
from scipy.sparse.csgraph import connected_components

from ray_explain import records
from ray_explain.ground_truth.splits import split_of

SAME_DIRECTION = 0.7
"""Cosine from which two features count as one direction. The residual stream keeps what it holds, so SAEs of different
layers find it again; left apart, a nearest neighbour among the training features names 7 in 10 test features of the
demo. At .7 groups are pairs and quadruples; from .5 on they grow together into one."""
_ROWS = 4096


def grouped_by_direction(features: pa.Table, *, seed: int) -> pa.Table:
    """`features` (records.features, one vector each) with new groups and splits: features whose vectors have a cosine
    of at least `SAME_DIRECTION`, on whatever layers, are in one group, and so are those that others connect.

    A group is named after the least id of its features. The order of the rows does not matter, and stays.
    """
    if not features.num_rows:
        return features
    vectors = np.concatenate(records.vectors_of(features["vectors"]))
    names = np.array(features["case_id"].to_pylist())
    _, label = connected_components(_neighbours(vectors), directed=False)
    least = [str(min(names[label == group])) for group in range(label.max() + 1)]
    groups = [f"direction {least[group]}" for group in label]
    splits = [split_of(group, salt=str(seed)) for group in groups]
    for name, values in (("group", groups), ("split", splits)):
        at = features.column_names.index(name)
        features = features.set_column(at, features.schema.field(name), pa.array(values))
    return features


def _neighbours(vectors: Float[np.ndarray, "n d_model"]) -> csr_matrix:
    """True where two vectors have a cosine of at least `SAME_DIRECTION`; some rows at a time."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(norms > 0, norms, 1)
    parts = (unit[i : i + _ROWS] for i in range(0, len(unit), _ROWS))
    return vstack([csr_matrix(part @ unit.T >= SAME_DIRECTION) for part in parts]).tocsr()
