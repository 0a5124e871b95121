"""Files of a public bucket, read over https without any credentials."""

import gzip
import http.client
import io
import urllib.error
import urllib.parse
import urllib.request
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from contextlib import contextmanager

from ray_explain import storage
from ray_explain.errors import BadInput

TIMEOUT = 60.0  # seconds without a byte
_LIST = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def is_web(place: str) -> bool:
    """Whether `place` is a web address."""
    return place.startswith(("https://", "http://"))


def files_below(address: str) -> list[str]:
    """The addresses of all files below a folder of a bucket, in the order of their names.

    Raises:
        BadInput: it cannot be read, or nothing answers there as a bucket does.
    """
    parts = urllib.parse.urlsplit(address)
    bucket, prefix = f"{parts.scheme}://{parts.netloc}/", parts.path.strip("/") + "/"
    found: list[str] = []
    query = {"list-type": "2", "prefix": prefix}
    while True:
        try:
            page = xml.fromstring(_read(f"{bucket}?{urllib.parse.urlencode(query)}"))
        except xml.ParseError as error:
            raise BadInput(f"{bucket} lists no files, as a public bucket would: {error}") from error
        found += [key.text or "" for key in page.iter(f"{_LIST}Key")]
        more = page.findtext(f"{_LIST}NextContinuationToken")
        if more is None:
            return [bucket + urllib.parse.quote(key) for key in sorted(found)]
        query["continuation-token"] = more


@contextmanager
def opened(address: str) -> Iterator[io.BufferedIOBase]:
    """A file, unpacked where its name ends in .gz.

    Raises:
        BadInput: it is not there, or cannot be read.
    """
    content = io.BytesIO(_read(address))
    yield gzip.GzipFile(fileobj=content) if address.endswith(".gz") else content


def _read(address: str) -> bytes:
    try:
        return _again(address)
    except (OSError, _NotThere) as error:
        raise BadInput(f"{address} cannot be read: {error}") from error


class _NotThere(Exception):
    """Asking again would not help."""


@storage.patient
def _again(address: str) -> bytes:
    """The whole file at once, so that a connection that breaks costs no more than asking for it again."""
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code != 429:
            raise _NotThere(f"{error.code} {error.reason}") from error
        raise OSError(f"{error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise OSError(str(error)) from error
