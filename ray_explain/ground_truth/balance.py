"""Equally many cases of each kind, told before and after."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from ray_explain import records


class Balanced(NamedTuple):
    """What was kept, and how many cases each cell ("split=test first_layer=0 role=final changed=true") had and has."""

    table: pa.Table
    before: dict[str, int]
    after: dict[str, int]


def balanced(
    table: pa.Table,
    by: Sequence[str] = ("first_layer", "role", "changed"),
    *,
    at_most: int | None = None,
    seed: int = 0,
) -> Balanced:
    """The same number of cases in every cell of the columns `by`, within each split (Li et al. 2025, 2.2: layer block,
    kind of token, and whether the answer changes).

    The number is that of the smallest cell of the split, or `at_most` if that is given: then smaller cells stay as they
    are. A cell without a case cannot be filled, and is not in the counts. Which cases are kept depends on their content
    and the seed alone; their order stays.

    Raises:
        ValueError: a column is not in the table, or `at_most` is below 1.
    """
    missing = {"case_id", "split", *by} - set(table.column_names)
    if missing:
        raise ValueError(
            f"cannot balance by {', '.join(sorted(missing))}: the table has {', '.join(table.column_names)}"
        )
    if at_most is not None and at_most < 1:
        raise ValueError(f"at_most {at_most}: keep at least one case of each cell")
    keys = list(zip(*(table[name].to_pylist() for name in ("split", *by))))
    before = Counter(keys)
    smallest = {split: min(n for key, n in before.items() if key[0] == split) for split, *_ in before}
    draws = [records.content_id(seed, case_id) for case_id in table["case_id"].to_pylist()]
    kept, after = [], Counter[tuple]()
    for row in sorted(range(len(keys)), key=draws.__getitem__):
        if after[keys[row]] < (at_most or smallest[keys[row][0]]):
            after[keys[row]] += 1
            kept.append(row)
    rows = table.take(pa.array(np.sort(np.array(kept, dtype=np.int64))))
    return Balanced(rows, _named(before, by), _named(after, by))


def _named(counts: Counter, by: Sequence[str]) -> dict[str, int]:
    names = ("split", *by)
    told = {" ".join(f"{name}={_told(part)}" for name, part in zip(names, key)): n for key, n in counts.items()}
    return dict(sorted(told.items()))


def _told(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
