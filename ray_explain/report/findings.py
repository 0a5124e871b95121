"""The sentences that the data allow, and how firmly."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray_explain.report import numbers
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Scores

# shown: the interval leaves out 0 in the expected direction, and p is below .05 after correction
Verdict = Literal["shown", "weak", "mixed", "not shown", "opposite", "unknown"]
ALPHA = 0.05
WHEN = {
    "shuffled": "when vectors are shuffled between questions",
    "no_vector": "when there is no vector",
    "other_layer": "when the vector comes from another layer",
    "random": "when the vector is a random one of the same norm",
}
# A vector of another layer may say nearly the same, so it does not decide whether the vector is used.
SPARED = ("other_layer",)
# These are like nothing in training: a fall under them alone may be mere confusion.
UNREAL = ("no_vector", "random")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A sentence, how firmly the data allow it, and the differences it rests on."""

    verdict: Verdict
    text: str
    differences: Sequence[dict[str, Any]] = ()  # rows of the comparisons
    is_self: bool = True  # whether it speaks of a target that explains itself


def verdict_of(row: dict[str, Any]) -> Verdict:
    """What one difference allows to say. Its p-value may be missing: then the interval alone decides."""
    if row["difference"] is None or row["low"] is None or row["high"] is None:
        return "unknown"
    if row["low"] <= 0 <= row["high"]:
        return "not shown"
    p_value = row["p_value"] if row["p_holm"] is None else row["p_holm"]
    if p_value is not None and p_value >= ALPHA:
        return "weak"
    return "shown" if row["difference"] > 0 else "opposite"


def verdict_of_all(rows: Iterable[dict[str, Any]]) -> Verdict:
    """Of several differences: their common verdict, or mixed where any of them, be it a weak one, speaks for the claim.

    Where none does, that some speak against it is no evidence for it.
    """
    found = {(verdict := verdict_of(row), verdict == "weak" and row["difference"] > 0) for row in rows}
    if not found:
        return "unknown"
    if len(found) == 1:
        return found.pop()[0]
    return "mixed" if found & {("shown", False), ("weak", True)} else "not shown"


def difference_text(row: dict[str, Any], *, p_value: bool = True) -> str:
    """`+.21 exact match (95 % interval +.17 to +.25, Holm p < .001)`."""
    difference, low, high = numbers.difference_parts(row)
    what = numbers.metric_label(row["metric"]) + ("" if row["by"] == "all" else f" on {numbers.by_label(row['by'])}")
    if row["difference"] is None:
        return f"{what} undefined"
    if not low:
        return f"{difference} {what} (no interval)"
    p_text = _p_text(row) if p_value else ""
    return f"{difference} {what} (95{numbers.THIN}% interval {low} to {high}{p_text})"


def _p_text(row: dict[str, Any]) -> str:
    if row["p_holm"] is not None:
        return f", Holm {numbers.p_text(row['p_holm'])}"
    return f", {numbers.p_text(row['p_value'])}" if row["p_value"] is not None else ""


class Findings:
    """The sentences of one report, by what they are about."""

    def __init__(self, data: ReportData, scores: Scores) -> None:
        self.data, self.scores = data, scores

    def summary(self) -> list[Finding]:
        """For each task a sentence on privileged access, then for each with vectors one on their use."""
        told = [task for task in self.data.tasks if task not in _WITHOUT_VECTOR or self._of("uplift", task)]
        return [self._access_summary(task) for task in self.data.tasks] + [self._vector_summary(task) for task in told]

    def access(self) -> list[Finding]:
        """For each target and each other model: does the target explain itself better than that model explains it?

        The differences in differences, of which each is over all pairings of a task, come first.
        """
        paired = [self._access(rows) for rows in self._grouped("self_minus_cross", "against", most=2)]
        return [_advantage(dict(row)) for row in self.data.advantages] + paired

    def vector_use(self) -> list[Finding]:
        """For each explainer: does its score fall when its vectors are taken away?"""
        groups = self._grouped("uplift", "explainer")
        return [self._vector_use(sorted(rows, key=lambda row: row["against"] in SPARED)) for rows in groups]

    def over_baselines(self) -> list[Finding]:
        """For each explainer: is it above the baselines?"""
        return [self._over_baselines(rows) for rows in self._grouped("over_baseline", "explainer")]

    def every(self) -> list[Finding]:
        """All of them, in the order of the page."""
        return [*self.summary(), *self.access(), *self.vector_use(), *self.over_baselines()]

    def _of(self, contrast: str, task: str, *, most: int = 1) -> list[dict[str, Any]]:
        """Comparisons of one contrast on the first `most` headlines of a task, the first headline first."""
        rows = [row for row in self.data.comparison_rows if (row["contrast"], row["task"]) == (contrast, task)]
        headline = self.scores.headline(task)[:most]
        return [row for part in headline for row in rows if (row["metric"], row["by"]) == part]

    def _grouped(self, contrast: str, name: str, *, most: int = 1) -> list[list[dict[str, Any]]]:
        """Comparisons of the same task, target and `name`; targets that explain themselves come first."""
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
        for task in self.data.tasks:
            for row in sorted(self._of(contrast, task, most=most), key=lambda row: numbers.natural(row["target"])):
                groups[task, row["target"], row[name]].append(row)
        return sorted(groups.values(), key=lambda rows: not self._is_self(rows[0]))

    def _is_self(self, row: dict[str, Any]) -> bool:
        return self.data.is_self(row["explainer"], row["target"])

    def _access(self, rows: list[dict[str, Any]]) -> Finding:
        target, other = rows[0]["target"], self.data.model_of(rows[0]["against"])
        task, verdict = _on(rows[0]), verdict_of_all(rows)
        better = f"{target} explains itself better than {other} explains it on {task}"
        worse = f"{other} explains {target} better than {target} explains itself on {task}"
        head = _head(verdict, better, worse, rows)
        return Finding(verdict=verdict, text=f"{head}: {_details(rows)}.", differences=rows)

    def _vector_use(self, rows: list[dict[str, Any]]) -> Finding:
        deciding = _deciding(rows)
        who, task, verdict = self._who(rows[0]), _on(rows[0]), verdict_of_all(deciding)
        without = f"{who} answers better {_AWAY[_all_spared(deciding)][1]} on {task}"
        confused = _may_be_confusion(verdict, deciding)
        claim = f"{who} {_WORSE.format('s') if confused else 'uses the vector'} on {task}"
        head = _head(verdict, claim, without, deciding)
        falls = _list([f"{_fall(row)} {WHEN.get(row['against'], _under(row))}" for row in rows])
        text = f"{head}: {numbers.metric_label(rows[0]['metric'])} {falls}.{confused}"
        return Finding(verdict=verdict, text=text, differences=rows, is_self=self._is_self(rows[0]))

    def _over_baselines(self, rows: list[dict[str, Any]]) -> Finding:
        who, task, verdict = self._who(rows[0]), _on(rows[0]), verdict_of_all(rows)
        each = f"each of {len(rows)} baselines" if len(rows) > 1 else numbers.baseline_label(rows[0]["against"])
        some = each.replace("each of", "any of") if verdict == "not shown" else each
        head = _head(verdict, f"{who} is above {some} on {task}", f"{who} is below {each} on {task}", rows)
        lower = sum(verdict_of(row) == "opposite" for row in rows)
        if lower and verdict != "opposite":
            head = f"{who} is below {lower} of {len(rows)} baselines on {task}"
        elif verdict == "mixed":
            head = f"{who} is not shown to be above {each} on {task}"
        text = f"{head}: {_best_of(rows) if verdict == 'shown' else _over(rows)}."
        return Finding(verdict=verdict, text=text, differences=rows, is_self=self._is_self(rows[0]))

    def _who(self, row: dict[str, Any]) -> str:
        model = self.data.model_of(row["explainer"])
        return f"{model}, explaining itself," if self._is_self(row) else f"{model}, explaining {row['target']},"

    def _access_summary(self, task: str) -> Finding:
        rows = self._of("self_minus_cross", task)
        won = [row for row in rows if verdict_of(row) == "shown"]
        lost = sum(verdict_of(row) == "opposite" for row in rows)
        verdict = verdict_of_all(rows)
        pairs = {1: "the one comparison", 2: "both comparisons"}.get(len(rows), f"all {len(rows)} comparisons")
        better = "a model explains itself better than another explains it"
        text = {
            "shown": f"models explain themselves better than others explain them, in {pairs} ({_span(won)}).",
            "mixed": f"models explain themselves better in {len(won)} of {len(rows)} comparisons ({_span(won)})"
            if won
            else f"no firm evidence that {better} (in {pairs})",
            "weak": f"what differs between self and others does not survive correction (in {pairs}).",
            "not shown": f"it is not shown that {better} (in {pairs})",
            "opposite": f"others explain the targets better than these explain themselves, in {pairs}.",
            "unknown": "nothing can be said on privileged access; "
            + ("no comparison of self and others has an interval." if rows else "self and others were not compared."),
        }[verdict]
        if verdict in ("mixed", "not shown"):
            text += f"; in {lost} the other model is better." if lost else "."
        advantages = [dict(row) for row in self.data.advantages if row["task"] == task]
        if verdict in ("mixed", "not shown", "weak") and verdict_of_all(advantages) == "shown":
            text += " Beyond explainer strength and target ease, over all pairings together, it is shown: see below."
        return Finding(verdict=verdict, text=f"{_start(task, rows)}: {text}", differences=rows)

    def _vector_summary(self, task: str) -> Finding:
        """Of the models that explain themselves or, where none was asked under a control, of those that were."""
        rows = self._of("uplift", task)
        own = [row for row in rows if self._is_self(row)]
        who, rows = f"models that explain {'themselves' if own else 'others'}", _deciding(own or rows)
        verdict, (lost, without, enough) = verdict_of_all(rows), _AWAY[_all_spared(rows)]
        confused = _may_be_confusion(verdict, rows)
        use, lost = (_WORSE.format(""), "") if confused else ("use the vector", f"{lost} ")
        text = {
            "shown": f"{who} {use}: {lost}they lose {_span(rows, '+')}.{confused}",
            "mixed": f"mixed evidence that {who} {use}; see each control below.{confused}",
            "weak": f"evidence that {who} {f'answer better {without}' if _falls_short(rows) else use} "
            f"does not survive correction.{confused}",
            "not shown": f"no evidence that {who} use the vector; {enough} may be enough.",
            "opposite": f"{who} answer better {without}.",
            "unknown": "nothing can be said on the use of the vector; "
            + ("no comparison with a control has an interval." if rows else "no explainer was asked under a control."),
        }[verdict]
        return Finding(verdict=verdict, text=f"{_start(task, rows)}: {text}", differences=rows)


_WITHOUT_VECTOR = ("ablation",)  # tasks that ask about text alone
_WORSE = "answer{} worse without a real vector"
_CONFUSION = "What is no real vector is like nothing in training, and may merely confuse."
# Whether all controls give the vector of another layer -> how they take it away, in two forms, and what they leave.
_AWAY = {
    True: ("with that of another layer", "with the vector of another layer", "that of another layer"),
    False: ("without the right one", "without the right vector", "the text"),
}


def _deciding(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of uplifts those that tell whether the vector is used: that over another layer's only where there is no other."""
    return [row for row in rows if row["against"] not in SPARED] or rows


def _may_be_confusion(verdict: Verdict, rows: Sequence[dict[str, Any]]) -> str:
    """A sentence where what speaks for the use of the vector is a fall without a real one alone; else nothing."""
    if not all(row["against"] in UNREAL for row in rows) or verdict not in ("shown", "weak", "mixed"):
        return ""
    return "" if verdict == "weak" and _falls_short(rows) else f" {_CONFUSION}"


def _all_spared(rows: Sequence[dict[str, Any]]) -> bool:
    return bool(rows) and all(row["against"] in SPARED for row in rows)


def _falls_short(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether weak differences, which have one sign then, are below 0."""
    return any((row["difference"] or 0) < 0 for row in rows)


def _head(verdict: Verdict, claim: str, opposite: str, rows: Sequence[dict[str, Any]]) -> str:
    """`claim`, as firmly as the verdict allows; `opposite` where the `rows` that it is of show or hint at that."""
    return {
        "shown": claim,
        "opposite": opposite,
        "weak": f"Weak evidence, gone after correction, that {opposite if _falls_short(rows) else claim}",
        "mixed": f"Mixed evidence that {claim}",
        "not shown": f"No evidence that {claim}",
        "unknown": f"Nothing can be said on whether {claim}",
    }[verdict]


def _advantage(row: dict[str, Any]) -> Finding:
    """The difference in differences of a task, told like a comparison."""
    verdict = verdict_of(row)
    claim = f"models explain themselves better than explainer strength and target ease foretell on {_on(row)}"
    head = {
        "shown": claim[0].upper() + claim[1:],
        "opposite": claim[0].upper() + claim[1:].replace("better", "worse"),
        "not shown": f"No evidence that {claim}",
    }.get(verdict, f"Nothing firm can be said on whether {claim}")
    return Finding(verdict=verdict, text=f"{head}: {difference_text(row)}.", differences=[row])


def _details(rows: Sequence[dict[str, Any]]) -> str:
    if len({verdict_of(row) for row in rows}) == 1:
        return _list([difference_text(row) for row in rows])
    return "; ".join(f"{difference_text(row)}, {verdict_of(row)}" for row in rows)


def _under(row: dict[str, Any]) -> str:
    return f"under the control “{numbers.control_label(row['against'])}”"


def _best_of(rows: Sequence[dict[str, Any]]) -> str:
    """The gain over the best of several baselines."""
    best = min(rows, key=lambda row: row["difference"])
    over = f" over the best of them, {numbers.baseline_label(best['against'])}" if len(rows) > 1 else ""
    return difference_text(best, p_value=False) + over


def _over(rows: Sequence[dict[str, Any]]) -> str:
    """The gain over each baseline that a model is not shown to be above."""
    told = [row for row in rows if verdict_of(row) != "shown"]
    over = _list([f"{_amount(row)} over {numbers.baseline_label(row['against'])}" for row in told])
    return f"in {numbers.metric_label(rows[0]['metric'])}, {over}"


def _fall(row: dict[str, Any]) -> str:
    """How a score moves when the vector is taken away: the uplift, its sign told by a word."""
    if row["difference"] is None:
        return "cannot be compared"
    digits = numbers.digits_for(row["difference"], row["low"], row["high"])
    falls = row["difference"] >= 0
    text = f"{'falls' if falls else 'rises'} by {numbers.decimal(abs(row['difference']), digits)}"
    if row["low"] is None or row["high"] is None:
        return text
    low, high = (row["low"], row["high"]) if falls else (-row["high"], -row["low"])
    return f"{text} ({numbers.decimal(low, digits)} to {numbers.decimal(high, digits)})"


def _amount(row: dict[str, Any]) -> str:
    if row["difference"] is None:
        return "undefined"
    difference, low, high = numbers.difference_parts(row)
    return f"{difference} ({low} to {high})" if low else difference


def _list(items: Sequence[str]) -> str:
    """`a, b and c`; a verb that two items share is said once."""
    said = [
        item if i == 0 or item.split()[0] != items[i - 1].split()[0] else _after_verb(item)
        for i, item in enumerate(items)
    ]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _after_verb(item: str) -> str:
    verb, rest = item.split(" ", 1)
    return rest if verb in ("falls", "rises") else item


def _span(rows: Sequence[dict[str, Any]], dropped: str = "") -> str:
    """`+.19 to +.29 exact match`: the smallest and the largest difference."""
    values = [row["difference"] for row in rows if row["difference"] is not None]
    if not values:
        return ""
    ends = [numbers.signed(value).removeprefix(dropped) for value in (min(values), max(values))]
    return f"{' to '.join(dict.fromkeys(ends))} {numbers.metric_label(rows[0]['metric'])}"


def _on(row: dict[str, Any]) -> str:
    """`activation patching`, and at which share of the training data, where that is not all of it."""
    return numbers.task_label(row["task"]) + _at([row["fraction"]])


def _at(shares: Iterable[float]) -> str:
    known = sorted(set(shares))
    if known in ([], [1.0]):
        return ""
    return f", at {numbers.share_label(*known)}"


def _start(task: str, rows: Sequence[dict[str, Any]]) -> str:
    label = numbers.task_label(task)
    return label[:1].upper() + label[1:] + _at(row["fraction"] for row in rows)
