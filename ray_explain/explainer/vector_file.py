"""Vectors of examples in a file on disk: there may be more of them than memory."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float


class VectorFile:
    """Rows of float32, written one after the other and then mapped into memory.

    They are read when a batch needs them; the system keeps what it has room for, once for all processes of a machine.

    Args:
        d_target: Width of a vector.
        keep: Whether rows are written here; where another process does, they are only counted.
    """

    def __init__(self, d_target: int, *, keep: bool = True) -> None:
        self._d_target, self._n = d_target, 0
        self._file: Any = None
        self.path: str | None = None
        if keep:
            self._file = tempfile.NamedTemporaryFile(prefix="ray_explain-vectors-")  # noqa: SIM115 - `remove` closes it
            self.path = self._file.name

    def add(self, vectors: Float[np.ndarray, "n d_target"], n: int) -> slice:
        """Where in `rows` these `n` are found; where none are written here, `vectors` is not looked at."""
        if self._file is not None:
            assert len(vectors) == n
            self._file.write(np.ascontiguousarray(vectors, dtype=np.float32))
        self._n += n
        return slice(self._n - n, self._n)

    def flush(self) -> None:
        """Others can map what was added."""
        if self._file is not None:
            self._file.flush()

    def rows(self, path: str | None = None) -> Float[np.ndarray, "n d_target"]:
        """All that were added, from the file at `path` where it is another process's; read-only. What is mapped stays
        when the file is removed."""
        if not self._n:
            return np.zeros((0, self._d_target), np.float32)
        path = path or self.path
        assert path is not None and Path(path).stat().st_size == 4 * self._n * self._d_target
        return np.asarray(np.memmap(path, np.float32, "r", shape=(self._n, self._d_target)))

    def remove(self) -> None:
        """The name, at once; the rows with the last process that maps them."""
        if self._file is not None:
            self._file.close()
