"""A checkpoint, opened without reading it: names, shapes, and slices of mapped tensors.

No pickle of a checkpoint is ever executed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from .archive import FETCH_AGAIN, map_file, open_archive, reading
from .errors import WeightsError
from .hub import WEIGHT_FILES, choose_weights
from .pickled import MOST_AXES, StandIn, Stored

SHOWN = 8  # names in an error message
BLOCK_BYTES = 4096  # what a digest reads at a time
BLOCKS = 16  # and how often per tensor
LIBC = ctypes.CDLL(None)
SAFETENSORS_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class TensorInfo(NamedTuple):
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


# --------------------------------------------------------------------------- checkpoints


class Checkpoint:
    """Named tensors of one model, mapped from their files; `path` is what was opened."""

    def __init__(self, path: Path | None, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self.keys: Mapping[str, TensorInfo] = {
            key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()
        }
        self._tensors = tensors

    def tensor(self, key: str) -> Tensor:
        """The tensor on the CPU, a view of the mapped file: bytes are read when touched."""
        return self._tensors[key]

    def flat(self, key: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor (1-D), without reading the others."""
        return self.tensor(key).reshape(-1)[start:stop]

    def digest(self) -> str:
        """SHA-256 over name, dtype, shape and up to 16 blocks of 4 KiB of every tensor.

        A training step changes it, since it moves every tensor nearly everywhere; so do other
        names, shapes or precision. The file layout does not. An edit of a few numbers between
        the blocks of a large tensor goes unseen: it tells models apart, it is no proof against
        tampering.
        """
        seen = hashlib.sha256()
        for key in sorted(self.keys):
            dtype, shape = self.keys[key]
            seen.update(json.dumps([key, str(dtype), shape]).encode())
            with _no_readahead(self._tensors.get(key)):
                for start, stop in _sampled(math.prod(shape), BLOCK_BYTES // dtype.itemsize):
                    # A single number may have any stride and count as contiguous: copied.
                    block = self.flat(key, start, stop).clone(memory_format=torch.contiguous_format)
                    seen.update(block.view(torch.uint8).numpy().data)
        return seen.hexdigest()


def _sampled(size: int, block: int) -> list[tuple[int, int]]:
    """Ranges of `block` elements: the first, the last and evenly spaced between; all if few."""
    if size <= block * BLOCKS:
        return [(0, size)]
    starts = [(size - block) * number // (BLOCKS - 1) for number in range(BLOCKS)]
    return [(start, start + block) for start in starts]


@contextmanager
def _no_readahead(tensor: Tensor | None) -> Iterator[None]:
    """Read single pages of a mapped tensor; else each block costs up to megabytes around it."""
    if tensor is None or not tensor.nbytes:
        yield
        return
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    span = ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + tensor.nbytes - start)
    LIBC.madvise(*span, mmap.MADV_RANDOM)
    yield
    LIBC.madvise(*span, mmap.MADV_NORMAL)


class SeededCheckpoint(Checkpoint):
    """Parameters of a model that has no weights, drawn from a seed as they are asked for.

    A value depends on the seed, the parameter's name and its shape, and is bit-identical on
    every machine: raw PCG64 words, then float32 sums, products and one square root, all of which
    IEEE 754 rounds exactly. Names that end in `bias` are within 0.02 of 0, other vectors within
    0.02 of 1, matrices uniform with variance 1 / fan_in (the longest axis but the first), so
    that activations neither vanish nor explode.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        super().__init__(None, {})
        self.keys = {name: TensorInfo(torch.float32, shape) for name, shape in shapes.items()}
        self.seed = seed

    def tensor(self, key: str) -> Tensor:
        """The whole tensor, drawn anew at each call."""
        shape = self.keys[key].shape
        return self.flat(key, 0, math.prod(shape)).reshape(shape)

    def flat(self, key: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor, without drawing the others."""
        name = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
        stream = np.random.PCG64(np.random.SeedSequence([self.seed, name])).advance(start)
        words = stream.random_raw(stop - start) >> np.uint64(40)
        # Odd numbers of 24 bits over 2**24: between -1 and 1, exact in float32, never 0.
        odd = words.astype(np.int64) * 2 + 1 - 2**24
        uniform = odd.astype(np.float32) * np.float32(2.0**-24)
        centre, spread = _scale(key, self.keys[key].shape)
        return torch.from_numpy(np.float32(centre) + np.float32(spread) * uniform)


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("bias"):
        return 0.0, 0.02
    if len(shape) < 2:
        return 1.0, 0.02
    return 0.0, math.sqrt(3 / max(1, *shape[1:]))


def seeded_checkpoint(module: nn.Module, seed: int) -> SeededCheckpoint:
    """A checkpoint whose keys are the module's own parameter names; values need no file."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return SeededCheckpoint(shapes, seed)


# --------------------------------------------------------------------------- opening


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder or file of weights: safetensors or PyTorch `.bin`, single or sharded.

    Raises `WeightsError` for files that are missing, damaged, or ask for code to be run.
    """
    file = _weights_file(path)
    return Checkpoint(path, _sharded(file) if file.suffix == ".json" else _single(file))


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise WeightsError(f"no weights at {path}: no such file or folder", "check the path")
    names = sorted(entry.name for entry in path.iterdir())
    chosen = choose_weights(names)
    if chosen is None:
        raise WeightsError(
            f"no weights in {path}: it holds {listed_names(names) or 'nothing'}",
            f"one of these is needed: {', '.join(WEIGHT_FILES)}; or give the file itself",
        )
    return path / chosen


def _sharded(index: Path) -> dict[str, Tensor]:
    try:
        shard_of: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(shard_of.values()))
        inside = all(Path(name).name == name for name in names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__} {str(error)[:200]}"
        raise WeightsError(f"{index} is not an index of weights: {reason}", FETCH_AGAIN) from error
    if not inside:
        raise WeightsError(f"{index} names files outside its folder", "do not use this file")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(names)} files that {index} names are missing: "
            f"{listed_names(missing)}",
            "the download is incomplete: fetch these files",
        )
    shards = {name: _single(index.parent / name) for name in names}
    absent = [key for key, name in shard_of.items() if key not in shards[name]]
    if absent:
        raise WeightsError(
            f"{index} promises tensors that its files lack: {listed_names(absent)}",
            "index and files are of different versions: fetch them all again",
        )
    return {key: shards[name][key] for key, name in shard_of.items()}


def _single(file: Path) -> dict[str, Tensor]:
    """Every tensor of one file, as views of its mapping."""
    with reading(file):
        with file.open("rb") as stream:
            start = stream.read(16)
        if start.startswith(b"version https://"):
            raise WeightsError(
                f"{file} is a Git LFS pointer, not the weights it stands for",
                "run `git lfs pull` in its folder, or fetch it with `hf download`",
            )
        return _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)


def _safetensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="numpy"):
        pass  # the library has checked the header: sizes, dtypes, nothing overlapping or beyond
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        mapped = map_file(stream)
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], entry["shape"]
        if len(shape) > MOST_AXES:
            raise ValueError(f"{key} has {len(shape)} axes")
        start, size = 8 + length + entry["data_offsets"][0], math.prod(shape)
        empty = torch.empty(0, dtype=dtype)  # frombuffer takes no empty ones
        values = torch.frombuffer(mapped, dtype=dtype, count=size, offset=start) if size else empty
        tensors[key] = values.view(shape)
    return tensors


def _pickled(file: Path) -> dict[str, Tensor]:
    archive = open_archive(file)
    found = archive.content if isinstance(archive.content, dict) else {}
    for value in found.values():
        if isinstance(value, StandIn):
            raise WeightsError(
                f"refused {file}: it asks for {value.name}, which is code and not weights; "
                "nothing ran",
                "use the model's safetensors files, or a state dict of plain tensors",
            )
    stored = {key: value for key, value in found.items() if isinstance(value, Stored)}
    if not stored:
        raise WeightsError(
            f"{file} holds no tensors by name, but: {listed_names([str(key) for key in found])}",
            "a state dict is needed: names and tensors, nothing around them",
        )
    return {str(key): archive.tensor(str(key), value) for key, value in stored.items()}


def listed_names(names: Sequence[str]) -> str:
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
