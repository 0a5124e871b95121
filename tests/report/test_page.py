"""The page as a file: whole in itself, safe with any text, never without a word for what is undefined."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ray_explain.artifacts import Manifest
from ray_explain.records import content_id
from ray_explain.report.data import WorkedExample
from ray_explain.report.page import MOST_EXAMPLES, write_report

HOSTILE = "</style></script><script>alert('x')</script><img src=http://evil/x onerror=alert(1)>\"'&{{ 7*7 }}{% raw %}"
VOID = {"meta", "link", "input", "line", "rect", "br", "img"}


class Page(HTMLParser):
    """Collects tags, links and text, and complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs), f"{tag} has an event attribute"
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def seen(self) -> str:
        """The text as a person reads it."""
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def written(report, tmp_path):
    def make(**changes) -> tuple[Path, Page]:
        index = Path(write_report(report(**changes), str(tmp_path / "report")))
        return index, Page(index.read_text(encoding="utf-8"))

    return make


def test_three_files_are_written_and_nothing_else(written) -> None:
    index, _ = written()
    assert sorted(path.name for path in index.parent.iterdir()) == ["index.html", "scores.json", "tables.md"]


def test_writing_again_gives_the_same_bytes(written) -> None:
    before = {path.name: path.read_bytes() for path in written()[0].parent.iterdir()}
    assert {path.name: path.read_bytes() for path in written()[0].parent.iterdir()} == before


def test_the_page_needs_no_other_file_and_no_network(written) -> None:
    index, page = written()
    assert all(link.startswith("#") or link == "data:," for link in page.links)
    assert "default-src 'none'" in index.read_text()
    css = re.search(r"<style>(.*?)</style>", index.read_text(), re.DOTALL)
    assert css is not None and "url(" not in css[1] and "@import" not in css[1]


def test_links_within_the_page_lead_somewhere(written) -> None:
    _, page = written()
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def hostile(report, score_row, comparison_row) -> dict:
    example = WorkedExample(
        **dict.fromkeys(("task", "target", "explainer", "truth"), HOSTILE),
        question=f"{HOSTILE}<vector>",
        answer=f"<<<{HOSTILE}>>>",
        right=False,
        controls={HOSTILE: HOSTILE},
    )
    manifest = Manifest(
        **dict.fromkeys(("kind", "label", "fingerprint", "commit"), HOSTILE),
        config={HOSTILE: HOSTILE},
        parents=(),
        rows=1,
        dropped={HOSTILE: 1},
        seconds=1.0,
        versions={HOSTILE: HOSTILE},
    )
    parts = [score_row(HOSTILE, HOSTILE, HOSTILE, HOSTILE, by=by, control=HOSTILE) for by in ("all", f"x={HOSTILE}")]
    return {
        "title": HOSTILE,
        "scores": [score_row(HOSTILE, HOSTILE, HOSTILE, HOSTILE), *parts, score_row(HOSTILE, HOSTILE, "b" + HOSTILE)],
        "comparisons": [comparison_row("uplift", HOSTILE, HOSTILE, HOSTILE, HOSTILE, metric=HOSTILE)],
        "explainers": {HOSTILE: HOSTILE},
        "examples": [example],
        "targets": {HOSTILE: {HOSTILE: HOSTILE}},
        "provenance": [manifest],
        "run": {part: {HOSTILE: HOSTILE} for part in ("versions", "machine", "sizes")} | {"seconds": {HOSTILE: 1.0}},
        "notes": [HOSTILE],
    }


def test_text_of_any_kind_stays_text(written, report, score_row, comparison_row) -> None:
    _, plain = written()
    index, page = written(**hostile(report, score_row, comparison_row))
    assert page.tags.count("script") == plain.tags.count("script") == 1
    assert "img" not in page.tags and page.tags.count("style") == 1
    assert not any("evil" in link for link in page.links)
    assert "{{ 7*7 }}" in page.seen
    assert HOSTILE not in index.read_text()


@pytest.mark.parametrize("undefined", [None, float("nan"), float("inf")])
def test_what_is_undefined_is_a_dash_with_a_reason(written, score_row, comparison_row, undefined) -> None:
    rows = [
        score_row("patching", "llama", "llama"),
        score_row("patching", "llama", "llama", by="changed=true", n=3, value=0.4, low=undefined, high=undefined),
        score_row("patching", "llama", "qwen3", value=undefined, low=undefined, high=undefined, n=7),
        score_row("patching", "llama", "llama", by="layer=0", value=undefined, low=undefined, high=undefined, n=0),
    ]
    numbers = dict.fromkeys(("low", "high", "p_value", "p_holm"), undefined)
    differences = [comparison_row("self_minus_cross", "patching", "llama", "llama", "qwen3", undefined, **numbers)]
    targets = {"llama": {"fact recall": undefined, "why": None}}
    run = {"seconds": {"train": undefined}, "sizes": {"d_model": undefined}}
    index, page = written(scores=rows, comparisons=differences, targets=targets, run=run)
    for text in (page.seen, (index.parent / "tables.md").read_text()):
        assert not re.search(r"\b(nan|NaN|None|null|inf)\b", text)
    assert 'data-why="undefined on these 7 questions"' in index.read_text()
    assert 'data-why="too few groups to resample for an interval (3 questions)"' in index.read_text()


def test_the_json_holds_the_tables_and_no_nan(written, score_row) -> None:
    rows = [score_row("patching", "llama", "llama", value=float("nan")), score_row("features", "llama", "llama")]
    index, _ = written(scores=rows, targets={"llama": {"fact recall": float("nan")}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in scores.json")

    held = json.loads((index.parent / "scores.json").read_text(), parse_constant=refuse)
    assert held["scores"][0]["value"] is None and held["scores"][1]["value"] == 0.5
    assert held["targets"]["llama"]["fact recall"] is None
    assert {"sentences", "comparisons", "explainers", "provenance", "run"} <= set(held)


def test_the_sentences_stand_on_the_page(written, report) -> None:
    index, page = written()
    sentences = json.loads((index.parent / "scores.json").read_text())["sentences"]
    assert len(sentences) > 15
    assert all(" ".join(it["text"].split()) in page.seen for it in sentences)


def test_numbers_are_told_with_interval_and_n(written) -> None:
    _, page = written()
    assert ".69 [.65, .73] n 500" in page.seen.replace("\xa0", " ")


def test_at_least_a_dozen_examples_can_be_read_with_their_controls(written) -> None:
    index, page = written()
    cards = re.findall(r'<li class="card" data-task="(\w+)" data-who="(\w+)" data-verdict="(\w+)">', index.read_text())
    assert len(cards) == 24
    assert {card[0] for card in cards} == {"patching", "ablation", "features"}
    assert {card[1:] for card in cards} == {
        ("self", "right"),
        ("self", "wrong"),
        ("cross", "right"),
        ("cross", "wrong"),
    }
    assert "vectors shuffled" in page.seen and "the same answer" in page.seen


def test_examples_of_scored_descriptions_are_labelled_by_their_score(written, score_row) -> None:
    given = {"task": "features", "target": "llama", "explainer": "llama", "question": "q", "truth": "t", "answer": "a"}
    examples = [WorkedExample(**given, right=None, score=score) for score in (0.314, None)]
    index, page = written(scores=[score_row("features", "llama", "llama", "simulated")], examples=examples)
    assert "simulator correlation .31" in page.seen and "simulator correlation –" in page.seen
    assert index.read_text().count('data-verdict="scored"') == 2
    assert 'value="scored"' in index.read_text() and 'value="wrong"' not in index.read_text()


def test_a_page_of_mixed_shares_and_seeds_says_at_which_each_is(written, score_row, comparison_row) -> None:
    known = [("llama", 1.0, 0), ("llama", 0.3, 0), ("llama", 0.3, 1), ("qwen3", 0.3, 1), ("gemma", 0.1, 0)]
    rows = [score_row("patching", "llama", name, fraction=share, seed=seed) for name, share, seed in known]
    gap = comparison_row("self_minus_cross", "patching", "llama", "llama", "qwen3", fraction=0.3)
    models = {name: name for name in ("llama", "qwen3", "gemma")}
    _, page = written(scores=rows, comparisons=[gap], explainers=models, examples=[])
    seen = page.seen.replace("\u202f", " ")
    assert "llama at 30 % of the training data" in seen  # the head of the heat map's column
    assert "gemma, at 10 % of the training data" in seen and "Not every explainer is scored at every share" in seen
    assert "seeds 0, 1" in seen and "seed 1" in seen


def artifacts_of_576_runs() -> list[Manifest]:
    """Four models by four, three seeds, four shares and three mixtures; each run has an explainer and its answers."""
    runs = itertools.product("abcd", "abcd", ("patching", "ablation", "features"), range(3), (0.03, 0.1, 0.3, 1.0))
    train = {f"setting_{i}": {"mode": "replace", "layer": i} for i in range(30)}
    return [
        Manifest(
            kind=kind,
            label=f"{explainer}-of-{target}-{task}-s{seed}-f{share}",
            fingerprint=content_id(kind, explainer, target, task, seed, share),
            config={**train, "seed": seed, "fraction": share},
            parents=(),
            rows=500,
            dropped={"longer than 160 tokens": 4},
            seconds=61.0,
            commit="3f9c2d1" * 5,
            versions={f"library-{i}": "2.13.0" for i in range(10)},
        )
        for explainer, target, task, seed, share in runs
        for kind in ("explainers", f"{task}_answers")
    ]


def test_a_large_experiment_stays_below_three_megabytes(written, score_row) -> None:
    models = [f"model-{i}" for i in range(6)]
    every = itertools.product(("patching", "ablation", "features"), models, models)
    metrics, controls = (
        ("exact_match", "content_match", "changed_f1"),
        ("shuffled", "no_vector", "other_layer", "random"),
    )
    parts = ["all", "changed=true", *[f"layer={i}" for i in range(32)], *[f"stratum=s{i}" for i in range(57)]]
    kinds = [{"by": by, "n": 100 + i} for i, by in enumerate(parts)] + [{"control": control} for control in controls]
    rows = [score_row(*of, metric, **kind) for of in every for metric in metrics for kind in kinds]
    given = {"task": "patching", "target": "model-0", "explainer": "model-0", "truth": "t", "answer": "a"}
    long = [WorkedExample(**given, question="word " * 20_000, right=i % 2 == 0) for i in range(500)]
    index, page = written(
        scores=rows, explainers={model: model for model in models}, examples=long, provenance=artifacts_of_576_runs()
    )
    assert index.stat().st_size < 3_000_000
    assert all(it.fingerprint in page.seen for it in artifacts_of_576_runs())
    assert page.tags.count("dl") >= MOST_EXAMPLES
    assert f"{MOST_EXAMPLES} of the 500 that were given" in page.seen


def test_a_model_is_called_by_its_name_on_both_sides_of_a_comparison(written, score_row, comparison_row) -> None:
    rows = [score_row("patching", "a_1", name) for name in ("a_1", "b_2", "no_skill")]
    compared = [
        comparison_row("self_minus_cross", "patching", "a_1", "a_1", "b_2"),
        comparison_row("over_baseline", "patching", "a_1", "a_1", "no_skill"),
    ]
    index, _ = written(scores=rows, comparisons=compared, explainers={"a_1": "a_1", "b_2": "b_2"}, examples=[])
    for cells in ("<td>a_1</td><td>b_2</td>", "<td>a_1</td><td>no skill</td>"):
        assert cells in index.read_text()


def test_unreadable_answers_of_several_seeds_are_told_with_how_many_there_are(written, score_row) -> None:
    rows = [score_row("patching", "llama", "llama", seed=seed, unparsed=400) for seed in (0, 1)]
    _, page = written(scores=rows, comparisons=[], examples=[])
    assert "800 of 1,000" in page.seen


def test_a_report_of_scores_alone_is_a_page_too(written, score_row) -> None:
    empty = {"comparisons": [], "examples": [], "targets": {}, "provenance": [], "run": {}, "notes": []}
    _, page = written(scores=[score_row("patching", "llama", "majority")], explainers={}, **empty)
    assert "self and others were not compared" in page.seen
    assert "examples" not in page.ids and "run" not in page.ids


def test_a_file_of_an_earlier_report_is_replaced(written) -> None:
    written(title="The former one")
    index, page = written(title="New")
    assert "New" in page.seen and "The former one" not in index.read_text()
