"""Files on local disk or S3 (`s3://bucket/...`): whole files appear at once or not at all."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as fs
import pyarrow.parquet as pq
from jaxtyping import Int
from safetensors import SafetensorError

from ray_explain.errors import BadInput, JobFailed

_S3_ATTEMPTS = 12  # of each request; the pauses double from 25 ms, so a server may be gone for a minute and a half
_PATIENCE = 5.0  # seconds that a server may take to answer a knock
_PAUSES = (0.1, 0.5, 2.0, 5.0)  # seconds before an operation is tried again
_PIECE = 16 * 2**20  # bytes of a file that are asked for in one request
_PIECES_AT_ONCE = 8
_P, _T = ParamSpec("_P"), TypeVar("_T")


def patient(operation: Callable[_P, _T]) -> Callable[_P, _T]:
    """The same, tried again where S3 fails in a way that its client gives up on: an error's text that is longer than
    the bytes that were to be read breaks its buffer; a multipart upload whose last answer got lost cannot be ended a
    second time. An operation must do no harm when done twice. Errors of the local disk are passed on at once.
    """

    @wraps(operation)
    def again(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        for pause in _PAUSES:
            try:
                return operation(*args, **kwargs)
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno is not None or any(word in str(error) for word in ("ACCESS_DENIED", "NO_SUCH_BUCKET")):
                    raise
                time.sleep(pause)
        return operation(*args, **kwargs)

    return again


def check_endpoint() -> None:
    """Whether somebody answers at the S3 endpoint that the environment names, where it names one.

    Said before the first request: those are patient, and tried again for minutes.

    Raises:
        BadInput: nobody does.
    """
    if not _endpoint():
        return
    way_out = "start the server there, or correct AWS_ENDPOINT_URL (http://host:port; unset, it is Amazon's)"
    parts = urlsplit(_endpoint())
    try:
        address = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    except ValueError:
        address = "", 0
    if not address[0]:
        raise BadInput(f"AWS_ENDPOINT_URL is no address of a server: {way_out}")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return socket.create_connection(address, timeout=_PATIENCE).close()
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise BadInput(
                    f"no S3 server answers at {address[0]}:{address[1]}, where `storage` is ({reason}): {way_out}"
                ) from error
            time.sleep(1)


def _endpoint() -> str:
    """URL of the S3 server; empty for Amazon's."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def is_remote(uri: str) -> bool:
    """Whether `uri` names something that is not on this machine's disk."""
    return "://" in uri and not uri.startswith("file://")


def absolute(uri: str) -> str:
    """`uri` itself when remote, else the absolute path: workers do not share the driver's working directory."""
    return uri if is_remote(uri) else str(Path(uri.removeprefix("file://")).expanduser().absolute())


def same_everywhere(place: str) -> str:
    """A folder of this machine by its absolute path, since Ray Train and Tune move their workers to another directory;
    the hub id of a model and what is remote as they are."""
    return absolute(place) if Path(place).is_dir() else place


class _PatientS3(fs.S3FileSystem):
    """Arrow's S3 with more retries. Pickled, it is only the bucket's name: each process looks into its own environment
    for endpoint and credentials (Arrow's own pickle forgets retries and region)."""

    def __init__(self, bucket: str) -> None:
        self.bucket = bucket
        endpoint = _endpoint()
        parts = urlsplit(endpoint)
        super().__init__(
            endpoint_override=parts.netloc or None,
            scheme=parts.scheme or "https",
            region=None if endpoint else fs.resolve_s3_region(bucket),
            retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=_S3_ATTEMPTS),
            allow_delayed_open=True,  # small files go up in one request instead of three
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _s3, (self.bucket,)


@cache
def _s3(bucket: str) -> _PatientS3:
    return _PatientS3(bucket)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """The Arrow filesystem of `uri` and the path in it; S3 endpoint and credentials come from the environment."""
    if uri.startswith("s3://"):
        path = uri.removeprefix("s3://").rstrip("/")
        return _s3(path.partition("/")[0]), path
    return fs.FileSystem.from_uri(absolute(uri))


@patient
def exists(uri: str) -> bool:
    """Whether a file or a directory is there."""
    system, path = filesystem(uri)
    return system.get_file_info(path).type != fs.FileType.NotFound


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Names (not paths) of the files right below `uri` that end in `suffix`, sorted; none where it does not exist."""
    return [info.base_name for info in _files(uri) if info.base_name.endswith(suffix)]


@patient
def _files(uri: str) -> list[fs.FileInfo]:
    """Of the files right below `uri`, by name; none where it does not exist."""
    system, path = filesystem(uri)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted((info for info in found if info.type == fs.FileType.File), key=lambda info: info.base_name)


@contextmanager
def whole_file(uri: str) -> Iterator[Any]:
    """A binary stream to `uri`, which exists only once the block has ended well.

    Raises:
        JobFailed: the disk is full; nothing is left at `uri`.
    """
    remote = is_remote(uri)
    made = _whole_remote_file(uri) if remote else _whole_local_file(uri)
    with told_if_full(tempfile.gettempdir() if remote else uri, is_scratch=remote), made as stream:
        yield stream


@contextmanager
def told_if_full(place: str, *, is_scratch: bool) -> Iterator[None]:
    """`place` is a temporary one if `is_scratch`, else below the storage.

    Raises:
        JobFailed: its disk is full, or the user's share of it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # of which safetensors' and those of whole trees have no number
        full = (errno.ENOSPC, errno.EDQUOT)
        if getattr(error, "errno", None) not in full and not any(os.strerror(one) in str(error) for one in full):
            raise
        other = "TMPDIR to a folder of a larger one" if is_scratch else "another `storage`"
        raise JobFailed(f"no space left on the disk of {place}: free some, or set {other}") from error


@contextmanager
def _whole_local_file(uri: str) -> Iterator[Any]:
    system, path = filesystem(uri)
    draft = f"{path}.{uuid.uuid4().hex[:8]}.draft"
    try:
        system.create_dir(os.path.dirname(path), recursive=True)
        with system.open_output_stream(draft) as stream:
            yield stream
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


@contextmanager
def _whole_remote_file(uri: str) -> Iterator[Any]:
    """Written to disk and then uploaded: closing a stream to S3, even after an error, would leave half a file there."""
    with tempfile.NamedTemporaryFile() as draft:
        yield draft
        draft.flush()
        _upload(draft.name, uri)


@patient
def _upload(file: str, uri: str) -> None:
    system, path = filesystem(uri)
    # From several threads, uploads can deadlock (https://github.com/apache/arrow/issues/32372).
    fs.copy_files(file, path, destination_filesystem=system, use_threads=False)


def upload_folder(folder: str, uri: str) -> None:
    """The files right below a local folder, each as a whole, below `uri` on S3; those that are there are replaced."""
    for file in sorted(os.listdir(folder)):
        _upload(f"{folder}/{file}", f"{uri}/{file}")


def _download(uri: str, file: str) -> None:
    """In large pieces, several at a time. Arrow's own copy asks for one MiB after the other: 16,000 requests for an 8B
    model, so that its GPU would wait for ten minutes where each takes a thirtieth of a second.

    Raises:
        JobFailed: the disk is full.
    """
    with (
        told_if_full(file, is_scratch=True),
        open(file, "wb") as into,
        _opened(uri) as source,
        ThreadPoolExecutor(_PIECES_AT_ONCE) as threads,
    ):
        list(threads.map(lambda start: _fetch(source, into.fileno(), start), range(0, source.size(), _PIECE)))


@patient
def _opened(uri: str) -> Any:
    system, path = filesystem(uri)
    return system.open_input_file(path)


@patient
def _fetch(source: Any, into: int, start: int) -> None:
    """The piece of a file on S3 that begins at `start`, written to the same place of the open file `into`."""
    piece = memoryview(source.read_at(_PIECE, start))
    if len(piece) != min(_PIECE, source.size() - start):
        raise OSError("the connection was cut")
    while piece:
        written = os.pwrite(into, piece, start)
        piece, start = piece[written:], start + written


def write_table(table: pa.Table, uri: str, *, row_group_size: int | None = None) -> None:
    """`table` as one Parquet file, there at once or not at all."""
    with whole_file(uri) as stream:
        pq.write_table(table, stream, row_group_size=row_group_size, compression="zstd")


@contextmanager
def table_writer(uri: str, *, row_group_size: int | None = None) -> Iterator[Callable[[pa.Table], None]]:
    """What writes one table after another, all of the first one's schema, into one Parquet file.

    The file is there, whole, when the block ends well; at least one table has to be written.
    """
    with whole_file(uri) as stream, ExitStack() as stack:
        writer: list[pq.ParquetWriter] = []

        def write(table: pa.Table) -> None:
            if not writer:
                schema = table.schema.remove_metadata()
                writer.append(stack.enter_context(pq.ParquetWriter(stream, schema, compression="zstd")))
            writer[0].write_table(table.replace_schema_metadata(None), row_group_size=row_group_size)

        yield write


@patient
def read_table(uri: str, columns: list[str] | None = None) -> pa.Table:
    """The rows of the Parquet files right below the directory `uri`, files in the order of their names; all columns
    unless some are named.

    Raises:
        FileNotFoundError: there is none.
    """
    return pa.concat_tables(read_tables(uri, columns))


def read_tables(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """As `read_table`, file by file."""
    names = list_files(uri, ".parquet")
    if not names:
        raise FileNotFoundError(f"no Parquet file in {uri}")
    system, path = filesystem(uri)
    for name in names:
        yield pq.read_table(f"{path}/{name}", filesystem=system, columns=columns)


@patient
def read_schema(uri: str) -> pa.Schema:
    """Of the first Parquet file right below the directory `uri`.

    Raises:
        FileNotFoundError: there is none.
    """
    names = list_files(uri, ".parquet")
    if not names:
        raise FileNotFoundError(f"no Parquet file in {uri}")
    system, path = filesystem(uri)
    return pq.read_schema(f"{path}/{names[0]}", filesystem=system)


def read_batches(uri: str, rows: int = 1024) -> Iterator[pa.Table]:
    """As `read_table`, at most `rows` rows at once, of which no more lie in memory than these and what they are
    compressed in. A remote file is first copied to this machine's disk.

    Raises:
        FileNotFoundError: there is none.
    """
    names = list_files(uri, ".parquet")
    if not names:
        raise FileNotFoundError(f"no Parquet file in {uri}")
    for name in names:
        yield from file_batches(f"{uri}/{name}", rows)


def file_batches(uri: str, rows: int = 1024) -> Iterator[pa.Table]:
    """As `read_batches`, of one file."""
    with _local_file(uri) as file, pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as parquet:
        for batch in parquet.iter_batches(rows):
            yield pa.Table.from_batches([batch])


def read_rows(uri: str, rows: Int[np.ndarray, " n"]) -> Iterator[pa.Table]:
    """The rows with these numbers (ascending) of a table, at least one part of any number of rows; no more lie in
    memory at once than with `read_batches`.
    """
    first = 0
    for table in read_batches(uri):
        start, stop = np.searchsorted(rows, [first, first + table.num_rows])
        yield table.take(pa.array(rows[start:stop] - first))
        if stop == len(rows):
            return
        first += table.num_rows


@contextmanager
def mapped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """All of them, at least one, as one table on this machine's disk: the system keeps in memory what fits."""
    with tempfile.TemporaryDirectory() as folder:
        writer = None
        for table in tables:
            writer = writer or pa.ipc.new_file(f"{folder}/table", table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
        with pa.memory_map(f"{folder}/table") as file:
            yield pa.ipc.open_file(file).read_all()


@contextmanager
def _local_file(uri: str) -> Iterator[str]:
    if not is_remote(uri):
        yield filesystem(uri)[1]
        return
    with tempfile.TemporaryDirectory() as folder:
        _download(uri, f"{folder}/file")
        yield f"{folder}/file"


def write_json(value: Any, uri: str) -> None:
    """`value` as indented JSON, there at once or not at all."""
    with whole_file(uri) as stream:
        stream.write((json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


@patient
def read_json(uri: str) -> Any:
    """Raises: FileNotFoundError: it is not there; json.JSONDecodeError: it is not JSON."""
    system, path = filesystem(uri)
    with system.open_input_stream(path) as stream:
        return json.loads(stream.readall())


@patient
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
def local_folder(uri: str, *, weights: bool = True) -> Iterator[str]:
    """A local path with the files of the directory `uri`: a copy for the block where it is remote, without the
    `*.safetensors` unless `weights` are wanted. It is to be read alone: others of this machine may read it too.

    What is not remote (a path, the hub id of a model) is given back as it is.

    Raises:
        JobFailed: the disk is full.
    """
    if not is_remote(uri):
        yield uri.removeprefix("file://")
        return
    with _copy(uri, [info for info in _files(uri) if weights or not info.base_name.endswith(".safetensors")]) as folder:
        yield folder


@contextmanager
def _copy(uri: str, files: Sequence[fs.FileInfo]) -> Iterator[str]:
    """A local folder with these files of the directory `uri`. Processes of this machine that want the same ones at a
    time share it, and the last of them removes it: eight workers have a model on their disk once, not eight times. One
    that is killed leaves it to whoever wants it next.
    """
    what = [uri, _endpoint(), *((info.base_name, info.size, info.mtime_ns) for info in files)]
    folder = own_scratch() / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    with open(f"{folder}.lock", "w") as lock:  # stays: who removed it would part those who wait for it
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if folder.is_dir():
                break
            fcntl.flock(lock, fcntl.LOCK_EX)  # gives up the other lock, so another process may have been faster
            if not folder.is_dir():
                _fill(folder, uri, files)
        try:
            yield str(folder)
        finally:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def _fill(folder: Path, uri: str, files: Sequence[fs.FileInfo]) -> None:
    """Copy the files; the folder is there once it has all of them."""
    draft = Path(f"{folder}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    draft.mkdir()
    try:
        for info in files:
            _download(f"{uri}/{info.base_name}", str(draft / info.base_name))
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def own_scratch() -> Path:
    """A folder for temporary files that processes of this user share, and nobody else reaches.

    Raises:
        JobFailed: it is another's.
    """
    folder = Path(tempfile.gettempdir()) / f"ray_explain-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.lstat().st_uid != os.getuid():  # of a link itself: others can make one that leads to what is ours
        raise JobFailed(f"{folder} belongs to another user: remove it, or set TMPDIR to another folder")
    return folder


@contextmanager
def new_folder(uri: str) -> Iterator[str]:
    """A local folder to fill with files; when the block ends well they stand at `uri`, in place of what was there.

    Raises:
        JobFailed: the disk is full.
    """
    if is_remote(uri):
        with tempfile.TemporaryDirectory() as folder:
            with told_if_full(folder, is_scratch=True):
                yield folder
            remove(uri)
            upload_folder(folder, uri)
        return
    final = absolute(uri)
    draft = f"{final}.{uuid.uuid4().hex[:8]}.draft"
    os.makedirs(draft)
    try:
        with told_if_full(uri, is_scratch=False):
            yield draft
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
