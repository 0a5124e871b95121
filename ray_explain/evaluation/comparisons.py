"""One explainer against another on the same questions: self minus cross, uplift over controls, gain over baselines."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from ray_explain import records
from ray_explain.errors import BadInput
from ray_explain.evaluation import intervals
from ray_explain.evaluation.grading import rows_of, series_of
from ray_explain.evaluation.metrics import Metric, Part, Tally, defined, headline, measured, tally
from ray_explain.evaluation.shares import common_share

BY = ("all", "changed", "stratum")
PERMUTATIONS = 4999
UNSCORED = ("correlation", "embedding", "judged", "simulated", "detection")  # what an answer may fail to have


class Who(NamedTuple):
    """Whose answers: an explainer under a control, all its seeds together."""

    explainer: str
    control: str = "none"


class Contrast(NamedTuple):
    """What is subtracted from what, and as what."""

    kind: str  # self_minus_cross | uplift | over_baseline
    one: Who
    other: Who


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A series of answers, summed up and resampled."""

    rows: pa.Table  # of GRADED, as `rows_of` gives them
    tally: Tally
    values: Float[np.ndarray, " parts"]
    resampled: Float[np.ndarray, "resamples parts"]


Seeds = dict[int, Measured]  # seed of training -> its answers
Square = dict[tuple[str, str], list[dict[str, Any]]]  # (explainer, target) -> its series of answers, one a seed


def comparisons(
    graded: pa.Table,
    *,
    trained: Sequence[str],
    seed: int,
    resamples: int = 2000,
    permutations: int = PERMUTATIONS,
) -> pa.Table:
    """All comparisons that graded answers allow, on each task and target: a table of records.COMPARISONS.

    A target that explains itself (the explainer has its name) is compared with every other explainer that was
    `trained`, and each of these with itself under each control and with every baseline: all other names. Both sides
    answered the same questions. Seeds of training are paired where both sides have them and their mean is compared; a
    baseline without seeds (all but records.TEXT_ONLY) stands against every seed of the other, and sides without a seed
    in common are not compared. Intervals hold the draw of the groups, and that of the seeds where there are several
    (`intervals.spread_over_seeds`). p-values are those of `intervals.swap_test`, or with several seeds of the t test
    over them where that is larger; below 1 / (permutations + 1), which swaps cannot tell, they are those of the t test.
    `p_holm` corrects over the matrix: all comparisons of one task, fraction, contrast and metric on the same kind of
    part.

    Both sides know the same fraction of the training data; what knows none (fraction 0) stands against every fraction.
    A metric that an answer of one side does not have (a judge gave no mark) is left out for the question on both.

    Raises:
        BadInput: two sides answered different questions.
    """
    rows: list[dict[str, Any]] = []
    measure = partial(_measure, by=BY, metrics=measured(graded), resamples=resamples, seed=seed)
    for (task, target, fraction), sides in _measured(graded, measure).items():
        for contrast in _contrasts(target, sides, trained):
            one, other = _paired(sides[contrast.one], sides[contrast.other], contrast, measure)
            if not one:
                continue
            identity = {
                "task": task,
                "target": target,
                "fraction": fraction,
                "explainer": contrast.one.explainer,
                "against": contrast.other.control if contrast.kind == "uplift" else contrast.other.explainer,
                "contrast": contrast.kind,
            }
            rows.extend(identity | row for row in _compared(one, other, permutations, seed))
    return records.rows_table(corrected(rows), records.COMPARISONS)


def self_advantage(graded: pa.Table, *, seed: int, resamples: int = 2000) -> list[dict[str, Any]]:
    """For each task the difference in differences on its headline metric: how much better models explain themselves
    than the strength of the explainer and the ease of the target foretell (`intervals.self_weights`).

    Only explainers that are also targets take part, at the share of the training data that the most pairings know
    (`shares.common_share`), with the seeds that all of these have. Each row has task, fraction, metric, by, difference,
    low, high, p_value, p_holm (over the tasks), n_groups and seeds; groups are resampled together over all targets. A
    metric that some explainer's answer does not have is left out for the question on all who explain its target. A task
    has none where less than two models explain themselves and each other, or where the pairings have no seed in common.

    Raises:
        BadInput: explainers of one target answered different questions.
    """
    asked = [series for series in series_of(graded) if series["control"] == "none" and series["fraction"]]
    metrics, rows = measured(graded), []
    for task in sorted({series["task"] for series in asked}):
        fraction, square = _square([series for series in asked if series["task"] == task])
        if square and _tell_an_advantage(square):
            metric = headline(task, [metric.name for metric in metrics])
            facts = {"task": task, "fraction": fraction, "contrast": "advantage", "metric": metric, "by": "all"}
            rows.append(facts | _advantage(_cells(graded, square, metrics), metric, "all", resamples, seed))
    return corrected(rows)


def _square(asked: Sequence[dict[str, Any]]) -> tuple[float, Square]:
    """The share of the training data that the most pairings of models that are also targets know, and their series."""
    targets = {series["target"] for series in asked}
    among = [series for series in asked if series["explainer"] in targets]
    known: dict[tuple[str, str], set[float]] = defaultdict(set)
    square: Square = defaultdict(list)
    for series in among:
        known[series["explainer"], series["target"]].add(series["fraction"])
    fraction = common_share(known.values())
    for series in among:
        if series["fraction"] == fraction:
            square[series["explainer"], series["target"]].append(series)
    return fraction, square


def _tell_an_advantage(square: Square) -> bool:
    """Whether two models at least explain themselves and each other, and all pairings have a seed in common."""
    try:
        intervals.self_weights(sorted(square))
    except ValueError:
        return False
    return bool(_common_seeds(square))


def _common_seeds(square: Square) -> set[int]:
    return set.intersection(*({series["seed"] for series in by_seed} for by_seed in square.values()))


def _cells(graded: pa.Table, square: Square, metrics: Sequence[Metric]) -> dict[tuple[str, str], dict[int, Tally]]:
    """The answers of each pairing with the seeds that all have, summed up, each metric on the questions that all who
    explain the target have it for: strength would pass for an advantage where hard questions lack a score of some.
    """
    seeds, of_target = _common_seeds(square), defaultdict[str, list[dict[str, Any]]](list)
    for (_, target), by_seed in square.items():
        of_target[target] += [series for series in by_seed if series["seed"] in seeds]
    cells: dict[tuple[str, str], dict[int, Tally]] = defaultdict(dict)
    for target, members in of_target.items():
        tables = [rows_of(graded, series) for series in members]
        _check_same_questions(tables)
        for series, table in zip(members, _scored_by_all(tables), strict=True):
            cells[series["explainer"], target][series["seed"]] = tally(table, ["all"], metrics)
    return cells


def pilot(
    graded: pa.Table,
    *,
    task: str,
    target: str,
    explainer: str,
    against: str,
    metric: str = "exact_match",
    by: str = "all",
    fraction: float = 1.0,
    seed: int,
    resamples: int = 2000,
) -> intervals.Pilot:
    """What these answers tell of how many it takes to find a difference between two explainers
    (`intervals.questions_needed`). One seed of training tells nothing of how much seeds differ.

    Raises:
        ValueError: one of the two answered no question of this task and target, or not by this metric and part, or
            they have no seed in common.
        BadInput: as `comparisons`.
    """
    of_target = graded.filter((pc.field("task") == task) & (pc.field("target") == target))
    kind, metrics = [by.split("=")[0]], measured(of_target)
    measure = partial(_measure, by=kind, metrics=metrics, resamples=resamples, seed=seed)
    sides = _measured(of_target, measure).get((task, target, fraction), {})
    for name in (explainer, against):
        if Who(name) not in sides:
            raise ValueError(f"no answers of {name!r} to {task} questions about {target!r}: score some first")
    contrast = Contrast("difference", Who(explainer), Who(against))
    one, other = _paired(sides[contrast.one], sides[contrast.other], contrast, measure)
    if not one:
        raise ValueError(f"{explainer!r} and {against!r} of {target!r} have no seed in common: nothing is paired")
    at = one[0].tally.parts.index(_part(one[0].tally, metric, by))
    part = one[0].tally.parts[at]
    observed = np.array([[a.values[at] - b.values[at]] for a, b in zip(one, other, strict=True)])
    resampled = np.stack([a.resampled[:, at] - b.resampled[:, at] for a, b in zip(one, other, strict=True)], axis=1)
    reach = _reach_of_difference(one[0].tally.reach[:, [at]])
    spread = intervals.spread_over_seeds(observed, resampled[:, :, None], np.array([part.n_groups]), reach)
    return intervals.Pilot(
        group_variance=float(np.nanvar(resampled, axis=0).mean() * part.n_groups),
        questions_per_group=part.n / part.n_groups,
        seed_variance=float(spread.seed_variance[0]),
    )


def corrected(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `p_holm`: corrected over those of the same task, fraction, contrast, metric and kind of part; the
    advantages over each other, since there is one a task.
    """
    families: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        family = [] if row["contrast"] == "advantage" else [row[key] for key in ("task", "fraction", "metric")]
        families[row["contrast"], *family, row["by"].split("=")[0]].append(i)
    p_holm: dict[int, float] = {}
    for members in families.values():
        p_values = [np.nan if rows[i]["p_value"] is None else rows[i]["p_value"] for i in members]
        p_holm |= dict(zip(members, intervals.holm(p_values).tolist(), strict=True))
    return [row | {"p_holm": defined(p_holm[i])} for i, row in enumerate(rows)]


def _measure(rows: pa.Table, *, by: Sequence[str], metrics: Sequence[Metric], resamples: int, seed: int) -> Measured:
    tallied = tally(rows, by, metrics)
    return Measured(
        rows=rows,
        tally=tallied,
        values=tallied.values(tallied.sums.sum(axis=0)),
        resampled=intervals.bootstrap(tallied.sums, tallied.values, resamples=resamples, seed=seed),
    )


def _measured(
    graded: pa.Table, measure: Callable[[pa.Table], Measured]
) -> dict[tuple[str, str, float], dict[Who, Seeds]]:
    """(task, target, fraction) -> whose answers -> seed; what knows none of the data stands beside every fraction."""
    found: dict[tuple[str, str, float], dict[Who, Seeds]] = defaultdict(lambda: defaultdict(dict))
    for series in series_of(graded):
        place = (series["task"], series["target"], series["fraction"])
        found[place][Who(series["explainer"], series["control"])][series["seed"]] = measure(rows_of(graded, series))
    return {
        (task, target, fraction): found.get((task, target, 0.0), {}) | sides
        for (task, target, fraction), sides in found.items()
        if fraction
    }


def _contrasts(target: str, sides: dict[Who, Seeds], trained: Sequence[str]) -> Iterator[Contrast]:
    asked = [who.explainer for who in sides if who.control == "none"]
    explainers = [name for name in asked if name in trained]
    if target in explainers:
        yield from (Contrast("self_minus_cross", Who(target), Who(name)) for name in explainers if name != target)
    for name in explainers:
        controls = [who for who in sides if who.explainer == name and who.control != "none"]
        yield from (Contrast("uplift", Who(name), who) for who in controls)
        lookups = [who for who in asked if who not in trained]
        yield from (Contrast("over_baseline", Who(name), Who(lookup)) for lookup in lookups)


def _paired(
    one: Seeds, other: Seeds, contrast: Contrast, measure: Callable[[pa.Table], Measured]
) -> tuple[list[Measured], list[Measured]]:
    """Both sides, one entry per seed, each metric on the questions that all have it for; none without such a seed."""
    has_seeds = contrast.kind != "over_baseline" or contrast.other.explainer == records.TEXT_ONLY
    if not has_seeds and len(other) == 1:
        sides = [*one.values(), *(list(other.values()) * len(one))]
    else:
        shared = sorted(set(one) & set(other))
        if not shared:
            return [], []
        sides = [side[seed] for side in (one, other) for seed in shared]
    tables = [side.rows for side in sides]
    _check_same_questions(tables)
    found = zip(sides, _scored_by_all(tables), strict=True)
    sides = [side if side.rows is table else measure(table) for side, table in found]
    return sides[: len(sides) // 2], sides[len(sides) // 2 :]


def _scored_by_all(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Answers to the same questions, of which none has a score that another lacks; a table as it is where none did."""
    tables = list(tables)
    for at, field in enumerate(tables[0].schema):
        if field.name not in UNSCORED:
            continue
        known = [table[field.name].is_valid().to_numpy() for table in tables]
        if (unlike := np.logical_or.reduce(known) & ~np.logical_and.reduce(known)).any():
            kept = pa.array(~unlike)
            blank = [pc.if_else(kept, table[field.name], pa.scalar(None, field.type)) for table in tables]
            tables = [table.set_column(at, field, column) for table, column in zip(tables, blank, strict=True)]
    return tables


def _compared(one: list[Measured], other: list[Measured], permutations: int, seed: int) -> Iterator[dict[str, Any]]:
    parts, n_groups = one[0].tally.parts, one[0].tally.n_groups
    observed = np.stack([a.values - b.values for a, b in zip(one, other, strict=True)])
    resampled = np.stack([a.resampled - b.resampled for a, b in zip(one, other, strict=True)], axis=1)
    spread = intervals.spread_over_seeds(observed, resampled, n_groups, _reach_of_difference(one[0].tally.reach))
    p_swap = intervals.swap_test(
        np.stack([side.tally.sums for side in one], axis=1),
        np.stack([side.tally.sums for side in other], axis=1),
        one[0].tally.values,
        permutations=permutations,
        seed=seed,
    )
    # of so many swaps none came near: how much smaller p is, which decides in a large family, a t test says
    p_swap = np.where(p_swap < 1.5 / (permutations + 1), np.fmin(p_swap, spread.p_value), p_swap)
    p_values = np.fmax(p_swap, spread.p_value) if len(one) > 1 else p_swap
    for i, part in enumerate(parts):
        if not part.n:
            continue
        yield {
            "metric": part.metric.name,
            "by": part.by,
            **{name: defined(getattr(spread, name)[i]) for name in ("difference", "low", "high")},
            "p_value": defined(p_values[i]),
            "n": part.n,
            "n_groups": part.n_groups,
            "seeds": len(one),
        }


def _reach_of_difference(reach: Float[np.ndarray, "2 parts"]) -> Float[np.ndarray, "2 parts"]:
    return np.stack([reach[0] - reach[1], reach[1] - reach[0]])


def _check_same_questions(tables: Sequence[pa.Table]) -> None:
    first, *others = (table["question_id"] for table in tables)
    for each in others:
        if not each.equals(first):
            differ = len(set(each.to_pylist()) ^ set(first.to_pylist()))
            raise BadInput(f"compared answers are to different questions ({differ} of them): score both on one table")


def _advantage(
    cells: dict[tuple[str, str], dict[int, Tally]], metric: str, by: str, resamples: int, seed: int
) -> dict[str, Any]:
    pairings = sorted(cells)
    weights = intervals.self_weights(pairings)
    seeds = sorted(set.intersection(*(set(each) for each in cells.values())))
    if not seeds:
        raise ValueError("the pairings have no seed in common: train each explainer with the same seeds")
    groups = {
        name: i for i, name in enumerate(sorted({g for c in cells.values() for t in c.values() for g in t.groups}))
    }
    blocks = [[_metric_sums(cells[pairing][s], metric, by, groups) for s in seeds] for pairing in pairings]
    width = blocks[0][0][0].shape[1]
    value = blocks[0][0][1].metric.value
    sums = np.concatenate([block for row in blocks for block, _ in row], axis=1)

    def values(total: np.ndarray) -> np.ndarray:
        cell_values = value(total.reshape(*total.shape[:-1], len(pairings), len(seeds), width))
        return np.moveaxis(cell_values, -2, -1) @ weights

    observed = values(sums.sum(axis=0))[:, None]
    resampled = intervals.bootstrap(sums, values, resamples=resamples, seed=seed)[:, :, None]
    told = min(part.n_groups for row in blocks for _, part in row)
    part = blocks[0][0][1]
    extremes = np.sort(weights[:, None] * np.array(part.metric.reach), axis=1).sum(axis=0)
    spread = intervals.spread_over_seeds(observed, resampled, np.array([told]), extremes[:, None])
    return {
        **{name: defined(getattr(spread, name)[0]) for name in ("difference", "low", "high", "p_value")},
        "n_groups": told,
        "seeds": len(seeds),
    }


def _metric_sums(tallied: Tally, metric: str, by: str, groups: dict[str, int]) -> tuple[np.ndarray, Part]:
    """The columns of one metric and part, one row for each of `groups`, zero where a group was not asked."""
    part = _part(tallied, metric, by)
    spread = np.zeros((len(groups), part.columns.stop - part.columns.start))
    spread[[groups[name] for name in tallied.groups]] = tallied.sums[:, part.columns]
    return spread, part


def _part(tallied: Tally, metric: str, by: str) -> Part:
    for part in tallied.parts:
        if (part.metric.name, part.by) == (metric, by):
            return part
    raise ValueError(f"no {metric!r} by {by!r}: there is {sorted({(p.metric.name, p.by) for p in tallied.parts})}")
