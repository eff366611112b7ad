"""A Lightning checkpoint: its tensors as views of the mapped file, its settings as plain values.

The file is a zip with a pickle, and a pickle is a program. It is read here by a machine that
builds containers and nothing else: what the file would have called, it leaves as a `StandIn`.
Nothing is imported and nothing is run. So a model is found also in files that
`torch.load(weights_only=True)` refuses, such as those with a data module in their settings.

`torch.load` is not tried first: a small file made for it ends the process, or hangs it (it hashes
nested tuples). Here, work and memory are bounded by the length of the file and the limits below.
"""

from __future__ import annotations

import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickletools import genops
from typing import Any, NoReturn

import torch
from torch import Tensor

from .checkpoint import FETCH_AGAIN, NO_RESERVE, SAFETENSORS_DTYPES, listed_names
from .errors import WeightsError

MOST_BYTES = 2**28  # of the pickle: tensors are outside it
MOST_STEPS = 10**7
MOST_VALUES = 10**6  # in the settings
DEEPEST = 64
LONGEST_KEY = 1024
MOST_AXES = 64
MOST_ARGUMENTS = 16
LOCAL_HEADER = 30  # bytes before a record's name, of which the last four are two lengths

NO_CHECKPOINT = "a checkpoint that Lightning's trainer wrote is needed"
SAVE_AGAIN = "where you trust it: torch.save(torch.load(FILE, weights_only=False), FILE)"
MAKE_ONE_FILE = "make one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint"


@dataclass(frozen=True, eq=False)
class StandIn:
    """In place of what the file would have called, by its name; it does nothing."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True)
class Lightning:
    """What a fine-tuned model's file says: `state_dict`, and the settings of the training."""

    path: Path
    state: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any]


def open_lightning(path: Path) -> Lightning:
    """Open a `.ckpt` without reading its tensors and without running anything in it.

    Raises `WeightsError` for what is no such file, is damaged, or was made to do harm.
    """
    _check_kind(path)
    try:
        archive = _Archive(path)
        content = _Machine().run(archive.pickle())
        found = content if isinstance(content, dict) else {}
        settings = found.get("hyper_parameters")
        plain = _plain(settings, 0, iter(range(MOST_VALUES))) if isinstance(settings, dict) else {}
        return Lightning(path, _state(path, found, archive), plain)
    except WeightsError:
        raise
    except _TooMuch as error:
        raise WeightsError(
            f"refused {path}: {error}; nothing in it ran", "do not use this file"
        ) from error
    # A damaged file can fail anywhere.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise WeightsError(f"cannot read {path}: {reason}", FETCH_AGAIN) from error


def _check_kind(path: Path) -> None:
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.ckpt"))
        hint = f"give one of {listed_names(inside)}" if inside else f"{MAKE_ONE_FILE} {path}"
        raise WeightsError(f"{path} is a folder, not a checkpoint file", hint)
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise WeightsError(f"cannot open {path}: {error.strerror}", "check the path") from error
    if start.startswith(pickle.PROTO):
        raise WeightsError(f"{path} is a pickle as PyTorch wrote them before 1.6", SAVE_AGAIN)
    if not start.startswith(b"PK\x03\x04"):
        raise WeightsError(f"{path} is no PyTorch file: it begins with {start!r}", FETCH_AGAIN)


def _state(path: Path, found: Mapping[str, Any], archive: _Archive) -> dict[str, Tensor]:
    stored = found.get("state_dict")
    if not isinstance(stored, dict):
        held = listed_names([str(key) for key in found])
        raise WeightsError(f"{path} has no state_dict, but: {held or 'nothing'}", NO_CHECKPOINT)
    foreign = [
        f"{key} ({value.name if isinstance(value, StandIn) else type(value).__name__})"
        for key, value in stored.items()
        if not isinstance(key, str) or not isinstance(value, _Stored)
    ]
    if foreign:
        raise WeightsError(
            f"state_dict of {path} holds what is not a plain tensor: {listed_names(foreign)}",
            "only weights can be used: save the model without it",
        )
    return {key: archive.tensor(key, value) for key, value in stored.items()}


class _TooMuch(Exception):
    """The file asks for more work than any model needs."""


def _plain(value: object, depth: int, room: Iterator[int]) -> Any:
    """A copy of plain values. What the pickle says once may be in it a million times."""
    if depth > DEEPEST or next(room, None) is None:
        raise _TooMuch(f"settings of more than {DEEPEST} levels or {MOST_VALUES} values")
    if isinstance(value, dict):
        return {key: _plain(inner, depth + 1, room) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner, depth + 1, room) for inner in value)
    return StandIn("torch.Tensor") if isinstance(value, (_Stored, _Storage)) else value


# --------------------------------------------------------------------------- the mapped zip


@dataclass(frozen=True, eq=False)
class _Storage:
    """Where numbers are. Nothing of it is checked yet, nor of the next one."""

    dtype: torch.dtype | None  # None: bytes, the tensor says of what
    record: Any
    size: Any


@dataclass(frozen=True, eq=False)
class _Stored:
    """A tensor of the pickle."""

    storage: _Storage
    dtype: torch.dtype
    offset: Any
    shape: Any
    stride: Any


class _Archive:
    """The records of a zip as PyTorch writes it: stored as they are, so that they can be mapped."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as stream:
            # Private: nothing can change the file. Not counted as memory that is promised.
            flags, prot = mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            self.mapped = mmap.mmap(stream.fileno(), 0, flags=flags, prot=prot)
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

    def pickle(self) -> bytes:
        start, stop = self._span("data.pkl")
        if stop - start > MOST_BYTES:
            raise _TooMuch(f"a pickle of more than {MOST_BYTES} bytes")
        return self.mapped[start:stop]

    def _span(self, name: str) -> tuple[int, int]:
        """Where a record's bytes are. Lengths of the local header are its own."""
        record = self.records[f"{self.root}{name}"]
        header = self.mapped[record.header_offset : record.header_offset + LOCAL_HEADER]
        lengths = (int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
        start = record.header_offset + LOCAL_HEADER + sum(lengths)
        stop = start + record.file_size
        if record.compress_type != zipfile.ZIP_STORED or stop > len(self.mapped):
            raise ValueError(f"{name} is compressed or cut off")
        return start, stop

    def tensor(self, key: str, stored: _Stored) -> Tensor:
        """A view of the mapped file; every number of it lies inside its record."""
        storage, dtype = stored.storage, stored.dtype
        start, stop = self._span(f"data/{storage.record}")
        unit = dtype if storage.dtype is None else storage.dtype
        count = (stop - start) // unit.itemsize
        if not _fits(stored, count) or _bytes(storage) != stop - start:
            raise ValueError(f"{key} is not what is stored for it")
        if not count:
            return torch.empty(stored.shape, dtype=dtype)
        numbers = torch.frombuffer(self.mapped, dtype=dtype, count=count, offset=start)
        return numbers.as_strided(stored.shape, stored.stride, stored.offset)


def _bytes(storage: _Storage) -> int:
    size = storage.size if isinstance(storage.size, int) else -1
    return size * (1 if storage.dtype is None else storage.dtype.itemsize)


def _fits(stored: _Stored, count: int) -> bool:
    """Whether the tensor lies in `count` numbers and is no larger than they are."""
    shape, stride = stored.shape, stored.stride
    if not (isinstance(shape, tuple) and isinstance(stride, tuple)):
        return False
    if len(shape) != len(stride) or len(shape) > MOST_AXES:
        return False
    known = all(type(n) is int and 0 <= n < 2**62 for n in (stored.offset, *shape, *stride))
    if not known or not math.prod(shape):
        return known and stored.offset <= count
    last = stored.offset + sum((n - 1) * step for n, step in zip(shape, stride))
    return bool(last < count and math.prod(shape) <= count)


# --------------------------------------------------------------------------- the pickle machine

STORAGES: Mapping[str, torch.dtype | None] = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
    "torch.storage.UntypedStorage": None,
}
DTYPES = {str(dtype): dtype for dtype in SAFETENSORS_DTYPES.values()}
SCALARS = (str, int, float, bool, type(None))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    typed = isinstance(storage, _Storage) and storage.dtype is not None
    if not typed or any(rest[2:]):  # the last says of complex numbers that they are conjugates
        return StandIn("torch.Tensor")
    return _Stored(storage, storage.dtype, offset, shape, stride)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    _, _, kind, *about = rest
    dtype = DTYPES.get(kind.name) if isinstance(kind, StandIn) else None
    untyped = isinstance(storage, _Storage) and storage.dtype is None
    if not untyped or dtype is None or any(about):
        return StandIn("torch.Tensor")
    return _Stored(storage, dtype, offset, shape, stride)


# What calls make that we know. They are not made by calling: these are ours.
KNOWN: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda *items: StandIn("OrderedDict") if items else {},
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_tensor_v2": _rebuild_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_v3,
}


def _called(function: object, arguments: object) -> Any:
    """What stands for the result of a call."""
    if not isinstance(function, StandIn) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls what cannot be called")
    known = KNOWN.get(function.name)
    if known is None or len(arguments) > MOST_ARGUMENTS:  # passing a million of them takes time
        return StandIn(function.name)
    return known(*arguments)


def _storage(identity: object) -> _Storage:
    if isinstance(identity, tuple) and len(identity) == 5 and identity[0] == "storage":
        _, kind, record, _, size = identity
        if isinstance(kind, StandIn) and kind.name in STORAGES and isinstance(record, str):
            return _Storage(STORAGES[kind.name], record, size)
    raise ValueError("the pickle names a storage that PyTorch does not have")


def _as_key(value: object) -> Any:
    """A key that is hashed and compared at once, whatever the file says.

    A nested tuple may take for ever, or more than the stack.
    """
    if not isinstance(value, SCALARS):
        return StandIn(type(value).__name__)
    long = isinstance(value, str) and len(value) > LONGEST_KEY
    wide = isinstance(value, int) and value.bit_length() > 64
    return StandIn("key") if long or wide else value


class _Machine:
    """Runs the steps of a pickle as far as they make plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for number, (step, argument, _) in enumerate(genops(content)):
            if number == MOST_STEPS:
                raise _TooMuch(f"a pickle of more than {MOST_STEPS} steps")
            STEPS[step.name](self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        found, self.stack = self.stack, self.marked.pop()
        return found

    def last(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise ValueError("the pickle takes more than it has made")
        found = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return found

    def pop(self, _: Any) -> None:
        # As in pickle: where there is nothing above the mark, the mark goes.
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def put(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def get(self, place: int) -> None:
        if place not in self.memo:
            raise ValueError("the pickle recalls what it has not made")
        self.push(self.memo[place])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, StandIn):
            raise ValueError("the pickle appends to what is no list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(_pairs(items))
        elif not isinstance(target, StandIn):
            raise ValueError("the pickle sets an item of what has none")

    def call(self, arguments: Any) -> None:
        self.push(_called(self.stack.pop(), arguments))

    def call_by_name(self, name: str) -> None:
        self.push(_called(StandIn(name.replace(" ", ".")), tuple(self.since_mark())))

    def call_first(self, _: Any) -> None:
        function, *arguments = self.since_mark()
        self.push(_called(function, tuple(arguments)))

    def call_with_names(self, _: Any) -> None:
        function, arguments, _ = self.last(3)
        self.push(_called(function, arguments))

    def name_from_stack(self, _: Any) -> None:
        module, name = self.last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the pickle names what is no name")
        self.push(StandIn(f"{module}.{name}"))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_as_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _refuse(_: _Machine, __: Any) -> NoReturn:
    raise ValueError("the pickle needs data that is not in the file")


Step = Callable[[_Machine, Any], None]
VALUES = (
    "BINBYTES BINBYTES8 BINFLOAT BININT BININT1 BININT2 BINSTRING BINUNICODE BINUNICODE8 BYTEARRAY8"
    " FLOAT INT LONG LONG1 LONG4 SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE STRING UNICODE"
)

# Every step that there is, by its name in `pickletools`.
STEPS: Mapping[str, Step] = {
    **dict.fromkeys(VALUES.split(), _Machine.push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    # Containers; a set becomes a list, so that nothing is hashed.
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_SET": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.last(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.last(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.last(3))),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(machine.since_mark()),
    "DICT": lambda machine, _: machine.push(_pairs(machine.since_mark())),
    "APPEND": lambda machine, _: machine.extend(machine.last(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    # The stack and the memo.
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": lambda machine, _: machine.since_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    # What a careless loader would import, call, or hand its state to.
    "GLOBAL": lambda machine, name: machine.push(StandIn(name.replace(" ", "."))),
    "STACK_GLOBAL": _Machine.name_from_stack,
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"),
        lambda machine, code: machine.push(StandIn(f"extension {code}")),
    ),
    "REDUCE": lambda machine, _: machine.call(machine.stack.pop()),
    "NEWOBJ": lambda machine, _: machine.call(machine.stack.pop()),
    "NEWOBJ_EX": _Machine.call_with_names,
    "OBJ": _Machine.call_first,
    "INST": _Machine.call_by_name,
    "BUILD": lambda machine, _: machine.last(1).clear(),
    "BINPERSID": lambda machine, _: machine.push(_storage(machine.stack.pop())),
    "PERSID": lambda machine, identity: machine.push(_storage(identity)),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
