"""Which questions are asked, and what the asking is given."""

from pathlib import Path

import pyarrow as pa
import pytest

from ray_explain import storage
from ray_explain.distributed import answers
from ray_explain.distributed.answers import answer_jobs
from ray_explain.distributed.session import TABLE, Session
from ray_explain.models import files_fingerprint
from tests.distributed.test_sources import plan


def test_explainers_are_held_against_the_weights_of_the_target_that_is_here(world_target: Path, tmp_path: Path) -> None:
    jobs = answer_jobs(plan(world_target, tmp_path, {}))
    known = [job.config["target_weights"] for job in jobs if "folder" in job.config]
    assert known == [files_fingerprint(str(world_target))] and known[0]


def test_examples_come_with_their_vectors_in_the_order_in_which_they_are_shown(
    world_target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = plan(world_target, tmp_path, {"source": "jsonl", "path": ""})
    questions = asked.questions("ablation", "m")
    columns = {"split": ["train", "test", "train", "train"], "group": list("abcd"), "changed": [True] * 4}
    table = pa.table(columns | {"vectors": [[[float(row)]] for row in range(4)]})
    storage.write_table(table, f"{asked.path(questions)}/{TABLE}")
    for shown, rows in (([2, 0], [3, 0]), ([], []), ([1, 2, 0], [2, 3, 0])):
        monkeypatch.setattr(answers, "shown_examples", lambda training, *, shots, seed, shown=shown: shown)
        assert answers._examples(Session(asked), questions, 2, 0).equals(table.take(pa.array(rows, pa.int64())))
