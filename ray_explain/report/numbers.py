"""Numbers and names as a person reads them: `.62 [.58, .66]`, `+.21`, `4 min 12 s`, `has-changed F1`."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

UNDEFINED = "–"
MINUS = "−"
THIN = "\u202f"  # narrow no-break space

_METRICS = {
    "exact_match": "exact match",
    "content_match": "content match",
    "changed_f1": "has-changed F1",
    "correlation": "correlation",
    "similarity": "word overlap",
    "judged": "judge's score",
    "embedding": "embedding similarity",
    "simulated": "simulator correlation",
    "detection": "detection",
}
_MEANINGS = {
    "exact_match": "the whole answer is right",
    "content_match": "the outcome it names is right, whatever the verdict",
    "changed_f1": "macro F1 of saying whether the answer changes",
    "correlation": "of the answered description with the feature's activations",
    "judged": "a language model's mark of the description, 0 (unrelated) to 1 (the same)",
    "embedding": "cosine of the sentence embeddings of the answer and the nearest right description",
    "simulated": "of activations that a simulator foretells from the description with the real ones",
    "detection": "balanced accuracy of telling from the description where the feature is active; chance is .5",
    "similarity": "F1 of the words shared with the nearest right description",
}
_ASKED = {
    "patching": "A vector of one run of the target is written into another run. Does its answer change, and to what?",
    "ablation": "A part of the target's prompt is taken away. Does its answer change, and to what?",
    "features": "A direction among the target's activations is given. What does it stand for?",
}
_TASKS = {"patching": "activation patching", "ablation": "input ablation", "features": "feature descriptions"}
_CONTROLS = {
    "none": "as asked",
    "shuffled": "vectors shuffled",
    "no_vector": "no vector",
    "other_layer": "vector of another layer",
    "random": "random vector",
}
_BASELINES = {
    "majority": "majority class",
    "gold descriptions": "the gold descriptions themselves: the ceiling",
    "majority layer x role": "majority of layer and role",
    "untrained": "untrained, the bare question",
    "zero-shot": "untrained, zero-shot",
    "text only": "trained without vectors",
    "SelfIE best scale": "SelfIE, best scale by the truth",
}


def metric_label(metric: str) -> str:
    """`changed_f1` -> `has-changed F1`."""
    return _METRICS.get(metric, plain(metric))


def metric_meaning(metric: str) -> str:
    """What a metric counts, in a few words; empty for one that is not known here."""
    return _MEANINGS.get(metric, "")


def task_question(task: str) -> str:
    """What a task asks; empty for one that is not known here."""
    return _ASKED.get(task, "")


def task_label(task: str) -> str:
    """`patching` -> `activation patching`."""
    return _TASKS.get(task, plain(task))


def control_label(control: str) -> str:
    """`no_vector` -> `no vector`."""
    return _CONTROLS.get(control, plain(control))


def baseline_label(baseline: str) -> str:
    """`majority` -> `majority class`."""
    if re.fullmatch(r"\d+-shot", baseline):
        return f"untrained, {baseline}"
    return _BASELINES.get(baseline, plain(baseline))


def by_label(by: str) -> str:
    """What part of the questions a score is of: `layer=2` -> `layer 2`, `changed=true` -> `changed cases`."""
    known = {"all": "all questions", "changed=true": "changed cases", "changed=false": "unchanged cases"}
    return known.get(by) or plain(by).replace("=", " ", 1)


def score_label(metric: str, by: str) -> str:
    """`exact match, all questions`."""
    return f"{metric_label(metric)}, {by_label(by)}"


def share_label(*shares: float) -> str:
    """`30 % of the training data`, `10 %, 30 % of the training data`."""
    return f"{', '.join(f'{100 * share:.3g}{THIN}%' for share in shares)} of the training data"


def seeds_label(seeds: Sequence[int]) -> str:
    """`seed 0`, `seeds 0, 1`."""
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(str(seed) for seed in seeds)}"


def plain(name: str) -> str:
    """An identifier as words."""
    return name.replace("_", " ")


def natural(text: str) -> list[tuple[int, float, str]]:
    """Sort key by which `layer 10` comes after `layer 9`."""
    return [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in re.split(r"(\d+)", text) if part]


def decimal(value: float | None, digits: int = 2) -> str:
    """`.62`, `1.00`, `−.05`; `–` where it is undefined."""
    if value is None or not math.isfinite(value):
        return UNDEFINED
    text = f"{abs(value):.{digits}f}".removeprefix("0")
    return (MINUS if value < 0 and text.strip(".0") else "") + text


def signed(value: float | None, digits: int = 2) -> str:
    """`+.21`, `−.05`; `.00` has no sign; `–` where it is undefined."""
    text = decimal(value, digits)
    return f"+{text}" if value is not None and value > 0 and text.strip(".0" + UNDEFINED) else text


def interval(low: float | None, high: float | None) -> str:
    """`[.58, .66]`; empty where there is none."""
    return "" if low is None or high is None else f"[{decimal(low)}, {decimal(high)}]"


def difference_parts(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """A difference and the ends of its interval, signed, with `digits_for` them; empty ends where one is missing."""
    values = [row[key] for key in ("difference", "low", "high")]
    difference, low, high = (signed(value, digits_for(*values)) for value in values)
    return (difference, low, high) if None not in values[1:] else (difference, "", "")


def digits_for(*differences: float | None) -> int:
    """Decimals that keep a small difference from being read as zero: two, or three where two would show `.00`."""
    hidden = any(value is not None and value and not decimal(value).strip(MINUS + ".0") for value in differences)
    return 3 if hidden else 2


def p_text(p_value: float | None) -> str:
    """`p < .001`, `p = .034`, `p = .0498`, which three digits would make .050; empty where there is none."""
    if p_value is None:
        return ""
    digits = 4 if 0.0495 <= p_value < 0.05 else 3 if p_value < 0.1 else 2
    return "p < .001" if p_value < 0.001 else f"p = {decimal(p_value, digits)}"


def p_decimals(p_value: float | None) -> str:
    """`.0342`, `< .0001`; `–` where there is none."""
    return "< .0001" if p_value is not None and p_value < 0.0001 else decimal(p_value, 4)


def count(number: int) -> str:
    """`12,400`."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{count(number)} {noun}" + ("" if number == 1 else "s")


def duration(seconds: float | None) -> str:
    """`.4 s`, `38 s`, `4 min 12 s`, `1 h 03 min`."""
    if seconds is None or not math.isfinite(seconds):
        return UNDEFINED
    if seconds < 9.95:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{THIN}min {rest}{THIN}s" if minutes else f"{rest}{THIN}s"
    return f"{minutes // 60}{THIN}h {minutes % 60:02d}{THIN}min"


def anything(value: Any) -> str:
    """A value of unknown kind: fractions as decimals, counts with separators, the rest as text; None is `–`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return _few_decimals(value) if abs(value) < 10 or not math.isfinite(value) else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(anything(item) for item in value)
    return UNDEFINED if value is None or value == "" else str(value)


def _few_decimals(value: float) -> str:
    """Two decimals, or three where the third is not 0: a recall of .998 is not 1."""
    text = decimal(value, 3)
    return text.removesuffix("0")


def clip(text: str, characters: int) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= characters else f"{text[:characters].rstrip()} … ({count(len(text))} characters)"
