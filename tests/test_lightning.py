"""Lightning checkpoints: read without running anything, and laid over the base's weights."""

from __future__ import annotations

import contextlib
import copyreg
import json
import math
import pickle
import pickletools
import re
import sys
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mgen_core import Row, Want, WeightsError, archive, pickled
from mgen_core.checkpoint import Checkpoint, SeededCheckpoint, TensorInfo, open_checkpoint
from mgen_core.lightning import Lightning, open_lightning
from mgen_core.lora import BLOCK, FineTuned, Lora, holds_backbone
from mgen_core.pickled import StandIn
from mgen_core.weights import fill, match, parameters_on_meta

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
CASES = sorted(GOLDEN.glob("ckpt-*"))
golden = pytest.mark.skipif(not CASES, reason="no golden data in ../shared/golden")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

WEIGHT = torch.arange(12.0).view(3, 4)
HERE = "put it here"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def saved(path: Path, state: Mapping[str, Any], /, **settings: Any) -> Path:
    """A file as Lightning's trainer writes it."""
    content = {"epoch": 1, "state_dict": OrderedDict(state), "optimizer_states": []}
    torch.save({**content, "hyper_parameters": settings}, path)
    return path


def rewritten(file: Path, change: Callable[[bytes], bytes]) -> Path:
    """The same zip with another pickle in it."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return file


def planted(path: Path, steps: bytes, where: str = "hyper_parameters") -> Path:
    """A good file but for one value, which is what these steps of a pickle make."""
    state: dict[str, Any] = {"w": WEIGHT}
    if where == "state_dict":
        file = saved(path, {**state, "planted": HERE})
    else:
        file = saved(path, state, planted=HERE)
    return rewritten(file, lambda content: content.replace(text(HERE), steps))


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value).to_bytes(4, "little") + value.encode()


def steps_of(value: Any) -> bytes:
    """The steps that make a plain value, without those around them."""
    return pickletools.optimize(pickle.dumps(value, 2))[2:-1]


def refused(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_lightning(path)
    assert caught.value.hint
    return caught.value.what


# ------------------------------------------------------------------ what is in a file


@golden
@each_case
def test_every_golden_opens(case: Path) -> None:
    expected = json.loads((case / "checkpoint_contents.json").read_text())
    opened = open_lightning(case / "model.ckpt")
    found = {key: [list(x.shape), str(x.dtype)] for key, x in opened.state.items()}
    assert found == expected["state_dict"]
    assert opened.hyper_parameters.keys() == expected["hyper_parameters"].keys()
    for name, value in opened.hyper_parameters.items():
        if isinstance(value, StandIn):
            assert name == "data_module"
        else:
            assert repr(value)[:160] == expected["hyper_parameters"][name]


@golden
@each_case
def test_values_are_those_that_torch_reads_where_it_reads_them(case: Path) -> None:
    opened = open_lightning(case / "model.ckpt")
    try:
        expected = torch.load(case / "model.ckpt", weights_only=True)["state_dict"]
    except pickle.UnpicklingError:
        assert isinstance(opened.hyper_parameters["data_module"], StandIn)
        return
    assert all(torch.equal(opened.state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_kind_of_tensor_is_read(tmp_path: Path, protocol: int, zipped: bool) -> None:
    whole = torch.randn(6, 8)
    dtypes = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int64, torch.float64]
    dtypes += [torch.float16, torch.bfloat16, torch.complex64, torch.uint16, torch.float8_e4m3fn]
    state = {str(dtype): torch.tensor([[0, 1], [2, 3]]).to(dtype) for dtype in dtypes}
    state |= {"turned": whole.T, "part": whole[2:5, 1::3], "same": whole, "one": torch.tensor(7)}
    state |= {"none": torch.zeros(0, 4), "parameter": nn.Parameter(whole), "row": whole[0][None]}
    content = {"state_dict": nn.Linear(3, 2).state_dict() | state}
    how = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(content, tmp_path / "model.ckpt", **how)
    opened = open_lightning(tmp_path / "model.ckpt").state
    assert opened.keys() == content["state_dict"].keys()
    for key, value in content["state_dict"].items():
        assert opened[key].dtype == value.dtype and opened[key].shape == value.shape
        assert torch.equal(opened[key].to(torch.complex64), value.to(torch.complex64)), key


def test_settings_are_plain_values_and_stand_ins(tmp_path: Path) -> None:
    plain = {"name": "x", "sizes": [1, 2.5, None, True], "nested": {"a": {"b": (3, "c")}}}
    file = saved(tmp_path / "model.ckpt", {"w": WEIGHT}, **plain, path=tmp_path, mean=WEIGHT)
    found = open_lightning(file).hyper_parameters
    assert {name: found[name] for name in plain} == plain
    assert repr(found["path"]) == "<pathlib.PosixPath, not loaded>"
    assert repr(found["mean"]) == "<torch.Tensor, not loaded>"


def test_a_file_without_settings_has_none(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": WEIGHT}}, tmp_path / "model.ckpt")
    opened = open_lightning(tmp_path / "model.ckpt")
    assert opened.hyper_parameters == {} and torch.equal(opened.state["w"], WEIGHT)


def test_tensors_are_the_mapped_file_and_opening_reads_none(tmp_path: Path) -> None:
    size = 4096
    file = saved(tmp_path / "model.ckpt", {"w": torch.ones(size, size)}, path=tmp_path)  # 64 MiB
    before = anonymous_kib()
    opened = open_lightning(file).state["w"]
    assert is_mapped(opened, file)
    assert float(opened.sum()) == size * size
    assert anonymous_kib() - before < 16 * 1024
    opened[:2].zero_()
    assert open_lightning(file).state["w"].sum() == size * size


def is_mapped(tensor: Tensor, file: Path) -> bool:
    """Whether the tensor's bytes are the mapping of that file in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file.resolve())):
            start, stop = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= stop:
                return True
    return False


def anonymous_kib() -> int:
    found = re.search(r"^Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found
    return int(found[1])


# ------------------------------------------------------------------ nothing is run

EVIL = """
import os
def touch(*_, **__): os.system("touch " + os.environ["MARK"])
def _rebuild_tensor_v2(*_): touch()
def OrderedDict(*_): touch()
class New:
    def __new__(cls, *_, **__): touch(); return object.__new__(cls)
class State:
    def __setstate__(self, state): touch()
class Items:
    def __setitem__(self, key, value): touch()
    def append(self, item): touch()
    def extend(self, items): touch()
    def add(self, item): touch()
class Kind(type):
    @property
    def dtype(cls): touch()
class Numbers(metaclass=Kind):
    pass
"""
COMMAND = text("touch $MARK")
STORAGE = b"(" + text("storage") + b"%s" + text("0") + text("cpu") + b"K\x0ctQ"
TRAPS = {
    "REDUCE": b"cposix\nsystem\n" + COMMAND + b"\x85R",
    "REDUCE from the stack": text("posix") + text("system") + b"\x93" + COMMAND + b"\x85R",
    "REDUCE of eval": b"cbuiltins\neval\n" + text("__import__('evil').touch()") + b"\x85R",
    "REDUCE of getattr": b"cbuiltins\ngetattr\ncbuiltins\n__import__\n"
    + text("os") + b"\x85R" + text("system") + b"\x86R" + COMMAND + b"\x85R",
    "REDUCE of a registered number": b"\x82\xf0" + COMMAND + b"\x85R",
    "REDUCE of another _rebuild_tensor_v2": b"cevil\n_rebuild_tensor_v2\n)R",
    "REDUCE of another OrderedDict": b"cevil\nOrderedDict\n)R",
    "INST": b"(" + COMMAND + b"iposix\nsystem\n",
    "OBJ": b"(cposix\nsystem\n" + COMMAND + b"o",
    "NEWOBJ": b"cevil\nNew\n)\x81",
    "NEWOBJ_EX": b"cevil\nNew\n)}\x92",
    "BUILD": b"cevil\nState\n)\x81" + COMMAND + b"b",
    "SETITEM": b"cevil\nItems\n)\x81NNs",
    "SETITEMS": b"cevil\nItems\n)\x81(NNu",
    "APPEND": b"cevil\nItems\n)\x81Na",
    "APPENDS": b"cevil\nItems\n)\x81(Ne",
    "ADDITEMS": b"cevil\nItems\n)\x81(N\x90",
    "an import": b"cevil_when_imported\nanything\n",
}  # fmt: skip
STORAGES = {
    "a storage's class": STORAGE % b"cevil\nNumbers\n",
    "a storage's class from a call": STORAGE % TRAPS["REDUCE"],
    "a storage's name": b"cposix\nsystem\n" + COMMAND + b"\x85RQ",
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that every trap leaves behind when it snaps."""
    monkeypatch.setenv("MARK", str(tmp_path / "ran"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "evil_when_imported.py").write_text("from evil import touch\ntouch()\n")
    copyreg.add_extension("posix", "system", 240)
    yield tmp_path / "ran"
    copyreg.remove_extension("posix", "system", 240)
    forget()


def forget() -> None:
    for name in ("evil", "evil_when_imported"):
        sys.modules.pop(name, None)


def snaps(file: Path, mark: Path) -> bool:
    """Whether a careless loader runs the trap."""
    with contextlib.suppress(Exception):
        torch.load(file, weights_only=False)
    ran = mark.exists()
    mark.unlink(missing_ok=True)
    forget()
    return ran


@pytest.mark.parametrize("trap", TRAPS)
def test_no_trap_in_the_settings_snaps_and_the_model_is_found(
    tmp_path: Path, mark: Path, trap: str
) -> None:
    file = planted(tmp_path / "model.ckpt", TRAPS[trap])
    assert snaps(file, mark)
    opened = open_lightning(file)
    assert not mark.exists() and "evil" not in sys.modules
    assert torch.equal(opened.state["w"], WEIGHT)
    assert isinstance(opened.hyper_parameters["planted"], StandIn)


@pytest.mark.parametrize("trap", TRAPS)
def test_no_trap_in_the_weights_snaps(tmp_path: Path, mark: Path, trap: str) -> None:
    file = planted(tmp_path / "model.ckpt", TRAPS[trap], "state_dict")
    assert snaps(file, mark)
    assert re.search(r"not a plain tensor: planted \(", refused(file))
    assert not mark.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
@pytest.mark.parametrize("trap", STORAGES)
def test_no_trap_in_a_storage_snaps(tmp_path: Path, mark: Path, trap: str, where: str) -> None:
    file = planted(tmp_path / "model.ckpt", STORAGES[trap], where)
    assert snaps(file, mark)
    assert "names a storage that PyTorch does not have" in refused(file)
    assert not mark.exists() and "evil" not in sys.modules


def test_what_is_known_cannot_be_changed_from_the_file(tmp_path: Path) -> None:
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__
    state = b"N}" + text("__defaults__") + b"(NNts\x86b"
    file = planted(tmp_path / "model.ckpt", b"ctorch._utils\n_rebuild_tensor_v2\n" + state)
    open_lightning(file)
    assert rebuild.__defaults__ == before


# ------------------------------------------------------------------ files made to exhaust

DEEP = 500_000
AGAIN = b"h\x63h\x63\x86q\x63"  # a pair of twice the value at 0x63, put there
WIDE = b")q\x630" + (AGAIN + b"0") * 80 + b"h\x63"


@pytest.mark.parametrize(
    "steps",
    [
        b"}" + b")" + b"\x85" * DEEP + b"Ns",  # a key whose hash is as deep as the stack
        b"}" + WIDE + b"Ns",  # and one whose hash takes for ever
        b"}" + b"\x8b" + (10**6).to_bytes(4, "little") + b"\x7f" * 10**6 + b"Ns",
        b"Nr\xff\xff\xff\xff",  # a large place in the memo
        b"ccollections\nOrderedDict\n(" + b"N" * DEEP + b"tR",
    ],
    ids=["deep key", "wide key", "long key", "far memo", "many arguments"],
)
def test_what_would_exhaust_a_loader_is_passed_by(tmp_path: Path, steps: bytes) -> None:
    began = time.perf_counter()
    opened = open_lightning(planted(tmp_path / "model.ckpt", steps))
    assert torch.equal(opened.state["w"], WEIGHT)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (b"]" * DEEP + b"a" * (DEEP - 1), "64 levels"),
        (b")" + b"\x85" * DEEP, "64 levels"),
        (b"]q\x63h\x63a", "64 levels"),  # a list that holds itself
        (WIDE, "1000000 values|64 levels"),
    ],
    ids=["deep lists", "deep tuples", "a circle", "wide tuples"],
)
def test_settings_without_end_are_refused(tmp_path: Path, steps: bytes, reason: str) -> None:
    began = time.perf_counter()
    what = refused(planted(tmp_path / "model.ckpt", steps))
    assert re.search(rf"refused .*{reason}.*nothing in it ran", what)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("MOST_STEPS", "more than 50 steps"), ("MOST_BYTES", "more than 50 bytes")],
)
def test_a_pickle_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    for room in (archive, pickled):
        monkeypatch.setattr(room, limit, 50, raising=False)
    assert reason in refused(saved(tmp_path / "model.ckpt", {"w": WEIGHT}))


@pytest.mark.parametrize(
    "steps",
    [
        b"\x8b\xff\xff\xff\x7f1",  # a number of two gigabytes
        b"\x8d" + b"\xff" * 7 + b"\x7fabc",  # and a text of more than there are
        b"I" + b"9" * 5000 + b"\n",
        b"000000000",  # takes what others have put on the stack
        b"h\x63",
        b"N)R",
        b"NNa",
        b"NNNs",
        b"NQ",
        b"P0\n",
        b"\x97",
        b"\xff",
    ],
)  # fmt: skip
def test_a_broken_pickle_is_an_error(tmp_path: Path, steps: bytes) -> None:
    assert "cannot read" in refused(planted(tmp_path / "model.ckpt", steps))


@pytest.mark.parametrize(
    ("record", "size", "place"),
    [
        ("0", 12, (0, (13,), (1,))),
        ("0", 12, (1, (12,), (1,))),
        ("0", 12, (0, (3, 4), (4, 2))),
        ("0", 12, (0, (2,), (-1,))),
        ("0", 12, (-1, (2,), (1,))),
        ("0", 12, (0, (2**40,), (0,))),
        ("0", 12, (0, (2**61, 2**61), (0, 0))),
        ("0", 12, (0, (2**70,), (1,))),
        ("0", 12, (0, (True,), (1,))),
        ("0", 12, (0, (3.0,), (1,))),
        ("0", 12, (0, (3, 4), (4,))),
        ("0", 12, (0, [3], [1])),
        ("0", 12, (0, (1,) * 65, (1,) * 65)),
        ("0", 12, (13, (0,), (1,))),
        ("0", 11, (0, (3,), (1,))),
        ("0", 2**62, (0, (3,), (1,))),
        ("0", 10**400, (0, (3,), (1,))),
        ("0", "12", (0, (12,), (1,))),
        ("1", 12, (0, (3,), (1,))),
        ("../data.pkl", 12, (0, (3,), (1,))),
        ("0" * 10**6, 12, (0, (3,), (1,))),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_there_is_an_error(
    tmp_path: Path, record: str, size: Any, place: Any
) -> None:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + steps_of((record, "cpu", size))
    # The three of the inner tuple, without the steps that make it one.
    storage = storage.removesuffix(pickle.TUPLE3) + b"tQ"
    arguments = b"(" + storage + steps_of(place).removesuffix(pickle.TUPLE3) + b"\x89Nt"
    steps = b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"
    file = planted(tmp_path / "model.ckpt", steps, "state_dict")
    assert f"cannot read {file}" in refused(file)


def test_a_tensor_that_is_there_is_read_from_the_same_steps(tmp_path: Path) -> None:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + steps_of(("0", "cpu", 12))
    storage = storage.removesuffix(pickle.TUPLE3) + b"tQ"
    place = steps_of((1, (2, 3), (4, 1))).removesuffix(pickle.TUPLE3)
    steps = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + place + b"\x89NtR"
    file = planted(tmp_path / "model.ckpt", steps, "state_dict")
    assert torch.equal(open_lightning(file).state["planted"], WEIGHT[:2, 1:])


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_never_gives_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    file = saved(tmp_path_factory.mktemp("damaged") / "model.ckpt", {"w": WEIGHT}, path=Path())
    content = bytearray(file.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    content[start : start + 40] = data.draw(st.binary(max_size=40))
    file.write_bytes(content)
    with contextlib.suppress(WeightsError):
        opened = open_lightning(file)
        assert all(float(value.sum()) is not None for value in opened.state.values())
        repr(opened.hyper_parameters)


# ------------------------------------------------------------------ files that are wrong


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    file = saved(tmp_path / "model.ckpt", {"w": torch.randn(100, 100)})
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    assert f"cannot read {file}" in refused(file)


def test_a_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is a folder") as caught:
        open_lightning(tmp_path)
    assert f"consolidate_checkpoint {tmp_path}" in caught.value.hint
    saved(tmp_path / "last.ckpt", {})
    with pytest.raises(WeightsError, match="is a folder") as caught:
        open_lightning(tmp_path)
    assert caught.value.hint == "give one of last.ckpt"


def test_other_files_are_called_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    assert "no such file" in refused(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "begins with b'version https://" in refused(file)
    file.write_bytes(b"")
    assert "no PyTorch file" in refused(file)
    torch.save({"a": WEIGHT, "b": 3}, file)
    assert "has no state_dict, but: a, b" in refused(file)
    torch.save([WEIGHT], file)
    assert "has no state_dict, but: nothing" in refused(file)
    torch.save({"state_dict": {"w": WEIGHT, "extra": {"a": 1}, 3: WEIGHT}}, file)
    assert "not a plain tensor: extra (dict), 3 (" in refused(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "not a model")
    assert "not a zip as PyTorch writes it" in refused(file)


def test_a_compressed_file_cannot_be_mapped(tmp_path: Path) -> None:
    file = saved(tmp_path / "model.ckpt", {"w": WEIGHT})
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    assert "is compressed" in refused(file)


def test_a_file_of_the_other_byte_order_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path / "model.ckpt", {"w": WEIGHT})
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    assert "another byte order" in refused(file)


# ------------------------------------------------------------------ a fine-tuned backbone

LAYER = "layer.0."
BASE = {
    "embeddings.words.weight": (7, 4),
    LAYER + "query.weight": (6, 4),
    LAYER + "query.bias": (6,),
    LAYER + "mlp.router.weight": (3, 4),
    LAYER + "mlp.dense_0.weight": (5, 6),
    "ln.weight": (4,),
}
WRAPPED = "backbone.encoder.base_model.model."
QUERY = WRAPPED + LAYER + "query."
HEAD = {"adapter.linear.weight": torch.ones(2, 4), "adapter.linear.bias": torch.zeros(2)}


def random(shape: tuple[int, ...], name: str) -> Tensor:
    numbers = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=numbers) / 3


def base(dtype: torch.dtype = torch.float32, prefix: str = "bert.") -> Checkpoint:
    """A published model: an encoder, and a head that has no prefix."""
    tensors = {prefix + name: random(shape, name).to(dtype) for name, shape in BASE.items()}
    return Checkpoint(Path("base"), tensors | {"cls.bias": torch.ones(7)})


def pair(module: str, shape: tuple[int, int], r: int = 2) -> dict[str, Tensor]:
    """The thin matrices of a module whose weight has this shape, in PEFT's names."""
    if module.startswith("embeddings"):
        a, b, end = (r, shape[0]), (shape[1], r), "embedding_{}.default"
    else:
        a, b, end = (r, shape[1]), (shape[0], r), "{}.default.weight"
    start = f"{WRAPPED}{module}.lora_"
    return {start + end.format(x): random(size, module + x) for x, size in (("A", a), ("B", b))}


def added(module: str, state: Mapping[str, Tensor], scale: float) -> Tensor:
    """What LoRA adds to a module's weight, by the book."""
    start = f"{WRAPPED}{module}.lora_"
    if module.startswith("embeddings"):
        a, b = (state[f"{start}embedding_{x}.default"].double() for x in "AB")
        return scale * (b @ a).T
    a, b = (state[f"{start}{x}.default.weight"].double() for x in "AB")
    return scale * (b @ a)


MATRICES = {name.removesuffix(".weight"): shape for name, shape in BASE.items() if len(shape) == 2}
PAIRS = {key: x for name, shape in MATRICES.items() for key, x in pair(name, shape).items()}


def tuned(
    state: Mapping[str, Tensor], over: Checkpoint | None = None, lora: Lora | None = None
) -> FineTuned:
    return FineTuned(Lightning(Path("model.ckpt"), state, {}), over, lora)


def unfit(
    state: Mapping[str, Tensor], over: Checkpoint | None = None, lora: Lora | None = None
) -> str:
    with pytest.raises(WeightsError) as caught:
        tuned(state, over, lora)
    assert caught.value.hint
    return caught.value.what


def test_full_fine_tuning_needs_no_base() -> None:
    state = {f"backbone.encoder.{name}": random(shape, "own") for name, shape in BASE.items()}
    for over in (None, base(), SeededCheckpoint({"x": (3,)}, 0)):
        found = tuned(state | HEAD, over)
        assert {name: info.shape for name, info in found.keys.items()} == BASE
        for name in BASE:
            assert found.tensor(name) is state[f"backbone.encoder.{name}"]
            assert torch.equal(found.flat(name, 1, 3), found.tensor(name).flatten()[1:3])
    assert found.path == Path("model.ckpt")


def test_a_file_tells_whether_its_base_is_needed() -> None:
    whole = {name: torch.ones(shape) for name, shape in BASE.items()}
    plain = {f"backbone.encoder.{name}": x for name, x in whole.items()}
    wrapped = {WRAPPED + name: x for name, x in whole.items()}
    norm = {f"{WRAPPED}ln.modules_to_save.default.weight": torch.ones(4)}
    bias = {QUERY + "base_layer.bias": torch.ones(6)}
    for state, expected in ((plain, True), (wrapped | PAIRS, True), (HEAD, False), (PAIRS, False),
                            (PAIRS | norm | bias, False)):  # fmt: skip
        assert holds_backbone(Lightning(Path("model.ckpt"), state, {})) is expected


def test_a_frozen_backbone_is_its_base() -> None:
    over = base()
    found = tuned(HEAD, over)
    assert found.keys == over.keys and found.digest() == over.digest()
    assert found.tensor("bert.ln.weight") is over.tensor("bert.ln.weight")
    assert tuned(HEAD, None).keys == {}  # a model without parameters
    assert tuned(HEAD, SeededCheckpoint({}, 0)).keys == {}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("prefix", ["bert.", "", "backbone.encoder."])
def test_lora_is_added_to_every_kind_of_matrix(prefix: str, rslora: bool) -> None:
    over = base(prefix=prefix)
    found = tuned(PAIRS | HEAD, over, Lora(2, 7, rslora))
    assert found.keys == over.keys
    scale = 7 / math.sqrt(2) if rslora else 7 / 2
    for name in BASE:
        module, key = name.removesuffix(".weight"), prefix + name
        expected = over.tensor(key).double()
        if module in MATRICES:
            expected = expected + added(module, PAIRS, scale)
        assert torch.allclose(found.tensor(key).double(), expected, rtol=0, atol=1e-6)
    assert found.tensor("cls.bias") is over.tensor("cls.bias")


def test_lora_with_the_whole_encoder_beside_it_needs_no_base() -> None:
    whole = {name: random(shape, "own") for name, shape in BASE.items()}
    state = {
        WRAPPED + (f"{name[:-7]}.base_layer.weight" if name[:-7] in MATRICES else name): tensor
        for name, tensor in whole.items()
    }
    state[QUERY + "base_layer.bias"] = state.pop(QUERY + "bias")
    found = tuned(state | PAIRS, None, Lora(2, 3))
    assert {name: info.shape for name, info in found.keys.items()} == BASE
    for name, tensor in whole.items():
        expected = tensor.double()
        if name[:-7] in MATRICES:
            expected = expected + added(name[:-7], PAIRS, 1.5)
        assert torch.allclose(found.tensor(name).double(), expected, rtol=0, atol=1e-6)


def test_modules_trained_as_a_whole_replace_those_of_the_base() -> None:
    norm = {f"{WRAPPED}ln.modules_to_save.default.weight": torch.ones(4)}
    bias = {QUERY + "base_layer.bias": torch.ones(6)}
    thin = pair(LAYER + "query", (6, 4))
    found = tuned(norm | bias | thin, base(), Lora(2, 2))
    assert found.keys == base().keys
    assert found.tensor("bert.ln.weight").tolist() == [1] * 4
    assert found.tensor(f"bert.{LAYER}query.bias").tolist() == [1] * 6
    whole = {f"{WRAPPED}{name}": random(shape, "own") for name, shape in BASE.items()}
    whole[QUERY + "base_layer.weight"] = whole.pop(QUERY + "weight")
    copy = whole.pop(WRAPPED + "ln.weight")
    copied = whole | {f"{WRAPPED}ln.original_module.weight": copy}
    found = tuned(copied | norm | thin, None, Lora(2, 2))
    assert found.keys.keys() == BASE.keys()
    assert found.tensor("ln.weight").tolist() == [1] * 4
    assert "unexpected (ln.original_module.weight)" in unfit(copied | thin, None, Lora(2, 2))


@pytest.mark.parametrize(
    ("of_base", "of_lora", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_a_sum_is_rounded_once_to_the_widest_dtype(
    of_base: torch.dtype, of_lora: torch.dtype, expected: torch.dtype
) -> None:
    over, thin = base(of_base), {key: x.to(of_lora) for key, x in PAIRS.items()}
    found = tuned(thin, over, Lora(2, 2))
    key = f"bert.{LAYER}query.weight"
    assert found.keys[key] == TensorInfo(expected, (6, 4))
    exact = over.tensor(key).double() + added(LAYER + "query", thin, 1)
    assert found.tensor(key).dtype == expected
    assert torch.allclose(found.tensor(key), exact.to(expected), rtol=1e-6, atol=1e-6)


WIDE_BASE = Checkpoint(None, {"w.weight": torch.randn(3000, 301), "other.weight": torch.ones(2)})
WIDE_TUNED = tuned(
    {
        f"{WRAPPED}w.lora_A.default.weight": torch.randn(5, 301),
        f"{WRAPPED}w.lora_B.default.weight": torch.randn(3000, 5),
    },
    WIDE_BASE,
    Lora(5, 1),
)
WIDE_SUM = WIDE_TUNED.tensor("w.weight")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_slice_of_a_sum_has_the_bits_of_the_whole(data: st.DataObject) -> None:
    assert WIDE_SUM.numel() > 3 * BLOCK
    start = data.draw(st.integers(0, WIDE_SUM.numel()))
    stop = data.draw(st.integers(start, WIDE_SUM.numel()))
    assert torch.equal(WIDE_TUNED.flat("w.weight", start, stop), WIDE_SUM.flatten()[start:stop])


def test_a_slice_reads_only_the_rows_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def flat(self: Checkpoint, key: str, start: int, stop: int) -> Tensor:
        read.append((start, stop))
        return self.tensor(key).reshape(-1)[start:stop]

    monkeypatch.setattr(Checkpoint, "flat", flat)
    WIDE_TUNED.flat("w.weight", 400_000, 400_100)
    assert sum(stop - start for start, stop in read) <= BLOCK


# ------------------------------------------------------------------ what does not fit

R2 = Lora(2, 4)
THIN = pair(LAYER + "query", (6, 4))


def test_modules_that_were_to_be_trained_are_there_and_no_others() -> None:
    def lora(*targets: str, saved: tuple[str, ...] = ()) -> Lora:
        return Lora(2, 4, targets=targets, saved=saved)

    norm = {f"{WRAPPED}ln.modules_to_save.default.weight": torch.ones(4)}
    assert tuned(THIN | norm, base(), lora("query", saved=("ln",))).keys == base().keys
    whole = {WRAPPED + name: random(shape, "own") for name, shape in BASE.items()}
    whole[QUERY + "base_layer.weight"] = whole.pop(QUERY + "weight")
    assert tuned(whole | THIN, None, lora("0.query")).keys.keys() == BASE.keys()
    router = f"1 missing (what was trained of bert.{LAYER}mlp.router.weight)"
    assert router in unfit(THIN, base(), lora("query", "router"))
    assert "missing (what was trained of bert.ln.weight)" in unfit(
        THIN, base(), lora("query", saved=("ln",))
    )
    assert f"1 unexpected (bert.{LAYER}query.weight)" in unfit(
        THIN | pair(LAYER + "mlp.router", (3, 4)), base(), lora("router")
    )


def test_a_half_of_a_pair_is_missing() -> None:
    for name, other in (("A", "B"), ("B", "A")):
        state = {key: x for key, x in THIN.items() if f"lora_{name}." in key}
        assert f"1 missing ({LAYER}query.lora_{other})" in unfit(state, base(), R2)


def test_names_that_the_base_lacks_are_unexpected() -> None:
    state = THIN | pair("layer.1.query", (6, 4))
    assert "over base: tensors 1 unexpected (bert.layer.1.query.weight)" in unfit(state, base(), R2)
    norm = {f"{WRAPPED}norm.modules_to_save.default.weight": torch.ones(4)}
    assert "1 unexpected (bert.norm.weight)" in unfit(THIN | norm, base(), R2)
    assert "1 unexpected (query)" in unfit(THIN | {"query": torch.ones(1)}, base(), R2)
    bare = {"backbone.encoder.ln.weight": torch.ones(4)}
    assert "1 unexpected (ln.weight)" in unfit(THIN | bare, base(), R2)


def test_matrices_that_do_not_fit_are_told_with_their_shapes() -> None:
    key = rf"bert.{LAYER}query.weight (6, 4) with LoRA"
    assert f"{key} (6, 2) x (2, 4) of rank 3" in unfit(THIN, base(), Lora(3, 4))
    turned = {name: x.T for name, x in THIN.items()}
    assert f"{key} (2, 6) x (4, 2) of rank 2" in unfit(turned, base(), R2)
    whole = {name: x.long() for name, x in THIN.items()}
    assert key in unfit(whole, base(), R2)
    conv = {name: x[..., None] for name, x in THIN.items()}
    assert key in unfit(conv, base(), R2)
    deep = {name: x[..., None] for name, x in pair("embeddings.words", (7, 4)).items()}
    assert "bert.embeddings.words.weight (7, 4)" in unfit(deep, base(), R2)


@pytest.mark.parametrize(
    "name",
    ["query.lora_magnitude_vector.default.weight", "query.lora_B.default.bias",
     "query.lora_A.other.weight"],
)  # fmt: skip
def test_lora_of_another_kind_is_named(name: str) -> None:
    state = THIN | {WRAPPED + LAYER + name: torch.ones(6)}
    assert f"not supported: {LAYER}{name}" in unfit(state, base(), R2)


def test_two_kinds_of_lora_on_one_module_are_refused() -> None:
    words = pair("embeddings.words", (7, 4))
    same = {
        f"{WRAPPED}embeddings.words.lora_A.default.weight": torch.ones(2, 4),
        f"{WRAPPED}embeddings.words.lora_B.default.weight": torch.ones(7, 2),
    }
    assert "2 unexpected (embeddings.words.lora_" in unfit(words | same, base(), R2)


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    whole = {WRAPPED + name: torch.ones(shape) for name, shape in BASE.items()}
    twice = whole | {QUERY + "base_layer.weight": torch.ones(6, 4)}
    assert f"unexpected ({LAYER}query.base_layer.weight)" in unfit(twice | THIN, None, R2)


def test_settings_and_file_agree_on_lora() -> None:
    assert "what they are multiplied by" in unfit(THIN, base())
    assert "holds no LoRA" in unfit(HEAD, base(), R2)
    with pytest.raises(WeightsError, match="rank 0"):
        Lora(0, 1)


def test_changes_without_their_base_are_refused() -> None:
    assert f"what was trained of it: {LAYER}query.weight" in unfit(THIN, None, R2)
    drawn = SeededCheckpoint({"query": (6, 4)}, 0)
    assert "drawn at random and not saved" in unfit(THIN, drawn, R2)
    assert "drawn at random and not saved" in unfit(HEAD, drawn)


def test_no_name_of_a_file_is_passed_by() -> None:
    for name in ("metric.count", "backbone.other.weight", "scaler.extra"):
        assert f"unexpected ({name})" in unfit(HEAD | {name: torch.ones(1)}, base())
    assert "missing (scaler._std)" in unfit({"scaler._mean": torch.ones(1)}, base())


# ------------------------------------------------------------------ digest and heads


def test_the_digest_names_the_base_the_changes_and_their_scale() -> None:
    changed = {key: x + 1e-3 for key, x in THIN.items()}
    seen = [
        tuned(THIN, base(), R2).digest(),
        tuned(changed, base(), R2).digest(),
        tuned(THIN, base(), Lora(2, 5)).digest(),
        tuned(THIN, base(torch.float64), R2).digest(),
        tuned(HEAD, base()).digest(),
        tuned({f"backbone.encoder.{name}": torch.ones(s) for name, s in BASE.items()}).digest(),
    ]
    assert len(set(seen)) == len(seen)
    assert seen[0] == tuned(THIN | HEAD, base(), R2).digest()


def test_heads_are_apart_and_their_copies_are_dropped() -> None:
    scaler = {"scaler._mean": torch.tensor([3.0]), "scaler._std": torch.tensor([2.0])}
    copy = {key.replace("adapter.", "backbone.decoder."): x.clone() for key, x in HEAD.items()}
    classes = {"loss.weight": torch.ones(2)}
    found = tuned(HEAD | copy | scaler | classes, base())
    assert found.keys == base().keys
    heads = found.heads()
    assert heads.adapter.keys.keys() == {"linear.weight", "linear.bias"}
    assert torch.equal(heads.adapter.tensor("linear.weight"), torch.ones(2, 4))
    assert heads.scaler == (torch.tensor([3.0]), torch.tensor([2.0]))
    assert tuned(HEAD, base()).heads().scaler is None


def test_two_heads_that_differ_are_refused() -> None:
    other = {"backbone.decoder.linear.weight": torch.zeros(2, 4)}
    for state in (HEAD | other, HEAD | {"backbone.decoder.extra": torch.ones(1)}, other):
        with pytest.raises(WeightsError, match=r"two heads: backbone\.decoder\.\w+"):
            tuned(state, base()).heads()


# ------------------------------------------------------------------ the goldens, in their models


class Case:
    """A fine-tuned model, opened as its config says."""

    def __init__(self, folder: Path) -> None:
        plugin = pytest.importorskip("mgen_aido.plugin")
        about = json.loads((folder / "checkpoint_contents.json").read_text())
        config = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
        name = config["backbone"]["class_path"].rpartition(".")[2]
        asked = config["backbone"]["init_args"]
        of_base = about["base_model_case"]
        weights = GOLDEN / of_base / "model" if of_base else None
        card = {card.name: card for card in plugin.CARDS}[name]
        self.backbone = card.load(card, card.options(weights=weights, tokens="reference"))
        self.base = open_checkpoint(weights) if weights else None
        self.lora = None
        if asked.get("use_peft"):
            rslora = asked.get("lora_use_rslora", False)
            self.lora = Lora(asked["lora_r"], asked["lora_alpha"], rslora)
        self.opened = open_lightning(folder / "model.ckpt")
        self.tuned = FineTuned(self.opened, self.base, self.lora)
        with parameters_on_meta():
            self.module = self.backbone.build()

    def fill(self) -> None:
        cpu = torch.device("cpu")
        fill(self.module, self.backbone, self.tuned, dtype=torch.float32, device=cpu)


@golden
@each_case
def test_every_parameter_of_a_golden_is_filled_exactly_once(case: Path) -> None:
    model = Case(case)
    matched = match(model.module, model.backbone, model.tuned)
    used = [key for keys in matched.values() for key in keys]
    assert matched.keys() == dict(model.module.named_parameters()).keys()
    assert len(used) == len(set(used))
    ignored = re.compile("|".join(model.backbone.ignored) or "(?!)")
    assert all(ignored.fullmatch(key) for key in model.tuned.keys.keys() - set(used))
    model.fill()
    for name, parameter in model.module.named_parameters():
        stored = torch.cat([model.tuned.tensor(key).flatten() for key in matched[name]])
        assert torch.equal(parameter.flatten(), stored)


@golden
@each_case
def test_lora_of_a_golden_is_what_the_formula_says(case: Path) -> None:
    model = Case(case)
    state, encoder = model.opened.state, "backbone.encoder."
    prefix = "" if "full" in case.name or "loraall" in case.name else "bert."
    seen = set()
    for key in model.tuned.keys:
        if not key.startswith(prefix) or key.startswith(("cls.", "output_embed.")):
            continue
        name = key.removeprefix(prefix)
        start = WRAPPED + name.removesuffix(".weight")
        stored = [
            state.get(s) for s in (encoder + name, WRAPPED + name, f"{start}.base_layer.weight")
        ]
        stored += [state.get(f"{WRAPPED}{name.removesuffix('.bias')}.base_layer.bias")]
        stored += [model.base.tensor(key)] if model.base and key in model.base.keys else []
        expected = next(tensor for tensor in stored if tensor is not None).double()
        thin = [state.get(f"{start}.lora_{side}.default.weight") for side in "BA"]
        if thin[0] is not None and thin[1] is not None and model.lora is not None:
            scale = model.lora.alpha / model.lora.r
            expected = expected + scale * (thin[0].double() @ thin[1].double())
            seen.add(key)
        assert float((model.tuned.tensor(key).double() - expected).abs().max()) <= 1e-6
    assert len(seen) == sum(".lora_A." in key for key in state)
    assert bool(seen) == ("lora" in case.name)


# How the simple heads compute, from (L, H) of one sequence.
HEADS: dict[str, Callable[[Tensor, Checkpoint], Tensor]] = {
    "ckpt-seqcls-dna300m-linearcls-lora": lambda h, w: linear(h[0], w, "linear"),
    "ckpt-seqcls-dnadebug-linearcls-full": lambda h, w: linear(h[0], w, "linear"),
    "ckpt-seqcls-onehot-linearmeanpool": lambda h, w: linear(h.mean(0), w, "linear"),
    "ckpt-seqreg-protein16b-mlppool-lora": lambda h, w: linear(
        torch.tanh(linear(h.mean(0), w, "mlp.1")), w, "mlp.4"
    ),
    "ckpt-seqreg-rna1m-mlppool-full": lambda h, w: linear(
        torch.tanh(linear(h.mean(0), w, "mlp.1")), w, "mlp.3"
    ),
    "ckpt-tokencls-rna1m-linear-frozen": lambda h, w: linear(h, w, "1"),
}


def linear(x: Tensor, weights: Checkpoint, name: str) -> Tensor:
    return nn.functional.linear(x, weights.tensor(f"{name}.weight"), weights.tensor(f"{name}.bias"))


@golden
@pytest.mark.parametrize("name", HEADS)
def test_predictions_of_a_golden_agree(name: str) -> None:
    model = Case(GOLDEN / name)
    model.fill()
    adapter = model.tuned.heads().adapter
    depth = model.backbone.depth or 0
    compared = 0
    for file in sorted((GOLDEN / name / "predict_pt").glob("predict_predictions_0_*.pt")):
        batch = torch.load(file, weights_only=True)
        for number, letters in enumerate(batch["sequences"]):
            tokens = int(batch["attention_mask"][number].sum())
            if "onehot" in name and tokens < batch["attention_mask"].shape[1]:
                continue  # the reference averages over padding too
            row = Row(number, "", letters)
            if model.backbone.measure(row) > tokens:
                row = model.backbone.truncate(row, tokens)
            with torch.inference_mode():
                inputs = model.backbone.collate([row])
                found = model.backbone.forward(model.module, inputs, Want((depth,)))
                predicted = HEADS[name](found.layer(depth)[0], adapter)
            expected = batch["predictions"][number]
            expected = expected[:tokens] if expected.dim() > 1 else expected
            assert float((predicted - expected).abs().max()) <= 1e-5
            compared += 1
    assert compared
