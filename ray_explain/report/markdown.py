"""The report's tables as Markdown: every number of the page, and those it has no room for."""

import re
from collections.abc import Iterable, Sequence

from ray_explain.evaluation.metrics import OF_LABELS
from ray_explain.report import curves, numbers
from ray_explain.report.caveats import caveats
from ray_explain.report.data import ReportData
from ray_explain.report.estimates import Estimate, Row, Scores
from ray_explain.report.findings import Findings

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def tables(data: ReportData, scores: Scores) -> str:
    """The whole of `tables.md`."""
    parts = [f"# {escaped(data.title)}", *[escaped(note) for note in data.notes]]
    parts += ["## What the data allow to say", _sentences(data, scores)]
    for task in data.tasks:
        parts.append(f"## {numbers.task_label(task).capitalize()}")
        parts += [_scores(task, target, data, scores) for target in data.targets_of(task)]
        parts += [_origins(task, target, scores) for target in data.targets_of(task)]
        parts += [_curve(task, data, scores)]
        parts += [_parts(task, kind, scores, data) for kind in scores.part_kinds(task)]
        parts += [_calibration(task, data)]
    parts += [_comparisons(data), _targets(data), _artifacts(data), _run(data)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *[[escaped(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentences(data: ReportData, scores: Scores) -> str:
    found = [f"- **{it.verdict}**: {escaped(it.text)}" for it in Findings(data, scores).every()]
    kept = [f"- {escaped(it.title)} {escaped(it.text)}" for it in caveats(data, scores)]
    return "\n".join(found) + "\n\nTo keep in mind:\n\n" + "\n".join(kept)


def _name(row: Row) -> str:
    mark = " (self)" if row.is_self else ""
    return f"{row.name}{mark}, {row.label}" if row.kind == "control" else f"{row.label}{mark}"


def _scores(task: str, target: str, data: ReportData, scores: Scores) -> str:
    rows = scores.rows(task, target)
    columns = [
        (metric, by)
        for metric in scores.metrics(task)
        for by in ("all", "changed=true", "changed=false")
        if scores.has(task, metric, by)
    ]
    if not columns:
        return ""
    head = ["explainer", *[escaped(numbers.score_label(metric, by)) for metric, by in columns], "n", "unreadable"]
    lines = []
    for row in rows:
        estimates = [scores.get(task, target, row, metric, by) for metric, by in columns]
        whole, labelled = max(it.n for it in estimates), scores.get(task, target, row, "exact_match").n
        texts = [
            _unscored(it, labelled if metric in OF_LABELS else whole, whole) if by == "all" else it.text
            for it, (metric, by) in zip(estimates, columns)
        ]
        differ = scores.seeds_differ(task, target) and row.has_seeds
        seeds = f", {numbers.seeds_label(scores.seeds(task, target, row))}" if differ else ""
        lines.append([_name(row) + seeds, *texts, numbers.count(whole), _unreadable(estimates)])
    share = data.share_text(task, target)
    return f"### Target {escaped(target)}{f', {share}' if share else ''}\n\n" + table(head, lines)


def _unscored(it: Estimate, possible: int, whole: int) -> str:
    """With its own n, where some of the `whole` answers have no such score; unscored are those of the `possible`."""
    if not it.seeds or it.n == whole:
        return it.text
    unscored = f", {numbers.count(possible - it.n)} unscored" if it.n < possible else ""
    return f"{it.text} (n {numbers.count(it.n)}{unscored})"


def _unreadable(estimates: Sequence[Estimate]) -> str:
    """How many answers could not be read, over all questions and seeds; of several seeds with the number of answers."""
    of = f" of {numbers.count(max(it.n * len(it.seeds) for it in estimates))}"
    several = any(len(it.seeds) > 1 for it in estimates)
    return numbers.count(max(it.unparsed for it in estimates)) + (of if several else "")


def _origins(task: str, target: str, scores: Scores) -> str:
    """What vectors without a label are scored by, apart for each origin; of baselines and gold descriptions too."""
    bare = scores.unlabelled(task, target)
    metrics = [metric for metric in scores.metrics(task) if metric not in OF_LABELS]
    columns = [(metric, by) for metric in metrics for by in scores.strata(task) if scores.has(task, metric, by)]
    if not bare or not columns:
        return ""
    lines = []
    for row in scores.rows(task, target):
        estimates = [scores.get(task, target, row, *column) for column in columns]
        texts = [f"{it.text} (n {numbers.count(it.n)})" if it.seeds else numbers.UNDEFINED for it in estimates]
        lines.append([_name(row), *texts])
    told = ", ".join(f"{numbers.by_label(by)} {numbers.count(n)}" for by, n in bare.items())
    title = f"### Target {escaped(target)}, by origin of the vector\n\nWithout labels: {escaped(told)}.\n\n"
    return title + table(["explainer", *[escaped(numbers.score_label(*column)) for column in columns]], lines)


def _parts(task: str, kind: str, scores: Scores, data: ReportData) -> str:
    metric = scores.headline(task)[0][0]
    lines = []
    for target in data.targets_of(task):
        for row in scores.explainers(task, target):
            for by in scores.parts(task, kind):
                it = scores.get(task, target, row, metric, by)
                if it.seeds:
                    lines.append([by.split("=", 1)[1], target, _name(row), it.text, numbers.count(it.n)])
    title = f"### By {escaped(numbers.plain(kind))}\n\n"
    return (
        title + table([escaped(kind), "target", "explainer", numbers.metric_label(metric), "n"], lines) if lines else ""
    )


def _curve(task: str, data: ReportData, scores: Scores) -> str:
    plots = curves.learning_curves(task, data, scores)
    lines = [
        [plot.target, f"{one.row.label}{' (self)' if one.row.is_self else ''}", *[it.text for it in one.estimates]]
        for plot in plots
        for one in plot.series
    ]
    head = ["target", "explainer", *[text for _, text in plots[0].places]] if plots else []
    return f"### By share of the training data, {plots[0].title}\n\n{table(head, lines)}" if plots else ""


def _calibration(task: str, data: ReportData) -> str:
    told = [
        f"- Target {escaped(target)}, {escaped(sentence)}"
        for target in data.targets_of(task)
        for sentence in curves.calibration_text(task, target, data)
    ]
    return "### Calibration\n\n" + "\n".join(told) if told else ""


def _comparisons(data: ReportData) -> str:
    head = ["task", "target", "explainer", "against", "contrast", "metric", "questions", "share", "difference", "low",
            "high", "p", "p (Holm)", "n", "groups", "seeds"]  # fmt: skip
    lines = [
        [
            *[row[key] for key in ("task", "target", "explainer", "against", "contrast")],
            numbers.metric_label(row["metric"]),
            numbers.by_label(row["by"]),
            f"{100 * row['fraction']:.3g}%",
            *[numbers.signed(row[key], 3) for key in ("difference", "low", "high")],
            *[numbers.p_decimals(row[key]) for key in ("p_value", "p_holm")],
            *[numbers.count(row[key]) for key in ("n", "n_groups", "seeds")],
        ]
        for row in data.comparison_rows
    ]
    return "## All comparisons\n\n" + table(head, lines) if lines else ""


def _targets(data: ReportData) -> str:
    lines = [
        [label, *[numbers.anything(values.get(label)) for values in data.targets.values()]]
        for label in data.target_labels
    ]
    return "## Targets\n\n" + table(["", *[escaped(name) for name in data.targets]], lines) if lines else ""


def _artifacts(data: ReportData) -> str:
    lines = [
        [
            it.kind,
            it.label,
            it.fingerprint,
            numbers.count(it.rows),
            ", ".join(f"{reason}: {n}" for reason, n in it.dropped.items()) or "none",
            numbers.duration(it.seconds),
            it.commit or numbers.UNDEFINED,
        ]
        for it in data.provenance
    ]
    head = ["artifact", "of", "fingerprint", "rows", "dropped", "time", "commit"]
    return "## What was run\n\n" + table(head, lines) if lines else ""


def _run(data: ReportData) -> str:
    lines = [
        [f"{part}: {label}", numbers.duration(value) if part == "seconds" else numbers.anything(value)]
        for part, values in data.run.items()
        for label, value in values.items()
    ]
    return table(["run", "value"], lines) if lines else ""
