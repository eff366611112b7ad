"""A PyTorch file (`.bin`, `.pt`, `.ckpt`): what it holds, its tensors as views of the mapped file.

Since PyTorch 1.6 it is a zip of a pickle and records of numbers, before that several pickles and
then the numbers. Neither is unpickled (see `pickled`), and every view is checked against the
length of what it lies in: a file that was made to do harm is an error like a damaged one.
"""

from __future__ import annotations

import mmap
import pickle
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .errors import WeightsError
from .pickled import MOST_BYTES, Machine, Stored, Stream, TooMuch

FETCH_AGAIN = "the file is incomplete or damaged: fetch it again"
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000) if sys.platform == "linux" else 0
ZIP = b"PK\x03\x04"
LITTLE = sys.byteorder == "little"
LOCAL_HEADER = 30  # bytes before a record's name, of which the last four are two lengths
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # how a file from before PyTorch 1.6 begins
COUNT = 8  # bytes before the numbers of such a file that say how many they are

Span = tuple[int, int]


def open_archive(path: Path) -> Archive:
    """Map a file, without reading its tensors and without running anything in it.

    Raises `WeightsError` for what is no PyTorch file, is damaged, or was made to do harm.
    """
    with reading(path):
        if not path.is_file():
            raise WeightsError(f"cannot open {path}: no such file", "check the path")
        with path.open("rb") as stream:
            start = stream.read(16)
            if start.startswith(ZIP):
                return Zip(path, stream)
            if start.startswith(pickle.PROTO):
                return Legacy(path, stream)
    raise WeightsError(f"{path} is no PyTorch file: it begins with {start!r}", FETCH_AGAIN)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say of which file it is whatever goes wrong within: a damaged one can fail anywhere."""
    try:
        yield
    except WeightsError:
        raise
    except TooMuch as error:
        raise WeightsError(
            f"refused {path}: {error}; nothing in it ran", "do not use this file"
        ) from error
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise WeightsError(f"cannot read {path}: {reason}", FETCH_AGAIN) from error


def map_file(stream: BinaryIO) -> mmap.mmap:
    """The whole file, as memory that can be written to without changing it."""
    # Not counted as memory that is promised, or the kernel refuses a file larger than memory.
    flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    return mmap.mmap(stream.fileno(), 0, flags=flags, prot=prot)


class Archive:
    """An open file. `content` is made of plain values, of `Stored` tensors and of `StandIn`s."""

    content: Any = None

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.mapped = map_file(stream)

    def span(self, record: str) -> Span:
        """Where the numbers of a storage are."""
        raise NotImplementedError

    def tensor(self, key: str, stored: Stored) -> Tensor:
        """A view of the mapped file; every number of it lies inside its record."""
        storage, dtype = stored.storage, stored.dtype
        start, stop = self.span(storage.record)
        size = storage.size if isinstance(storage.size, int) else -1
        count = (stop - start) // (dtype if storage.dtype is None else storage.dtype).itemsize
        if not stored.fits(count) or size * storage.itemsize != stop - start:
            raise ValueError(f"{key} is not what is stored for it")
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        numbers = torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=start)
        return numbers.as_strided(stored.shape, stored.stride, stored.offset)

    def checked(self, start: int, stop: int) -> Span:
        if not 0 <= start <= stop <= len(self.mapped):
            raise ValueError("it is cut off")
        return start, stop


class Zip(Archive):
    """Records are stored as they are, so that they can be mapped."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        super().__init__(path, stream)
        with zipfile.ZipFile(stream) as archive:
            self.records = {info.filename: info for info in archive.infolist()}
        roots = [name for name in self.records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("not a zip as PyTorch writes it")
        self.root = roots[0].removesuffix("data.pkl")
        if f"{self.root}byteorder" in self.records:
            start, stop = self._span("byteorder")
            if self.mapped[start:stop].decode() != sys.byteorder:
                raise ValueError("written on a machine with another byte order")
        start, stop = self._span("data.pkl")
        self.content = Machine().run(Stream(self.mapped[start : min(stop, start + MOST_BYTES + 1)]))

    def span(self, record: str) -> Span:
        return self._span(f"data/{record}")

    def _span(self, name: str) -> Span:
        """Where a record's bytes are. Lengths of the local header are its own."""
        record = self.records[f"{self.root}{name}"]
        if record.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        place, _ = self.checked(record.header_offset, record.header_offset + LOCAL_HEADER)
        header = self.mapped[place : place + LOCAL_HEADER]
        lengths = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        start = place + LOCAL_HEADER + sum(lengths)
        return self.checked(start, start + record.file_size)


class Legacy(Archive):
    """Before PyTorch 1.6: who wrote it, what, the names of the storages, then these in a row."""

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        super().__init__(path, stream)
        pickles, machine = Stream(self.mapped), Machine()
        if Machine().run(pickles) != MAGIC or Machine().run(pickles) != VERSION:
            raise ValueError("a pickle, but not one of PyTorch")
        system = Machine().run(pickles)
        if not isinstance(system, dict) or system.get("little_endian") is not LITTLE:
            raise ValueError("written on a machine with another byte order")
        self.content = machine.run(pickles)
        records = Machine().run(pickles)
        self.spans: dict[str, Span] = {}
        place = pickles.tell()
        for record in records:
            if not isinstance(record, str):
                raise ValueError("a storage has no name")
            _, start = self.checked(place, place + COUNT)
            count = int.from_bytes(self.mapped[place:start], "little")
            size = count * machine.storages[record].itemsize
            _, place = self.spans[record] = self.checked(start, start + size)

    def span(self, record: str) -> Span:
        return self.spans[record]
