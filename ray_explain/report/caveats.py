"""What to keep in mind when reading the numbers, said with the numbers at hand."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from ray_explain.evaluation.baselines import MAJORITY, MAJORITY_BY
from ray_explain.report import numbers
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Scores

CONSTANT = (MAJORITY, MAJORITY_BY)  # baselines that answer the same to all questions, or to all of a kind
NEAR = 0.1  # has-changed F1 that a constant answer may lack to an explainer and be told to know about as much
WITH_VECTORS = ("patching", "features")  # tasks that ask about a vector
_KIND = {"patching": "where a patch sits", "ablation": "what kind of question holds a hint"}


@dataclass(frozen=True, kw_only=True)
class Caveat:
    """A sentence to remember, and why."""

    title: str
    text: str


def caveats(data: ReportData, scores: Scores) -> list[Caveat]:
    """The most important first; only those that concern the tasks of this report."""
    makers: list[Callable[[ReportData, Scores], Caveat | None]] = [
        _whether_and_what,
        _shared_basis,
        _shared_knowledge,
        _not_ranked,
        _what_is_missing,
        _without_labels,
        _what_intervals_hold,
        _unparsed,
        _what_self_means,
    ]
    return [caveat for make in makers if (caveat := make(data, scores))]


def _whether_and_what(data: ReportData, scores: Scores) -> Caveat | None:
    tasks = [task for task in data.tasks if scores.has(task, "changed_f1")]
    if not tasks:
        return None
    here = "".join(f"{text} " for task in tasks if (text := _f1_text(task, data, scores)))
    return Caveat(
        title="Has-changed F1 says whether an answer changes, not to what.",
        text=f"{here}The headline is therefore exact match, and content on the cases that changed.",
    )


def _f1_text(task: str, data: ReportData, scores: Scores) -> str:
    """The best constant answer beside the best self-explainer, over targets, and what follows where it comes near it on
    each; empty where there are no two such.
    """
    found = [pair for target in data.targets_of(task) if (pair := _f1_of(task, target, scores))]
    if not found:
        return ""
    (constant, name), own = max(it for it, _ in found), max(it for _, it in found)
    near = all(own - value <= NEAR for (value, _), own in found)
    kind = _KIND.get(task, "the kind of question")
    so = f": {kind} alone tells about as much of whether the answer will change, or more" if near else ""
    return (
        f"The baseline “{name}” reaches {numbers.decimal(constant)} on {numbers.task_label(task)}, "
        f"the best model that explains itself {numbers.decimal(own)}{so}."
    )


def _f1_of(task: str, target: str, scores: Scores) -> tuple[tuple[float, str], float] | None:
    """Has-changed F1 of the best constant answer, with its name, and of the target itself."""
    found = [(scores.get(task, target, row, "changed_f1").value, row) for row in scores.rows(task, target)]
    known = [(value, row) for value, row in found if value is not None]
    constant = [(value, row.label) for value, row in known if row.kind == "baseline" and row.name in CONSTANT]
    own = [value for value, row in known if row.kind == "self"]
    return (max(constant), max(own)) if constant and own else None


def _shared_basis(data: ReportData, scores: Scores) -> Caveat | None:
    tasks = " and ".join(numbers.task_label(task) for task in data.tasks if task in WITH_VECTORS)
    if not tasks:
        return None
    return Caveat(
        title=f"A gap on {tasks} may be about reading the vector, not about knowing the target.",
        text="An explainer that started as the target gets the vector in its own basis; another model gets it in a "
        f"foreign one. What of the gap between self and cross on {tasks} comes from that, and what from knowing the "
        f"target, cannot be told apart here.{' Input ablation has no vector.' if 'ablation' in data.tasks else ''}",
    )


def _shared_knowledge(data: ReportData, scores: Scores) -> Caveat | None:
    if "ablation" not in data.tasks:
        return None
    return Caveat(
        title="A gap on input ablation may be about what the two models know, not about looking inside.",
        text="The question shows the prompt. An explainer that started as the target may answer that prompt itself, "
        "without the removed part, much as the target would; another model answers it with its own knowledge.",
    )


def _not_ranked(data: ReportData, scores: Scores) -> Caveat | None:
    told = []
    for task in data.tasks:
        rates = {target: scores.changed_rate(task, target) for target in data.targets_of(task)}
        known = [f"{target} {100 * rate:.0f}{numbers.THIN}%" for target, rate in rates.items() if rate is not None]
        if len(known) > 1:
            told.append(f"{numbers.task_label(task)}: {', '.join(known)}")
    if not told:
        return None
    return Caveat(
        title="Targets are not ranked against each other.",
        text="To say “unchanged” is right more often on a target whose answer changes less often, so exact match is "
        f"compared between explainers of one target only. Share of answers that changed on {'; on '.join(told)}.",
    )


def _what_is_missing(data: ReportData, scores: Scores) -> Caveat | None:
    told = [text for task in data.tasks for target in data.targets_of(task) if (text := _missing(task, target, data))]
    if not told:
        return None
    return Caveat(
        title="Not every explainer is scored at every share of the training data.",
        text="Those of a target are shown at the largest share at which all of them, or else most, are scored. "
        f"{' '.join(f'{text[0].upper()}{text[1:]}.' for text in told)} All scores are in scores.json.",
    )


def _missing(task: str, target: str, data: ReportData) -> str:
    """What explainers of one target have no score at; empty where nothing is missing."""
    known, whole = data.shares.known(task, target), data.fractions[-1]
    absent = [data.model_of(name) for name in data.explainers if name not in known]
    lacking = [data.model_of(name) for name, shares in known.items() if whole not in shares]
    common = data.shares.common(task, target)
    own = {data.model_of(name): data.shares.of(task, target, name) for name, it in known.items() if common not in it}
    parts = [f"{_names(absent)} not scored at all"] if absent else []
    if lacking:
        parts.append(f"{_names(lacking)} not scored at {numbers.share_label(whole)}")
    if lacking and common != whole:
        parts.append(f"explainers are shown at {numbers.share_label(common)}")
    parts += [f"{name} is shown at {numbers.share_label(share)}" for name, share in own.items()]
    return f"{numbers.task_label(task)}, target {target}: {', '.join(parts)}" if parts else ""


def _names(names: list[str]) -> str:
    ordered = sorted(names, key=numbers.natural)
    return f"{ordered[0]} is" if len(ordered) == 1 else f"{', '.join(ordered[:-1])} and {ordered[-1]} are"


def _without_labels(data: ReportData, scores: Scores) -> Caveat | None:
    told = [
        f"{numbers.task_label(task)}, target {target}: "
        + ", ".join(f"{numbers.by_label(by)} {numbers.count(n)}" for by, n in bare.items())
        for task in data.tasks
        for target in data.targets_of(task)
        if (bare := scores.unlabelled(task, target))
    ]
    if not told:
        return None
    found = [metric for metric in ("simulated", "detection") if scores.has("features", metric)]
    names = " and ".join(numbers.metric_label(metric) for metric in found)
    return Caveat(
        title="Some vectors have no label.",
        text=f"Nobody described them, so answers about them are scored by {names} alone: {'; '.join(told)} "
        f"questions. Over all questions they count towards {names}; other metrics, and the gold descriptions, are of "
        "the labelled vectors alone. tables.md has each origin of vectors apart: compare with the gold "
        "descriptions there.",
    )


def _what_intervals_hold(data: ReportData, scores: Scores) -> Caveat:
    return Caveat(
        title="The intervals hold the draw of the questions, not of everything.",
        text="They resample groups of test questions: an entity, an item or a feature with all its questions. "
        f"{_seeds(data, scores)}{_unlike_seeds(data, scores)} Differences are paired on the same questions, and "
        "p-values are corrected (Holm) over the comparisons of one kind on one task. Other models, other data or "
        "another recipe could give other numbers.",
    )


def _seeds(data: ReportData, scores: Scores) -> str:
    """What the differences that are shown hold of the draw of the seeds: no more than the one with the fewest."""
    pairs = [row["seeds"] for row in (*data.comparison_rows, *data.advantages)]
    once = all(len(it.seeds) <= 1 for key, it in scores.estimates.items() if key.row.trained)
    if once:
        return "Each explainer was trained once, so the intervals do not hold what another seed would give."
    if not pairs:
        return "A score is the mean over the seeds of training, and its interval does not hold their draw."
    least, most = min(pairs), max(pairs)
    if most == 1:
        return "Differences are of one seed of training, so their intervals do not hold what another seed would give."
    if least == 1:
        return (
            f"Differences are of 1 to {most} seeds of training; those of one do not hold what another seed would give, "
            "the others hold the draw of the seeds too. A score is the mean over them; its interval leaves that "
            "draw out."
        )
    seeds = f"{least} to {most}" if least < most else f"{least}"
    return (
        f"Differences are of {seeds} seeds of training and hold their draw too; a score is the mean over them, and its "
        "interval leaves their draw out."
    )


def _unlike_seeds(data: ReportData, scores: Scores) -> str:
    told = []
    for task in data.tasks:
        targets = [target for target in data.targets_of(task) if scores.seeds_differ(task, target)]
        told += [f"{numbers.task_label(task)} of {', '.join(targets)}"] if targets else []
    if not told:
        return ""
    return (
        f" Explainers do not have the same seeds on {'; '.join(told)}: a score is the mean over those that it has, a "
        "difference over those that both sides have, so that scores need not subtract to it; with none in common they "
        "are not compared."
    )


def _unparsed(data: ReportData, scores: Scores) -> Caveat | None:
    counts: dict[str, int] = defaultdict(int)
    for key, estimate in scores.estimates.items():
        if key.by == "all" and key.row.kind in ("self", "cross") and key.metric == scores.headline(key.task)[0][0]:
            counts[key.task] += estimate.unparsed
    told = [f"{numbers.count(n)} on {numbers.task_label(task)}" for task, n in counts.items() if n]
    if not told:
        return None
    return Caveat(
        title="An answer that cannot be read counts as wrong.",
        text=f"Answers of trained explainers that could not be read: {', '.join(told)}. None is left out of a score.",
    )


def _what_self_means(data: ReportData, scores: Scores) -> Caveat | None:
    if not any(
        data.is_self(name, target)
        for task in data.tasks
        for target in data.targets_of(task)
        for name in data.explainers
    ):
        return None
    return Caveat(
        title="“Self” means the same starting weights.",
        text="The target stays as it was; the explainer starts as a copy of it and is then trained to explain.",
    )
