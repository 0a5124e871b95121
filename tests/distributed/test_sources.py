"""What is read from files as ground truth, and when that is too little."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from ray_explain.artifacts import finished
from ray_explain.distributed.ground_truth import make_ground_truth
from ray_explain.distributed.plan import Plan
from ray_explain.distributed.session import Session
from ray_explain.distributed.sources import cases_of, checked
from ray_explain.errors import JobFailed
from ray_explain.ground_truth import jsonl, released
from ray_explain.ground_truth.cases import BY_DESIGN
from ray_explain.stages import READ, Result
from tests.distributed.planning import planned
from tests.ground_truth.test_released import ITEMS, released_hint

LINE = {"prompt": "anna lives in paris", "span": [0, 4]}


def plan(target: Path, folder: Path, section: dict[str, Any], *, task: str = "ablation", **cluster: Any) -> Plan:
    truth = {task: {"cases": {"train": 5, "test": 5}, **section}}
    return planned(target, folder, ground_truth=truth, cluster=cluster)


def made_of(lines: list[str], target: Path, folder: Path, **cluster: Any) -> tuple[int, dict[str, int]]:
    """Rows and dropped of the cases made of a file of these lines."""
    path = folder / "cases.jsonl"
    path.write_text("\n".join(lines))
    asked = plan(target, folder, {"source": "jsonl", "path": str(path)}, **cluster)
    cases = asked.cases("ablation", "m")
    with Session(asked) as session:
        session.make_table(cases, lambda: cases_of(asked, "ablation", "m"))
    manifest = finished(cases, asked.root)
    assert manifest is not None and manifest.measured == {READ: len(lines)}
    return manifest.rows, manifest.dropped


def good_lines(n: int) -> list[str]:
    return [json.dumps(LINE | {"prompt": f"anna {i}", "split": ("train", "test")[i % 2]}) for i in range(n)]


def test_a_file_of_which_too_many_lines_cannot_be_used_fails_the_job_with_the_first_shown(
    world_target: Path, tmp_path: Path
) -> None:
    lines = [*good_lines(4), *["broken"] * 96]
    with pytest.raises(JobFailed, match=r"96 of 100 were dropped, more than `cluster.max_dropped` = 0.05.*line 5: not"):
        made_of(lines, world_target, tmp_path)
    assert made_of(lines, world_target, tmp_path, max_dropped=0.96) == (4, {jsonl.NOT_JSON: 96})


def test_the_share_is_one_of_all_lines_not_of_those_that_are_wanted(world_target: Path, tmp_path: Path) -> None:
    lines = [*good_lines(195), *["broken"] * 5]
    assert made_of(lines, world_target, tmp_path) == (10, {jsonl.NOT_JSON: 5})


def test_what_is_left_out_by_design_counts_in_no_share(world_target: Path, tmp_path: Path) -> None:
    lines = good_lines(4) * 10
    assert made_of(lines, world_target, tmp_path) == (4, {jsonl.REPEATED: 36})


def test_reading_stops_with_the_part_that_makes_it_too_much() -> None:
    empty, seen = pa.table({"case_id": pa.array([], pa.string())}), []
    by_design, fault = ("a", min(BY_DESIGN)), ("b", "broken")

    def parts():
        for dropped in ([by_design] * 50, [fault] * 2, [fault] * 2, [fault] * 2):
            seen.append(len(dropped))
            yield Result(empty, dropped, {READ: 100})

    with pytest.raises(JobFailed, match=r"rows: 4 of 100 were dropped.*b: broken"):
        list(checked(parts(), "rows", 0.03))
    assert seen == [50, 2, 2]


def test_a_released_data_set_of_which_too_much_cannot_be_read_fails_the_job(world_target: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world_target)
    rows = [released_hint(tokenizer, item, "B") for item in ITEMS]
    rows[1]["original_prompt_full"] = "something else"
    for split in ("train", "test"):
        pq.write_table(pa.Table.from_pylist(rows, schema=released.ABLATION), tmp_path / f"{split}.parquet")
    section = {"source": "released", "path": str(tmp_path), "cases": {"train": 4, "test": 4}}
    with (
        Session(plan(world_target, tmp_path, section)) as session,
        pytest.raises(JobFailed, match=r"`ground_truth.ablation`: rows in .*1 of 8 were dropped.*train row 1"),
    ):
        make_ground_truth(session)
