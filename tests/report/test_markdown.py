import re

from ray_explain.report import markdown
from ray_explain.report.estimates import Scores


def tables(data) -> str:
    return markdown.tables(data, Scores(data))


def cells(text: str, first: str) -> list[str]:
    """The cells of the first row that starts with `first`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[2:-1]]


def test_the_table_of_a_target_has_the_numbers_of_the_scores(report, score_row) -> None:
    rows = [
        score_row("patching", "llama", "llama", value=0.617, low=0.581, high=0.662, n=412),
        score_row("patching", "llama", "llama", value=0.348, low=0.3, high=0.4, n=150, by="changed=true"),
        score_row("patching", "llama", "majority", value=0.11, low=None, high=None, n=412),
        *[score_row("patching", "llama", "qwen3", value=0.5, seed=seed, n=412, unparsed=7 + seed) for seed in (0, 1)],
    ]
    rows[0]["unparsed"] = 3
    text = tables(report(scores=rows, comparisons=[]))
    assert cells(text, "llama (self), seed 0") == [".62 \\[.58, .66\\]", ".35 \\[.30, .40\\]", "412", "3"]
    assert cells(text, "majority class") == [".11", "–", "412", "0"]
    assert cells(text, "qwen3, seeds 0, 1")[1:] == ["–", "412", "15 of 824"]


def test_a_control_without_vectors_of_other_seeds_is_told_to_be_of_these(report, score_row) -> None:
    """Its score and the explainer's do not subtract to their difference, which is of the seeds that both have."""
    seeds = [("llama", 0), ("llama", 1), ("text only", 1), ("majority", 0)]
    rows = [score_row("patching", "llama", name, seed=seed) for name, seed in seeds]
    text = tables(report(scores=rows, comparisons=[], examples=[]))
    assert cells(text, "trained without vectors, seed 1") and cells(text, "llama (self), seeds 0, 1")
    assert cells(text, "majority class")
    assert "Explainers do not have the same seeds on activation patching of llama" in text


def test_every_comparison_is_there_with_three_decimals(report, comparison_row) -> None:
    row = comparison_row(
        "self_minus_cross", "patching", "llama", "llama", "qwen3", 0.2134, p_value=0.0123, p_holm=0.0246
    )
    text = tables(report(comparisons=[row]))
    told = ["100%", "+.213", "+.173", "+.253", ".0123", ".0246", "500", "43", "1"]
    assert cells(text, "patching")[3:] == ["self\\_minus\\_cross", "exact match", "all questions", *told]


def test_parts_that_have_no_room_on_the_page_are_here(report, score_row) -> None:
    rows = [score_row("patching", "llama", "llama")]
    rows += [score_row("patching", "llama", "llama", by=f"stratum=s{i}", n=10 + i, value=i / 100) for i in range(40)]
    text = tables(report(scores=rows))
    assert all(cells(text, f"s{i}")[2].startswith(f".{i:02d}") for i in range(40))


def test_text_cannot_break_a_table_or_become_markup(report, score_row) -> None:
    name = "a|b\n<script>alert(1)</script> [x](http://y) `c`"
    text = tables(report(scores=[score_row("patching", name, "llama")], title=name, comparisons=[]))
    assert "<script" not in text.replace("\\<script", "")
    assert "[x](" not in text.replace("\\[x\\](", "")
    rows = [line for line in text.splitlines() if line.startswith("| llama")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [5]  # the name, one metric, n, unreadable


def test_dropped_rows_are_told_with_their_reasons(report) -> None:
    assert "answer is a special token: 38, no source of this relation: 12" in tables(report())


def test_a_score_that_not_all_answers_have_says_how_many(report, score_row) -> None:
    rows = [score_row("features", "llama", "llama", n=40), score_row("features", "llama", "llama", "judged", n=31)]
    row = cells(tables(report(scores=rows, comparisons=[])), "llama (self)")
    assert row[0].endswith("(n 31, 9 unscored)") and "(n" not in row[1] and row[2] == "40"


def test_the_tables_hold_what_did_not_come_to_the_largest_share_and_other_seeds(report, score_row) -> None:
    rows = [score_row("patching", "llama", "llama", fraction=share, seed=seed) for share, seed in ((1.0, 0), (0.3, 0))]
    rows += [score_row("patching", "llama", "llama", fraction=0.3, seed=1)]
    rows += [score_row("patching", "llama", "qwen3", value=0.41, fraction=0.3, seed=1)]
    text = tables(report(scores=rows, comparisons=[])).replace("\u202f", " ")
    assert "### Target llama, at 30 % of the training data" in text
    assert cells(text, "qwen3, seed 1")[0].startswith(".41") and cells(text, "llama (self), seeds 0, 1")


def test_vectors_without_labels_have_a_table_by_origin_with_gold_and_baselines(report, score_row) -> None:
    rows = [score_row("features", "llama", "llama", "exact_match", 0.2, by=by, n=3) for by in ("all", "stratum=sae")]
    for name in ("llama", "gold descriptions"):
        sizes = {"all": 12, "stratum=sae": 3, "stratum=activation": 9} if name == "llama" else {"stratum=sae": 3}
        rows += [score_row("features", "llama", name, "simulated", 0.5, by=by, n=n) for by, n in sizes.items()]
    text = tables(report(scores=rows, comparisons=[]))
    table = text.split("by origin of the vector")[1].split("###")[0]
    assert "Without labels: stratum activation 9." in table
    assert [cell.split(" ", 1)[1][-6:] for cell in cells(table, "llama (self)")] == [" (n 9)", " (n 3)"]
    assert cells(table, "the gold descriptions themselves: the ceiling")[0] == "–"
    assert "(n 3)" in cells(text, "llama (self)")[1] and "unscored" not in text
    assert "by origin" not in tables(report())
