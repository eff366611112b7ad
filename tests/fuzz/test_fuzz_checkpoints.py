"""Checkpoints damaged or made to do harm: an error that names the file, or tensors that are there.

`MGEN_FUZZ_EXAMPLES=100000` looks longer. A crash, a hang or memory without bounds fails too.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mgen_core import WeightsError
from mgen_core.checkpoint import open_checkpoint
from mgen_core.lightning import open_lightning

fuzz = settings(
    max_examples=int(os.environ.get("MGEN_FUZZ_EXAMPLES", "60")),
    deadline=5_000,  # milliseconds, for one file
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MOST_KIB = 512 * 1024

STATE = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
    "none": torch.zeros(0, 4),
}


@pytest.fixture(autouse=True)
def memory_is_bounded() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_KIB


def saved(content: Any, zipped: bool = True) -> bytes:
    stream = BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


LIGHTNING = {"state_dict": STATE, "hyper_parameters": {"path": Path("x"), "sizes": [1, 2.5, None]}}
INDEX = {"metadata": {"total_size": 48}, "weight_map": {key: "shard.bin" for key in STATE}}
FILES = {
    "model.ckpt": saved(LIGHTNING),
    "old.ckpt": saved(LIGHTNING, zipped=False),
    "pytorch_model.bin": saved(STATE),
    "old.bin": saved(STATE, zipped=False),
    "model.safetensors": save({key: value.contiguous() for key, value in STATE.items()}),
    "pytorch_model.bin.index.json": json.dumps(INDEX).encode(),
}


def opens_or_refuses(file: Path, content: bytes) -> bool:
    """Whether it opens; else it is a `WeightsError` with a hint."""
    file.write_bytes(content)
    try:
        if file.suffix == ".ckpt":
            opened = open_lightning(file)
            repr(opened.hyper_parameters)
            tensors = dict(opened.state)
        else:
            checkpoint = open_checkpoint(file)
            checkpoint.digest()
            tensors = {key: checkpoint.tensor(key) for key in checkpoint.keys}
    except WeightsError as error:
        assert error.hint and len(error.what) < 3_000
        return False
    for tensor in tensors.values():
        assert tensor.nbytes <= len(content) or file.suffix == ".json"
        tensor.to(torch.complex128).sum().item()  # reads all of it
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "shard.bin").write_bytes(FILES["pytorch_model.bin"])
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_good_file_opens(folder: Path, name: str) -> None:
    assert opens_or_refuses(folder / name, FILES[name])


# --------------------------------------------------------------------------- damage


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bytes changed, taken out or put in, or cut off."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(found) - 1)))
        kind = draw(st.sampled_from(["flip", "number", "replace", "insert", "cut", "move"]))
        if kind == "flip" and found:
            found[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":  # what lengths and offsets are made of
            size = draw(st.sampled_from([2, 4, 8]))
            found[place : place + size] = b"\xff" * (size - 1) + draw(
                st.sampled_from([b"\x7f", b"\xff", b"\0"])
            )
        elif kind == "replace":
            new = draw(st.binary(max_size=12))
            found[place : place + len(new)] = new
        elif kind == "insert":
            found[place:place] = draw(st.binary(max_size=12))
        elif kind == "cut":
            del found[place:]
        else:
            start = draw(st.integers(0, max(0, len(found) - 1)))
            found[place : place + 20] = found[start : start + 20]
    return bytes(found)


@pytest.mark.parametrize("name", FILES)
@fuzz
@given(data=st.data())
def test_a_damaged_file_is_an_error_or_opens(folder: Path, name: str, data: st.DataObject) -> None:
    opens_or_refuses(folder / name, data.draw(damaged(FILES[name])))


# --------------------------------------------------------------------------- made to do harm

NUMBERS = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**61, 2**63 - 1, 2**64, 10**30, -(2**63)])
)
VALUES = st.recursive(
    st.one_of(NUMBERS, st.none(), st.booleans(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=2),
    ),
    max_leaves=5,
)  # fmt: skip
NAMES = [
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch FloatStorage", "torch BFloat16Storage",
    "torch float32", "torch.storage UntypedStorage", "os system", "builtins getattr", "",
]  # fmt: skip
BARE = [
    bytes([code])
    for code in b"()NN]}\x85\x86\x87tlde0129as.uoRQ\x81\x88\x89\x8f\x90\x91\x92\x93\x94\x97\x98b"
]


def plain(value: Any) -> bytes:
    """The steps that make a value."""
    return pickle.dumps(value, 2)[2:-1]


def named(name: str) -> bytes:
    module, _, attribute = name.partition(" ")
    return f"c{module}\n{attribute}\n".encode()


def stored(kind: str, record: Any, size: Any) -> bytes:
    """The steps that name a storage."""
    return (
        b"(" + plain("storage") + named(kind) + plain(record) + plain("cpu") + plain(size) + b"tQ"
    )


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """The steps that make a tensor, of whatever there is or is not."""
    kind = draw(st.sampled_from(["torch FloatStorage", "torch BFloat16Storage", *NAMES]))
    record = draw(st.one_of(st.sampled_from(["0", "1", "2", "9", "../data.pkl"]), VALUES))
    storage = stored(kind, record, draw(st.one_of(st.just(12), NUMBERS)))
    sizes = st.lists(NUMBERS, max_size=4).map(tuple)
    shape, stride = draw(st.one_of(sizes, VALUES)), draw(st.one_of(sizes, VALUES))
    place = plain(draw(NUMBERS)) + plain(shape) + plain(stride)
    return named("torch._utils _rebuild_tensor_v2") + b"(" + storage + place + b"\x89NtR"


STEPS = st.one_of(
    st.sampled_from(BARE), VALUES.map(plain), st.sampled_from(NAMES).map(named), tensors(),
    st.integers(0, 255).map(lambda place: b"h" + bytes([place])),
    st.integers(0, 255).map(lambda place: b"q" + bytes([place])),
    st.binary(max_size=4),
)  # fmt: skip
PICKLES = st.lists(STEPS, max_size=30).map(b"".join)


@st.composite
def later_tensors(draw: st.DrawFn) -> bytes:
    """The same in the way of newer versions, where any dtype may be named."""
    kinds = [str(kind).replace(".", " ") for kind in vars(torch).values() if is_dtype(kind)]
    storage = stored("torch.storage UntypedStorage", "0", 48)
    place = plain(draw(st.integers(0, 3))) + plain((2, 3)) + plain((3, 1))
    kind = named(draw(st.sampled_from([*kinds, *NAMES])))
    return (
        named("torch._utils _rebuild_tensor_v3") + b"(" + storage + place + b"\x89N" + kind + b"tR"
    )


def is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


def rezipped(content: bytes, steps: bytes) -> bytes:
    """A zip like this one, with another pickle."""
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(name, steps if name.endswith("data.pkl") else old.read(name))
    return made.getvalue()


def around(steps: bytes, name: str) -> bytes:
    """A whole pickle with these steps where a weight is."""
    state = b"\x80\x02}" + plain("w") + steps + b"s"
    return (
        state + b"."
        if name.endswith(".bin")
        else b"\x80\x02}" + plain("state_dict") + state[2:] + b"s."
    )


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin"])
@fuzz
@given(steps=st.one_of(PICKLES, tensors(), later_tensors()))
def test_a_pickle_made_to_do_harm(folder: Path, name: str, steps: bytes) -> None:
    opens_or_refuses(folder / name, rezipped(FILES[name], around(steps, name)))


@fuzz
@given(
    steps=st.one_of(PICKLES, tensors()),
    names=st.one_of(st.just(["0", "1"]), VALUES),
    counts=st.lists(st.one_of(st.just(12), NUMBERS), max_size=3),
)
def test_an_old_file_made_to_do_harm(
    folder: Path, steps: bytes, names: Any, counts: list[int]
) -> None:
    system = {"protocol_version": 1001, "little_endian": True}
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    sizes = [struct.pack("<Q", count % 2**64) + bytes(48) for count in counts]
    parts = [*head, around(steps, "old.bin"), pickle.dumps(names, 2), *sizes]
    opens_or_refuses(folder / "old.bin", b"".join(parts))


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I64", "F4", "BOOL"]), VALUES),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), VALUES),
        "data_offsets": st.one_of(st.tuples(NUMBERS, NUMBERS), VALUES),
        "more": VALUES,
    },
)


@fuzz
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), ENTRIES, max_size=3),
    length=st.one_of(st.none(), NUMBERS),
    twice=st.booleans(),
    size=st.integers(0, 64),
)
def test_a_safetensors_header_made_to_do_harm(
    folder: Path, header: dict[str, Any], length: int | None, twice: bool, size: int
) -> None:
    text = json.dumps(header)
    if twice and header:  # the same names again, with what may be other places
        text = f"{text[:-1]}, {json.dumps(dict(reversed(header.items())))[1:]}"
    count = len(text) if length is None else length % 2**64
    file = folder / "model.safetensors"
    opens_or_refuses(file, struct.pack("<Q", count) + text.encode() + bytes(size))


@pytest.mark.parametrize(
    "shape", [[0] * 2_000_000, [1] * 2_000_000, [2**63 - 1, 2**63 - 1, 0]], ids=len
)
def test_a_tensor_of_too_many_axes(folder: Path, shape: list[int]) -> None:
    size = 0 if 0 in shape else 4
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
    content = struct.pack("<Q", len(text)) + text.encode() + bytes(size)
    opens_or_refuses(folder / "model.safetensors", content)


@pytest.mark.parametrize("deep", ["[" * 200_000, '{"a":' * 200_000], ids=["lists", "mappings"])
@pytest.mark.parametrize("make", [str.encode, lambda text: struct.pack("<Q", 10) + text.encode()])
def test_json_without_end(folder: Path, deep: str, make: Callable[[str], bytes]) -> None:
    for name in ("model.safetensors", "pytorch_model.bin.index.json"):
        assert not opens_or_refuses(folder / name, make(deep))


@fuzz
@given(index=st.one_of(VALUES, st.fixed_dictionaries({"weight_map": VALUES})))
def test_an_index_made_to_do_harm(folder: Path, index: Any) -> None:
    opens_or_refuses(folder / "pytorch_model.bin.index.json", json.dumps(index).encode())


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.ckpt")
    with pytest.raises(WeightsError, match="no such file"):
        open_lightning(tmp_path / "model.ckpt")
