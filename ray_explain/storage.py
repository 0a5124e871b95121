"""Files on local disk or S3 (`s3://bucket/...`): whole files appear at once or not at all."""

import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq

from ray_explain.errors import JobFailed


def is_remote(uri: str) -> bool:
    """Whether `uri` names something that is not on this machine's disk."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """`uri` itself when remote, else the absolute path: workers do not share the driver's working directory."""
    return uri if is_remote(uri) else str(Path(uri.removeprefix("file://")).expanduser().absolute())


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The Arrow filesystem of `uri` and the path in it; S3 endpoint and credentials come from the environment."""
    return fs.FileSystem.from_uri(absolute(uri))


def exists(uri: str) -> bool:
    """Whether a file or a directory is there."""
    system, path = filesystem(uri)
    return system.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files right below `uri` that end in `suffix`, sorted; none where it does not exist."""
    system, path = filesystem(uri)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found if info.type == fs.FileType.File and info.base_name.endswith(suffix))


@contextmanager
def whole_file(uri: str) -> Iterator[Any]:
    """A binary stream to `uri`, which exists only once the block has ended well.

    Raises:
        JobFailed: the disk is full; nothing is left at `uri`.
    """
    system, path = filesystem(uri)
    draft = path if is_remote(uri) else f"{path}.{uuid.uuid4().hex[:8]}.draft"
    try:
        if not is_remote(uri):
            system.create_dir(os.path.dirname(path), recursive=True)
        with system.open_output_stream(draft) as stream:
            yield stream
        if draft != path:
            os.replace(draft, path)
    except BaseException as error:
        if draft != path:
            Path(draft).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise JobFailed(f"no space left on the disk of {uri}: free some, or set another `storage`") from error
        raise


def write_table(table: pa.Table, uri: str, *, row_group_size: int | None = None) -> None:
    """`table` as one Parquet file, there at once or not at all."""
    with whole_file(uri) as stream:
        pq.write_table(table, stream, row_group_size=row_group_size, compression="zstd")


def read_table(uri: str) -> pa.Table:
    """The rows of the Parquet files right below the directory `uri`, files in the order of their names.

    Raises:
        FileNotFoundError: there is none.
    """
    names = list_files(uri, ".parquet")
    if not names:
        raise FileNotFoundError(f"no Parquet file in {uri}")
    system, path = filesystem(uri)
    return pa.concat_tables([pq.read_table(f"{path}/{name}", filesystem=system) for name in names])


def write_json(value: Any, uri: str) -> None:
    """`value` as indented JSON, there at once or not at all."""
    with whole_file(uri) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(uri: str) -> Any:
    """Raises: FileNotFoundError: it is not there; json.JSONDecodeError: it is not JSON."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream:
        return json.loads(stream.readall())


def remove(uri: str) -> None:
    """Remove a directory and all below it; nothing happens where there is none."""
    system, path = filesystem(uri)
    if system.get_file_info(path).type == fs.FileType.Directory:
        system.delete_dir(path)


def remove_file(uri: str) -> None:
    """Raises: FileNotFoundError: it is not there."""
    system, path = filesystem(uri)
    system.delete_file(path)


@contextmanager
def local_folder(uri: str) -> Iterator[str]:
    """A local path with the files of the directory `uri`: itself, or for a remote one a copy for the block."""
    if not is_remote(uri):
        yield absolute(uri)
        return
    with tempfile.TemporaryDirectory() as folder:
        fs.copy_files(uri, folder)
        yield folder


@contextmanager
def new_folder(uri: str) -> Iterator[str]:
    """A local folder to fill; when the block ends well its files stand at `uri`, in place of what was there."""
    if is_remote(uri):
        with tempfile.TemporaryDirectory() as folder:
            yield folder
            fs.copy_files(folder, uri)
        return
    final = absolute(uri)
    draft = f"{final}.{uuid.uuid4().hex[:8]}.draft"
    os.makedirs(draft)
    try:
        yield draft
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
