"""The report as files: one self-contained page, the same numbers in Markdown, and in JSON."""

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from itertools import zip_longest
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ray_explain import report, storage
from ray_explain.questions.wordings import VECTOR
from ray_explain.report import curves, figures, markdown, numbers
from ray_explain.report.caveats import caveats
from ray_explain.report.data import ReportData, WorkedExample
from ray_explain.report.estimates import Row, Scores, row_of
from ray_explain.report.findings import Finding, Findings
from ray_explain.report.provenance import kinds

MOST_EXAMPLES = 120
MOST_CHARACTERS = 1_500  # of a text of an example
MOST_COMPARISONS = 400  # rows; the others stand in tables.md
MOST_FINDINGS = 6  # of explainers of other models; more are folded away
_CONTENT = re.compile(r"(<<<.*?>>>)", re.DOTALL)


def write_report(data: ReportData, folder: str) -> str:
    """Write `index.html` (needs no other file and no network), `tables.md` and `scores.json`; the path of the page.

    Each file appears at once or not at all; files of an earlier report in `folder` are replaced.
    """
    scores = Scores(data)
    _write(f"{folder}/tables.md", markdown.tables(data, scores))
    storage.write_json(as_json(data, scores), f"{folder}/scores.json")
    _write(f"{folder}/index.html", page(data, scores))
    return f"{folder}/index.html"


def _write(uri: str, text: str) -> None:
    with storage.whole_file(uri) as stream:
        stream.write(text.encode())


def page(data: ReportData, scores: Scores) -> str:
    """The HTML of the report."""
    found = Findings(data, scores)
    return _environment().get_template("report.html.j2").render(
        data=data,
        summary=found.summary(),
        groups=_groups(found),
        caveats=caveats(data, scores),
        tasks=[_task(task, data, scores) for task in data.tasks],
        examples=_examples(data, scores),
        n_examples=len(data.examples),
        comparisons=_comparisons(data, scores),
        stages=_stages(data),
        kinds=kinds(data.provenance),
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    """Everything is escaped: names and texts come from models and from users."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("ray_explain", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = (
        *("decimal", "signed", "interval", "count", "plural", "duration", "anything", "plain", "metric_meaning"),
        *("task_question", "task_label", "metric_label", "by_label", "control_label", "baseline_label"),
        *("seeds_label", "share_label", "p_decimals"),
    )
    made.filters.update({name: getattr(numbers, name) for name in names})
    made.filters.update({"question_text": _question_text, "answer_text": _answer_text})
    # our own CSS or script, as it is
    made.globals["source"] = lambda name: Markup((resources.files(report) / name).read_text(encoding="utf-8"))
    return made


def _question_text(text: str) -> Markup:
    """A question, cut where it is very long, with each vector as a mark that can be seen."""
    vector = Markup('<span class="vector" title="here the explainer reads a vector of the target">vector</span>')
    return vector.join(escape(part) for part in numbers.clip(text, MOST_CHARACTERS).split(VECTOR))


def _answer_text(text: str) -> Markup:
    """An answer, cut where it is very long, its content in bold."""
    parts = _CONTENT.split(numbers.clip(text, MOST_CHARACTERS))
    return Markup("").join(Markup("<b>{}</b>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Findings on one question, drawn on one axis."""

    title: str
    intro: str
    first: list[tuple[Finding, list[figures.Mark]]]
    more: list[tuple[Finding, list[figures.Mark]]]  # folded away
    axis: figures.Axis


def _groups(found: Findings) -> list[_Group]:
    """The questions a sceptic asks, in order; none that nothing was compared for."""
    asked = [
        (
            "Do models explain themselves better than others explain them?",
            "Self minus cross, paired on the same questions. Right of the line: the target explains itself better.",
            found.access(),
        ),
        (
            "Is the vector used?",
            "Score as asked minus score with the vector taken away. Right of the line: the right vector helps. No "
            "vector and a random one are like nothing in training, and may merely confuse; shuffled ones look real.",
            found.vector_use(),
        ),
        (
            "Is it more than a lookup?",
            "Score minus the score of each baseline. Right of the line: above the baseline.",
            found.over_baselines(),
        ),
    ]
    return [_group(title, intro, findings) for title, intro, findings in asked if findings]


def _group(title: str, intro: str, findings: list[Finding]) -> _Group:
    axis = figures.axis_of_differences(row for finding in findings for row in finding.differences)
    drawn = [(finding, figures.marks(finding.differences, axis)) for finding in findings]
    fold = len(findings) > MOST_FINDINGS
    first = [pair for pair in drawn if pair[0].is_self or not fold]
    more = [pair for pair in drawn if not pair[0].is_self and fold]
    return _Group(title=title, intro=intro, first=first, more=more, axis=axis)


def _task(task: str, data: ReportData, scores: Scores) -> dict[str, Any]:
    kinds = [(kind, figures.breakdowns(task, kind, data, scores)) for kind in scores.part_kinds(task)]
    return {
        "name": task,
        "metrics": list(dict.fromkeys(metric for metric, _ in scores.columns(task))),
        "matrices": figures.matrices(task, data, scores),
        "panels": figures.panels(task, data, scores),
        "breakdowns": [(kind, drawn) for kind, drawn in kinds if drawn],
        "curves": curves.learning_curves(task, data, scores),
        "reliability": [
            (plot, curves.calibration_text(task, plot.target, data)) for plot in curves.reliability(task, data)
        ],
        "shares": {target: data.share_text(task, target) for target in data.targets_of(task)},
        "rates": {target: scores.changed_rate(task, target) for target in data.targets_of(task)},
    }


def _comparisons(data: ReportData, scores: Scores) -> list[dict[str, Any]]:
    """As many as there is room for: those on the headlines first, then those over all questions."""

    def rank(row: dict[str, Any]) -> int:
        return 0 if (row["metric"], row["by"]) in scores.headline(row["task"]) else 1 + (row["by"] != "all")

    chosen = sorted(range(len(data.comparison_rows)), key=lambda i: (rank(data.comparison_rows[i]), i))
    return [data.comparison_rows[i] for i in sorted(chosen[:MOST_COMPARISONS])]


@dataclass(frozen=True, kw_only=True)
class _Card:
    """A worked example as it is drawn."""

    example: WorkedExample
    row: Row
    judged: str  # right, wrong or scored: what it is filtered by
    judgement: str  # the same with the score


def _examples(data: ReportData, scores: Scores) -> list[_Card]:
    """At most MOST_EXAMPLES: in turn from each task, self and cross, right and wrong."""
    kinds: dict[tuple[str, bool, str], list[_Card]] = defaultdict(list)
    for it in data.examples:
        card = _card(it, row_of(data, it.task, it.target, it.explainer), scores)
        kinds[it.task, card.row.is_self, card.judged].append(card)
    in_turn = [it for turn in zip_longest(*kinds.values()) for it in turn if it is not None]
    return in_turn[:MOST_EXAMPLES]


def _card(it: WorkedExample, row: Row, scores: Scores) -> _Card:
    if it.right is None:
        metric = numbers.metric_label(scores.headline(it.task)[0][0])
        return _Card(example=it, row=row, judged="scored", judgement=f"{metric} {numbers.decimal(it.score)}")
    judged, mark = ("right", "✓") if it.right else ("wrong", "✗")
    return _Card(example=it, row=row, judged=judged, judgement=f"{mark} {judged}")


def _stages(data: ReportData) -> list[tuple[str, float, float]]:
    """(stage, seconds, percent of the longest)."""
    seconds = {stage: float(value) for stage, value in data.run.get("seconds", {}).items() if value is not None}
    longest = max(seconds.values(), default=0.0) or 1.0
    return [(stage, value, round(100 * value / longest, 2)) for stage, value in seconds.items()]


def as_json(data: ReportData, scores: Scores) -> dict[str, Any]:
    """What `scores.json` holds: the tables as rows, undefined numbers as null, and the sentences with their verdict."""
    return {
        "title": data.title,
        "sentences": [{"verdict": it.verdict, "text": it.text} for it in Findings(data, scores).every()],
        "caveats": [asdict(it) for it in caveats(data, scores)],
        "explainers": dict(data.explainers),
        "scores": data.every_score,
        "comparisons": data.comparison_rows,
        "advantages": [_plain_json(dict(it)) for it in data.advantages],
        "calibrations": [_plain_json(asdict(it)) for it in data.calibrations],
        "targets": _plain_json(data.targets),
        "run": _plain_json(data.run),
        "provenance": [_plain_json(asdict(it)) for it in data.provenance],
        "notes": list(data.notes),
    }


def _plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: other objects as text, numbers that are not finite as null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
