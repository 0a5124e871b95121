"""Files on S3 appear whole or not at all, also on a server that fails now and then."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_explain import storage
from ray_explain.errors import JobFailed
from tests.conftest import ObjectStore
from tests.object_store import BUCKET


@pytest.fixture
def root(
    object_store: ObjectStore, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder on S3 of the test's own, and one for temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it remembers where it was last
    yield f"s3://{BUCKET}/{request.node.name}"
    object_store.proxy.faults.clear()


@pytest.mark.parametrize("fault", ["503", "dropped before", "dropped after", "cut"])
def test_failing_requests_cost_retries_and_no_data(object_store: ObjectStore, root: str, fault: str) -> None:
    object_store.proxy.met.clear()
    object_store.proxy.faults[fault] = 0.3
    for i in range(12):
        storage.write_table(pa.table({"i": [i]}), f"{root}/table/part-{i:02}.parquet")
        storage.write_json(i, f"{root}/json/{i}")
    assert storage.read_table(f"{root}/table").column("i").to_pylist() == list(range(12))
    assert [storage.read_json(f"{root}/json/{i}") for i in range(12)] == list(range(12))
    storage.remove(f"{root}/json")
    assert not storage.exists(f"{root}/json") and len(storage.list_files(f"{root}/table")) == 12
    assert object_store.proxy.met[fault] >= 5


def test_a_file_of_many_requests_survives_them_as_well(object_store: ObjectStore, root: str) -> None:
    content = os.urandom(17 * 2**20)
    object_store.proxy.faults.update({"503": 0.1, "dropped before": 0.1, "dropped after": 0.1, "cut": 0.1})
    with storage.new_folder(f"{root}/model") as folder:
        Path(folder, "weights").write_bytes(content)
    with storage.local_folder(f"{root}/model") as folder:
        assert Path(folder, "weights").read_bytes() == content


def test_a_large_file_comes_in_few_requests_and_whole(object_store: ObjectStore, root: str) -> None:
    content = os.urandom(17 * 2**20)
    with storage.new_folder(f"{root}/model") as folder:
        Path(folder, "weights").write_bytes(content)
    object_store.proxy.met.clear()
    with storage.local_folder(f"{root}/model") as folder:
        assert Path(folder, "weights").read_bytes() == content
    assert object_store.proxy.met.total() < 8


def test_processes_of_a_machine_share_one_copy_that_the_last_one_removes(object_store: ObjectStore, root: str) -> None:
    with storage.new_folder(f"{root}/model") as folder:
        Path(folder, "weights").write_bytes(b"first")
    read = f"from ray_explain import storage\nwith storage.local_folder({root + '/model'!r}) as folder: print(folder)"
    with storage.local_folder(f"{root}/model") as ours:
        theirs = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, check=True).stdout.strip()
        assert theirs == ours and Path(ours, "weights").read_bytes() == b"first"
    assert not Path(ours).exists()


def test_what_a_killed_process_left_is_used_if_whole_and_of_the_same_files(
    object_store: ObjectStore, root: str
) -> None:
    def write(content: bytes) -> None:
        with storage.new_folder(f"{root}/model") as folder:
            Path(folder, "weights").write_bytes(content)

    write(b"first")
    with storage.local_folder(f"{root}/model") as first:
        pass
    Path(f"{first}.draft").mkdir()
    Path(f"{first}.draft", "weights").write_bytes(b"fir")
    with storage.local_folder(f"{root}/model") as folder:
        assert Path(folder, "weights").read_bytes() == b"first" and not Path(f"{first}.draft").exists()
    Path(first).mkdir()
    Path(first, "weights").write_bytes(b"found")
    with storage.local_folder(f"{root}/model") as folder:
        assert Path(folder, "weights").read_bytes() == b"found"
    Path(first).mkdir()
    write(b"second")
    with storage.local_folder(f"{root}/model") as folder:
        assert Path(folder, "weights").read_bytes() == b"second"


def test_a_file_whose_writing_fails_is_not_there(root: str) -> None:
    with pytest.raises(RuntimeError), storage.whole_file(f"{root}/half") as stream:
        stream.write(b"half of it")
        raise RuntimeError("killed")
    assert not storage.exists(f"{root}/half")


def test_what_is_missing_is_said_at_once(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_json(f"{root}/nothing")
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        storage.read_table(f"{root}/nothing")
    assert storage.list_files(f"{root}/nothing") == []


def test_batches_hold_the_rows_of_all_files_in_order_and_few_at_once(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 5)):
        storage.write_table(pa.table({"x": range(first, first + 5), "y": ["-"] * 5}), f"{tmp_path}/{name}.parquet")
    batches = list(storage.read_batches(str(tmp_path), rows=2))
    assert [batch.num_rows for batch in batches] == [2, 2, 1, 2, 2, 1]
    assert pa.concat_tables(batches).equals(storage.read_table(str(tmp_path)))
    assert storage.read_table(str(tmp_path), ["x"]).column_names == ["x"]
    assert storage.read_schema(str(tmp_path)).names == ["x", "y"]
    with pytest.raises(FileNotFoundError, match="no Parquet file"):
        list(storage.read_batches(f"{tmp_path}/nothing"))


@pytest.mark.parametrize("rows", [[0, 3, 5, 1024, 2999], [], [2999], list(range(3000))])
def test_rows_are_read_by_their_numbers_across_files_and_batches(rows: list[int], tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 1500)):
        storage.write_table(pa.table({"x": range(first, first + 1500)}), f"{tmp_path}/{name}.parquet")
    parts = list(storage.read_rows(str(tmp_path), np.array(rows, np.int64)))
    assert pa.concat_tables(parts)["x"].to_pylist() == rows
    assert len(parts) == (1 if not rows else 4), "what comes after the last one is not read"


def test_a_mapped_table_has_all_rows_and_takes_no_memory(tmp_path: Path) -> None:
    tables = [pa.table({"x": np.full(10**6, i)}) for i in range(2)]
    before = pa.total_allocated_bytes()
    with storage.mapped(iter(tables)) as table:
        assert table.equals(pa.concat_tables(tables))
        assert pa.total_allocated_bytes() - before < 10**6


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a link to somebody else")
def test_a_link_of_somebody_else_is_no_scratch_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may lead to a folder of ours, in which files would then be removed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    link, ours = tmp_path / f"ray_explain-{os.getuid()}", tmp_path / "ours"
    ours.mkdir()
    link.symlink_to(ours)
    os.lchown(link, os.getuid() + 1, -1)
    with pytest.raises(JobFailed, match="belongs to another user"):
        storage.own_scratch()
