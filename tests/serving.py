"""Servers that live as long as a test."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import TypeVar

T = TypeVar("T", bound=ThreadingHTTPServer)


@contextmanager
def serving(server: T) -> Iterator[T]:
    """Let `server` answer in a thread of its own until the block ends."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
