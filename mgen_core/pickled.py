"""The pickle inside a PyTorch file, read by a machine that runs nothing.

A pickle is a program. This machine builds plain containers and nothing else: what the file would
have called, it leaves as a `StandIn`. Nothing is imported and nothing is run, so what there is of
a model is found also in files that `torch.load(weights_only=True)` refuses.

`torch.load` itself is not used: a small file made for it ends the process, or hangs it (it hashes
nested tuples). Here, work and memory are bounded by the length of the file and the limits below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickletools import genops
from typing import IO, Any, NoReturn, cast

import torch

MOST_BYTES = 2**28  # of the pickle: tensors are outside it
MOST_STEPS = 10**7
LONGEST_KEY = 1024
MOST_AXES = 64
MOST_ARGUMENTS = 16


class TooMuch(Exception):
    """The file asks for more work than any model needs."""


# --------------------------------------------------------------------------- what is made


@dataclass(frozen=True, eq=False)
class StandIn:
    """In place of what the file would have called, by its name; it does nothing."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"


@dataclass(frozen=True, eq=False)
class Storage:
    """Where numbers are. Nothing of it is checked yet, nor of the next one."""

    dtype: torch.dtype | None  # None: bytes, the tensor says of what
    record: str
    size: Any

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype is None else self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor of the pickle."""

    storage: Storage
    dtype: torch.dtype
    offset: Any
    shape: Any
    stride: Any

    def fits(self, count: int) -> bool:
        """Whether the tensor lies in `count` numbers and is no larger than they are."""
        shape, stride = self.shape, self.stride
        if not (isinstance(shape, tuple) and isinstance(stride, tuple)):
            return False
        if len(shape) != len(stride) or len(shape) > MOST_AXES:
            return False
        known = all(type(n) is int and 0 <= n < 2**62 for n in (self.offset, *shape, *stride))
        if not known or not math.prod(shape):
            return known and self.offset <= count
        last = self.offset + sum((n - 1) * step for n, step in zip(shape, stride))
        return bool(last < count and math.prod(shape) <= count)


class Stream:
    """The start of a mapped file as `genops` wants it: no more than a pickle may be long."""

    def __init__(self, content: Any) -> None:
        self.content = content
        self.place = 0

    def tell(self) -> int:
        return self.place

    def read(self, count: int) -> bytes:
        start, self.place = self.place, min(self.place + count, len(self.content))
        if self.place > MOST_BYTES:
            raise TooMuch(f"a pickle of more than {MOST_BYTES} bytes")
        return bytes(self.content[start : self.place])

    def readline(self) -> bytes:
        end = self.content.find(b"\n", self.place, MOST_BYTES)
        return self.read((end + 1 if end >= 0 else len(self.content)) - self.place)


# --------------------------------------------------------------------------- the machine

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
# No others: a view of quantised numbers ends the process.
LATER = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES = {str(kind): kind for kind in (*STORAGES.values(), *LATER) if kind is not None}
SCALARS = (str, int, float, bool, type(None))


def _rebuild_v2(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    typed = isinstance(storage, Storage) and storage.dtype is not None
    if not typed or any(rest[2:]):  # the last says of complex numbers that they are conjugates
        return StandIn("torch.Tensor")
    return Stored(storage, storage.dtype, offset, shape, stride)


def _rebuild_v3(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> Any:
    _, _, kind, *about = rest
    dtype = DTYPES.get(kind.name) if isinstance(kind, StandIn) else None
    untyped = isinstance(storage, Storage) and storage.dtype is None
    if not untyped or dtype is None or any(about):
        return StandIn("torch.Tensor")
    return Stored(storage, dtype, offset, shape, stride)


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


def _storage(identity: object) -> Storage:
    # Before PyTorch 1.6 there was a sixth: what part of another storage this one is.
    whole = isinstance(identity, tuple) and (len(identity) == 5 or identity[5:] == (None,))
    if isinstance(identity, tuple) and whole and identity[0] == "storage":
        _, kind, record, _, size, *_ = identity
        if isinstance(kind, StandIn) and kind.name in STORAGES and isinstance(record, str):
            return Storage(STORAGES[kind.name], record, size)
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


class Machine:
    """Runs the steps of a pickle as far as they make plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}  # by their records

    def run(self, stream: Stream) -> Any:
        """What the pickle makes; the stream is then behind it."""
        for number, (step, argument, _) in enumerate(genops(cast(IO[bytes], stream))):
            if number == MOST_STEPS:
                raise TooMuch(f"a pickle of more than {MOST_STEPS} steps")
            STEPS[step.name](self, argument)
        return self.stack.pop()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_storage(self, identity: Any) -> None:
        storage = _storage(identity)
        self.storages[storage.record] = storage
        self.push(storage)

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


def _refuse(_: Machine, __: Any) -> NoReturn:
    raise ValueError("the pickle needs data that is not in the file")


Step = Callable[[Machine, Any], None]
VALUES = (
    "BINBYTES BINBYTES8 BINFLOAT BININT BININT1 BININT2 BINSTRING BINUNICODE BINUNICODE8 BYTEARRAY8"
    " FLOAT INT LONG LONG1 LONG4 SHORT_BINBYTES SHORT_BINSTRING SHORT_BINUNICODE STRING UNICODE"
)

# Every step that there is, by its name in `pickletools`.
STEPS: Mapping[str, Step] = {
    **dict.fromkeys(VALUES.split(), Machine.push),
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
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda machine, _: machine.since_mark().clear(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    # What a careless loader would import, call, or hand its state to.
    "GLOBAL": lambda machine, name: machine.push(StandIn(name.replace(" ", "."))),
    "STACK_GLOBAL": Machine.name_from_stack,
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"),
        lambda machine, code: machine.push(StandIn(f"extension {code}")),
    ),
    "REDUCE": lambda machine, _: machine.call(machine.stack.pop()),
    "NEWOBJ": lambda machine, _: machine.call(machine.stack.pop()),
    "NEWOBJ_EX": Machine.call_with_names,
    "OBJ": Machine.call_first,
    "INST": Machine.call_by_name,
    "BUILD": lambda machine, _: machine.last(1).clear(),
    "BINPERSID": lambda machine, _: machine.push_storage(machine.stack.pop()),
    "PERSID": Machine.push_storage,
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), _refuse),
}
