"""Training questions come through Ray Data as one process reads them, from disk and from a failing S3."""

import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from ray_explain import records, storage
from ray_explain.distributed import question_stream
from ray_explain.distributed.question_stream import Encoding, Piece, own_cores, pieces_of, read_here, read_through_ray
from ray_explain.explainer.markers import markers_of
from ray_explain.ground_truth.splits import training_rows
from ray_explain.models import load_model
from tests.conftest import ObjectStore
from tests.object_store import BUCKET

FILES = 7


@pytest.fixture(scope="module")
def encoding(world_target: Path) -> Encoding:
    tokenizer = load_model(str(world_target)).tokenizer
    markers = markers_of(tokenizer)
    return Encoding(tokenizer=tokenizer, markers=markers, max_tokens=44, d_target=32, blind=False, with_vectors=True)


@pytest.fixture(scope="module")
def table(questions: tuple[str, str]) -> pa.Table:
    """Questions of both tasks, one after the other."""
    both = pa.concat_tables(storage.read_table(folder).replace_schema_metadata(None) for folder in questions)
    return both.take(np.argsort(np.arange(both.num_rows) % 5, kind="stable"))


def written(table: pa.Table, folder: str) -> str:
    bounds = np.linspace(0, table.num_rows, FILES + 1).astype(int)
    for i, (start, stop) in enumerate(pairwise(bounds)):
        storage.write_table(table.slice(start, stop - start), f"{folder}/part-{i}.parquet", row_group_size=4)
    return folder


def rows_of(tables: Iterable[pa.Table]) -> list[dict[str, Any]]:
    return pa.concat_tables(tables).to_pylist()


def test_the_pieces_are_the_training_rows_in_their_order(table: pa.Table, encoding: Encoding, tmp_path: Path) -> None:
    folder = written(table, str(tmp_path))
    for fraction in (1.0, 0.4):
        wanted = training_rows(table, fraction)
        read = rows_of(read_here(encoding, pieces_of(folder, fraction)))
        assert [row["question_id"] for row in read] == wanted["question_id"].to_pylist()
        kept = [row["refused"] is None for row in read]
        assert 0 < sum(kept) < len(kept), "some are longer than allowed"
        assert {row["refused"] for row in read} == {None, "over-long"}
        for row, own, is_kept in zip(read, records.vectors_of(wanted["vectors"]), kept, strict=True):
            assert not is_kept or np.array_equal(np.array(row["vectors"], np.float32).reshape(-1, 32), own)
            assert not is_kept or row["n_vectors"] == len(own)


@ray.remote(num_cpus=4)
class Everything:
    """A training worker to which all cores of the cluster were given."""

    def read(self, encoding: Encoding, pieces: list[Piece], rows_per_task: int) -> list[dict[str, Any]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LOCAL_WORLD_SIZE", "1")
            patch.setattr(question_stream, "_ROWS_PER_TASK", rows_per_task)
            return rows_of(read_through_ray(encoding, pieces))


@pytest.mark.ray
def test_ray_data_brings_the_same_rows_in_the_same_order_though_no_core_is_free(
    running_ray: None, object_store: ObjectStore, table: pa.Table, encoding: Encoding, tmp_path: Path
) -> None:
    places = [written(table, str(tmp_path)), written(table, f"s3://{BUCKET}/question-stream")]
    here = rows_of(read_here(encoding, pieces_of(places[0], 1.0)))
    reader = Everything.remote()
    object_store.proxy.met.clear()
    object_store.proxy.faults["503"] = 0.3
    try:
        for place in places:
            pieces = pieces_of(place, 1.0)
            assert len(pieces) == FILES
            for rows_per_task in (16, 10**6):
                assert ray.get(reader.read.remote(encoding, pieces, rows_per_task), timeout=120) == here
    finally:
        object_store.proxy.faults.clear()
        ray.kill(reader)
    assert object_store.proxy.met["503"] > 0


@pytest.mark.ray
def test_who_keeps_no_vectors_learns_only_how_many_there_are(
    running_ray: None, table: pa.Table, encoding: Encoding, tmp_path: Path
) -> None:
    pieces = pieces_of(written(table, str(tmp_path)), 1.0)
    reader = Everything.remote()
    full, bare = (
        ray.get(reader.read.remote(replace(encoding, with_vectors=kept), pieces, 16), timeout=120)
        for kept in (True, False)
    )
    ray.kill(reader)
    assert not any(row["vectors"] for row in bare) and any(row["vectors"] for row in full)
    assert bare == [row | {"vectors": []} for row in full]


def test_workers_of_a_machine_share_its_cores_and_have_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for workers, expected in ((1, 16), (3, 5), (32, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(workers))
        assert own_cores() == expected
