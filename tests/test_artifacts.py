"""An artifact is there when its manifest is, and is another one when anything that defines it changes."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest
from safetensors import SafetensorError

from ray_explain import storage
from ray_explain.artifacts import MANIFEST, Artifact, finish, finished
from ray_explain.errors import JobFailed

PARENT = Artifact(kind="cases", label="llama", config={"n": 3})
CHILD = Artifact(kind="effects", label="llama", config={"x": [1, 2]}, parents=(PARENT,))


def test_a_fingerprint_follows_from_config_and_parents() -> None:
    same = Artifact(kind="effects", label="other", config={"x": [1, 2]}, parents=(PARENT,))
    assert same.fingerprint == CHILD.fingerprint
    changed_parent = Artifact(kind="cases", label="llama", config={"n": 4})
    for other in (
        Artifact(kind="effects", label="llama", config={"x": [2, 1]}, parents=(PARENT,)),
        Artifact(kind="answers", label="llama", config={"x": [1, 2]}, parents=(PARENT,)),
        Artifact(kind="effects", label="llama", config={"x": [1, 2]}, parents=(changed_parent,)),
        Artifact(kind="effects", label="llama", config={"x": [1, 2]}),
    ):
        assert other.fingerprint != CHILD.fingerprint
        assert other.path("root") != CHILD.path("root")


def test_a_config_without_a_stable_form_is_refused() -> None:
    with pytest.raises(TypeError):
        _ = Artifact(kind="x", label="x", config={"f": object()}).fingerprint


def test_nothing_is_finished_before_its_manifest(tmp_path: Path) -> None:
    root = str(tmp_path)
    storage.write_table(pa.table({"a": [1]}), f"{CHILD.path(root)}/table.parquet")
    assert finished(CHILD, root) is None
    finish(CHILD, root, rows=1, dropped={"too long": 2}, measured={"loss": 0.5})
    manifest = finished(CHILD, root)
    assert manifest is not None
    assert (manifest.rows, manifest.dropped, manifest.parents) == (1, {"too long": 2}, (PARENT.fingerprint,))
    assert manifest.versions["torch"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": "effects"}'])
def test_a_broken_manifest_counts_as_none(tmp_path: Path, content: str) -> None:
    folder = Path(CHILD.path(str(tmp_path)))
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(content)
    assert finished(CHILD, str(tmp_path)) is None


def test_a_manifest_of_something_else_does_not_count(tmp_path: Path) -> None:
    finish(CHILD, str(tmp_path))
    other = Artifact(kind="effects", label="llama", config={}, parents=(PARENT,))
    Path(CHILD.path(str(tmp_path))).rename(other.path(str(tmp_path)))
    assert finished(other, str(tmp_path)) is None


def test_a_full_disk_is_told_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = f"{tmp_path}/t/table.parquet"
    storage.write_table(pa.table({"a": [1]}), table)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.pq, "write_table", full)
    with pytest.raises(JobFailed, match="no space left"):
        storage.write_table(pa.table({"a": [2]}), table)
    monkeypatch.undo()
    assert storage.read_table(f"{tmp_path}/t").to_pylist() == [{"a": 1}]
    assert [path.name for path in Path(table).parent.iterdir()] == ["table.parquet"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    place = f"{tmp_path}/model"
    with storage.new_folder(place) as folder:
        Path(folder, "weights").write_text("old")
    with pytest.raises(RuntimeError), storage.new_folder(place) as folder:
        Path(folder, "weights").write_text("half")
        raise RuntimeError("killed")
    assert Path(place, "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_a_model_fills_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    def fill(place: str) -> None:
        with storage.new_folder(place):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(JobFailed, match=r"no space left on the disk of .*/model: free some, or set another `storage`"):
        fill(f"{tmp_path}/model")
    with pytest.raises(JobFailed, match=r"no space left on the disk of .*, or set TMPDIR"):
        fill("s3://bucket/model")
    assert not list(tmp_path.iterdir())


def test_what_is_written_for_a_bucket_fills_the_disk_of_temporary_files() -> None:
    with pytest.raises(JobFailed, match="or set TMPDIR"), storage.whole_file("s3://bucket/table"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", ".hidden", "s3://b", "a\n", ".."])
def test_no_name_leads_out_of_the_storage_root(name: str) -> None:
    for kind, label in [("kind", name), (name, "label")]:
        with pytest.raises(ValueError, match="cannot be part of an artifact's path"):
            Artifact(kind=kind, label=label, config={})
