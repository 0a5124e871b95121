"""Tensors of safetensors, npz and PyTorch files: shapes, memory-mapped tensors, and rows read a few at a time.

Nothing is unpickled beyond tensors and plain containers. A memory map counts as resident memory once read, so `rows`
reads what it is asked for from the file, or closes the map after each part.
"""

import json
import math
import pickle
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FETCH_AGAIN = "fetch the file again"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightsFile(ABC):
    """A file of named tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def names(self) -> set[str]:
        """Those of its tensors."""

    @abstractmethod
    def mapped(self, name: str) -> Tensor:
        """The tensor, memory-mapped where the file allows it."""

    def rows(self, name: str, start: int, stop: int, axis: int) -> Tensor:
        """A copy of the part `start:stop` of the axis, resident memory: that part only."""
        return self.mapped(name).narrow(axis, start, stop - start).clone()


def open_weights(path: str | Path) -> WeightsFile:
    """The reader for a file, chosen by its suffix.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another suffix, or the file is truncated or holds pickled objects.
    """
    path = Path(path)
    kinds: dict[str, type[WeightsFile]] = {".safetensors": _Safetensors, ".npz": _Npz, ".pt": _Torch, ".pth": _Torch}
    if path.suffix not in kinds:
        raise ValueError(f"{path}: weights are read from files that end in one of {sorted(kinds)}")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    file = kinds[path.suffix](path)
    file.names()  # opens it, so that a damaged file is found here
    return file


class _Safetensors(WeightsFile):
    def names(self) -> set[str]:
        with self._open() as file:
            return set(file.keys())

    def mapped(self, name: str) -> Tensor:
        with self._open() as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int, axis: int) -> Tensor:
        with open(self.path, "rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            entry = json.loads(file.read(header_bytes))[name]
            dtype, (n_rows, n_columns) = _DTYPES[entry["dtype"]], entry["shape"]
            begin = 8 + header_bytes + entry["data_offsets"][0]
            if axis == 0:
                return _read(file, begin + start * n_columns * dtype.itemsize, dtype, (stop - start, n_columns))
            part = torch.empty(n_rows, stop - start, dtype=dtype)
            for row in range(n_rows):
                offset = begin + (row * n_columns + start) * dtype.itemsize
                part[row] = _read(file, offset, dtype, (stop - start,))
            return part

    @contextmanager
    def _open(self) -> Iterator[safe_open]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise ValueError(f"{self.path} is truncated or damaged ({error}): {FETCH_AGAIN}") from error


def _read(file: BufferedReader, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    buffer = bytearray(math.prod(shape) * dtype.itemsize)
    file.seek(offset)
    file.readinto(buffer)
    return torch.frombuffer(buffer, dtype=dtype).view(shape)


class _Npz(WeightsFile):
    """Arrays of an uncompressed npz are mapped in place; those of a compressed one are read in full."""

    def names(self) -> set[str]:
        with self._open() as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}

    def mapped(self, name: str) -> Tensor:
        with self._open() as archive:
            entry = archive.getinfo(name + ".npy")
            array = self._in_place(entry) if entry.compress_type == zipfile.ZIP_STORED else self._unpacked(name)
        return torch.from_numpy(array)

    def _unpacked(self, name: str) -> np.ndarray:
        with np.load(self.path, allow_pickle=False) as arrays:
            return arrays[name]

    def _in_place(self, entry: zipfile.ZipInfo) -> np.ndarray:
        with open(self.path, "rb") as file:
            file.seek(entry.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            file.seek(entry.header_offset + 30 + name_bytes + extra_bytes)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise ValueError(f"{self.path}: {entry.filename} holds pickled objects, which are not read")
            order: Literal["F", "C"] = "F" if fortran else "C"
            # Copy on write: torch refuses read-only arrays, and the file stays as it is.
            return np.memmap(self.path, dtype=dtype, mode="c", offset=file.tell(), shape=shape, order=order)

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.path} is truncated or damaged ({error}): {FETCH_AGAIN}") from error


class _Torch(WeightsFile):
    def names(self) -> set[str]:
        return set(self._load())

    def mapped(self, name: str) -> Tensor:
        return self._load()[name].detach()

    def _load(self) -> dict[str, Tensor]:
        mmap = zipfile.is_zipfile(self.path)  # the format of PyTorch before 1.6 cannot be mapped
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{self.path} holds more than tensors, and is not unpickled: {error}") from error
        except (RuntimeError, EOFError) as error:
            raise ValueError(f"{self.path} is truncated or damaged ({error}): {FETCH_AGAIN}") from error
        if not isinstance(state, dict):
            raise ValueError(f"{self.path} holds a {type(state).__name__}; an SAE's file holds a dict of tensors")
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
