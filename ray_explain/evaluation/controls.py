"""The same questions with other vectors: what an explainer still gets right, it does not get from the vector."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ray_explain import records
from ray_explain.errors import BadInput

CONTROLS = ("shuffled", "no_vector", "other_layer", "random")


def under_control(questions: pa.Table, control: str, seed: int) -> pa.Table:
    """`questions` with other vectors and nothing else changed, so that answers pair up by question.

    Under "shuffled" each question gets the vectors of another one of the same layers and as many vectors, of another
    group where no group is more than half of them, and never its own or equal ones (where its layers have no others, it
    gets those of any other question with as many); under "other_layer" those of a question of other layers. Vectors of
    a feature come from one of the same origin, if there is such: whole activations are longer than directions. Under
    "random" each vector becomes a random one of the same norm; under "no_vector" it becomes zero; under "none" it
    stays. A row's draw depends on `seed` and on the table.

    Raises:
        ValueError: there is no such control.
        BadInput: there is no vector to change, or no question with other vectors to take.
    """
    if control == "none":
        return questions
    if control not in CONTROLS:
        raise ValueError(f"control {control!r}: there is none, {', '.join(CONTROLS)}")
    vectors = records.vectors_of(questions["vectors"])
    if not any(len(own) for own in vectors):
        raise BadInput(f"control {control!r}: none of the {len(vectors)} questions holds a vector; leave it out")
    # a stream of its own: vectors that were themselves drawn with this seed must not come back
    rng = np.random.default_rng([seed, int(records.content_id("control", control), 16)])
    if control == "no_vector":
        changed = [np.zeros_like(own) for own in vectors]
    elif control == "random":
        changed = [_random_like(own, rng) for own in vectors]
    else:
        donors = (_shuffled if control == "shuffled" else _other_layer)(questions, vectors, rng)
        changed = [vectors[donor] for donor in donors]
    at, field = questions.column_names.index("vectors"), questions.schema.field("vectors")
    return questions.set_column(at, field, records.vectors_array(changed, field.type.value_type.list_size))


def _random_like(own: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    drawn = rng.standard_normal(own.shape)
    norms = np.linalg.norm(own.astype(np.float64), axis=1) / np.linalg.norm(drawn, axis=1)
    return (drawn * norms[:, None]).astype(np.float32)


class _Kind(NamedTuple):
    """What vectors have in common that can stand for each other."""

    n_vectors: int
    layers: tuple[int, ...]
    origin: str  # of a feature: its source


def _kinds(questions: pa.Table, vectors: list[np.ndarray]) -> dict[_Kind, list[int]]:
    """Rows of each kind."""
    kinds: dict[_Kind, list[int]] = {}
    columns = questions.select(["layers", "task", "stratum"]).to_pylist()
    for row, (own, one) in enumerate(zip(vectors, columns, strict=True)):
        origin = one["stratum"] if one["task"] == "features" else ""
        kinds.setdefault(_Kind(len(own), tuple(one["layers"]), origin), []).append(row)
    return kinds


def _shuffled(questions: pa.Table, vectors: list[np.ndarray], rng: np.random.Generator) -> list[int]:
    """Which row each row gets its vectors from.

    Rows stand in a ring, those of a group side by side, and each takes from the one that is further by the size of
    the largest group: so it leaves its own group, unless that is more than half of the ring. What would get its own
    vectors back, from another row too (two prompts that begin alike have the same there), is drawn anew.
    """
    groups = questions["group"].to_numpy(zero_copy_only=False)
    kinds, donors = _kinds(questions, vectors), np.arange(len(groups))
    for kind, rows in kinds.items():
        if not kind.n_vectors:
            continue
        names, group_of, sizes = np.unique(groups[rows], return_inverse=True, return_counts=True)
        ring = np.array(rows)[np.lexsort([rng.random(len(rows)), rng.permutation(len(names))[group_of]])]
        donors[ring] = np.roll(ring, -min(sizes.max(), len(rows) - 1))
        as_many = [other for other in kinds if other.n_vectors == kind.n_vectors and other != kind]
        foreign = {row: other.origin != kind.origin for other in as_many for row in kinds[other]}
        for row in rows:
            if _alike(vectors[row], vectors[donors[row]]):
                order = rng.permutation(rows)
                order = order[np.argsort(groups[order] == groups[row], kind="stable")]
                elsewhere = sorted(map(int, rng.permutation(list(foreign))), key=foreign.__getitem__)
                donors[row] = _first_unlike(row, [*order, *elsewhere], vectors)
    return donors.tolist()


def _first_unlike(row: int, order: Iterable[float], vectors: list[np.ndarray]) -> int:
    for donor in map(int, order):
        if not _alike(vectors[row], vectors[donor]):
            return donor
    raise BadInput(
        f"control 'shuffled': no two questions with {len(vectors[row])} vectors have different ones; ask about more of "
        "them, or leave it out"
    )


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether vectors are equal but for rounding."""
    return bool(np.abs(one - other).max() <= 1e-5 * np.abs(one).max())


def _other_layer(questions: pa.Table, vectors: list[np.ndarray], rng: np.random.Generator) -> list[int]:
    """Which row each row gets its vectors from: any of other layers."""
    kinds = _kinds(questions, vectors)
    donors = np.arange(len(vectors))
    for kind, rows in kinds.items():
        if not kind.n_vectors:
            continue
        as_many = [other for other in kinds if other.n_vectors == kind.n_vectors and other.layers != kind.layers]
        alike = [other for other in as_many if other.origin == kind.origin]
        others = [row for other in alike or as_many for row in kinds[other]]
        if not others:
            raise BadInput(
                f"control 'other_layer': no question has {kind.n_vectors} vectors but of layers {list(kind.layers)}; "
                "ask about other layers too, or leave it out"
            )
        donors[rows] = rng.choice(others, size=len(rows))
    return donors.tolist()
