"""At which share of the training data explainers are compared: of a sweep, some may not have come to the largest."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from ray_explain.evaluation.grading import rows_of, series_of


def common_share(known: Iterable[Collection[float]]) -> float:
    """Of the shares that the most explainers know, the largest; so of all explainers, where they share one.

    0 where none is known.
    """
    counts = Counter(share for shares in known for share in set(shares))
    most = max(counts.values(), default=0)
    return max((share for share, n in counts.items() if n == most), default=0.0)


class Shares:
    """The one share of the training data at which each explainer is shown, from `rows` that have task, target,
    explainer and fraction.

    On a task and target it is `common_share` of the explainers that were `trained`. What has no row there, be it an
    explainer or a baseline, is shown at its own largest share.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], trained: Collection[str]) -> None:
        self._trained = trained
        self._known: dict[tuple[str, str], dict[str, set[float]]] = defaultdict(lambda: defaultdict(set))
        for row in rows:
            self._known[row["task"], row["target"]][row["explainer"]].add(row["fraction"])
        self._common = {place: self._common_of(known) for place, known in self._known.items()}

    def _common_of(self, known: Mapping[str, set[float]]) -> float:
        of_trained = [shares for name, shares in known.items() if name in self._trained]
        return common_share(of_trained) if of_trained else max(max(shares) for shares in known.values())

    def known(self, task: str, target: str) -> dict[str, set[float]]:
        """Of each trained explainer that has rows on this task and target, its shares."""
        return {name: it for name, it in self._known.get((task, target), {}).items() if name in self._trained}

    def common(self, task: str, target: str) -> float:
        """The share of this task and target; the largest of all where nothing is known of them."""
        return self._common.get((task, target), max(self._common.values(), default=0.0))

    def of(self, task: str, target: str, explainer: str) -> float:
        """The share at which it is shown: 0 for what learns nothing from the training data."""
        common, own = self.common(task, target), self._known.get((task, target), {}).get(explainer, set())
        return common if common in own or not own else max(own)

    def of_pair(self, task: str, target: str, one: str, other: str) -> float | None:
        """The share at which two explainers are compared: the common one, or else the largest that both know."""
        known = self._known.get((task, target), {})
        both, common = known.get(one, set()) & known.get(other, set()), self.common(task, target)
        return common if common in both else max(both, default=None)


def shown(graded: pa.Table, shares: Shares) -> pa.Table:
    """The graded answers of each explainer and baseline at the share at which it is shown."""
    keys = ("task", "target", "explainer", "fraction")
    series = dict.fromkeys(tuple(one[key] for key in keys) for one in series_of(graded))
    found = [rows_of(graded, dict(zip(keys, one, strict=True))) for one in series if one[3] == shares.of(*one[:3])]
    return pa.concat_tables(found) if found else graded.slice(0, 0)
