"""Which split a group belongs to: told by its content alone, so the same in every run, file and order."""

import hashlib

import pyarrow as pa
import pyarrow.compute as pc

VALIDATION_SHARE, TEST_SHARE = 0.10, 0.25  # expected, of groups, not of cases


def split_of(group: str, *, salt: str = "") -> str:
    """The split of all cases of `group`; another `salt` deals the groups anew."""
    digest = hashlib.sha256(f"{salt}\n{group}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < TEST_SHARE:
        return "test"
    return "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"


def training_rows(questions: pa.Table, fraction: float = 1.0) -> pa.Table:
    """The rows of the training split whose group is within `fraction` of its groups, at least one of them.

    Whole groups are taken, in an order told by their content alone: a smaller share is a part of every larger one, and
    the same for every explainer and seed.

    Raises:
        ValueError: the fraction is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} of the training data: above 0 and at most 1")
    rows = questions.filter(pc.equal(questions["split"], "train"))
    if fraction == 1 or not rows.num_rows:
        return rows
    groups = sorted(pc.unique(rows["group"]).to_pylist(), key=_place)
    within = groups[: max(1, round(fraction * len(groups)))]
    return rows.filter(pc.is_in(rows["group"], pa.array(within)))


def _place(group: str) -> bytes:
    """Where a group stands in the order of shares, which has nothing to do with its split."""
    return hashlib.sha256(f"share\n{group}".encode()).digest()
