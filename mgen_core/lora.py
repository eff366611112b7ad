"""A fine-tuned backbone as a checkpoint: the weights of its base, and what fine-tuning changed.

The file of a fine-tuned model holds all of the backbone, a part of it, or nothing. LoRA adds to a
matrix the product of two thin ones: the sum is computed when the tensor is asked for, and the
model itself knows nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint, SeededCheckpoint, TensorInfo, listed_names
from .errors import WeightsError
from .lightning import Lightning

ENCODER = "backbone.encoder."
DECODER = "backbone.decoder."
ADAPTER = "adapter."
SCALER = "scaler."
UNUSED = ("loss.weight",)  # of classes, in training

PEFT = "base_model.model."  # what PEFT puts before all names of a model that it wraps
# Beside a module that it adapts are two thin matrices, and the module is called base_layer.
THIN = re.compile(r"(.+)\.lora_(?:([AB])\.default\.weight|(embedding_[AB])\.default)")
TWINS = {"A": "B", "B": "A", "embedding_A": "embedding_B", "embedding_B": "embedding_A"}
OTHER_LORA = re.compile(r"(.*\.)?lora_.*")
# A module that was trained as a whole is there twice, or only as trained.
SAVED = re.compile(r"(.+)\.(modules_to_save\.default|original_module)\.(.+)")

ADDED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
BLOCK = 2**18  # numbers of a sum that are computed at a time
OTHER_CONFIG = "config and checkpoint are of two trainings: give those of one"
OTHER_MODEL = "the file is of another model, or of another version of it"


@dataclass(frozen=True)
class Lora:
    """The settings of the training that say what a product is multiplied by.

    `targets` and `saved` are names of modules, as PEFT matches them by their ends: those that have
    a product, and those that were trained as a whole. Where `targets` is empty, nobody knows.
    """

    r: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.r < 1:
            raise WeightsError(f"LoRA of rank {self.r}", "lora_r in the config is 1 or more")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class Heads(NamedTuple):
    """What the file of a fine-tuned model holds beside the backbone.

    - `adapter`: the head, under its own names.
    - `scaler`: mean and standard deviation of the labels, of a task that keeps them.
    """

    adapter: Checkpoint
    scaler: tuple[Tensor, Tensor] | None


class FineTuned(Checkpoint):
    """The backbone of a fine-tuned model, under the names of its base.

    The base is needed where the file holds only what was changed. Where it holds all, the base is
    not looked at, and names are those of the encoder itself. A base drawn from a seed is none: the
    training drew other numbers. `lora` is given where the training used it.

    A sum is computed in float32 and rounded once, to the widest dtype that goes into it. So a sum
    over a base in bfloat16 is float32, as it was in training.

    Raises `WeightsError` naming what is missing, unexpected or of another shape, before anything
    is read.
    """

    def __init__(self, tuned: Lightning, base: Checkpoint | None, lora: Lora | None) -> None:
        super().__init__(tuned.path, {})
        self._parts = _parts(tuned)
        changes = _Changes(tuned.path, self._parts[ENCODER])
        self._base = _base_of(tuned.path, changes, base)
        sums = _sums_of(tuned.path, changes, lora)
        before = "" if self._base is None else _prefix(changes.names, self._base.keys)
        own = {before + name: tensor for name, tensor in changes.own.items()}
        self._own = Checkpoint(tuned.path, own)
        self._sums = {before + name: added for name, added in sums.items()}
        known = self._own.keys if self._base is None else self._base.keys
        self.keys = {**known, **self._own.keys}
        unexpected = [key for key in (*own, *self._sums) if key not in known]
        missing: list[str] = []
        if lora is not None and lora.targets:
            inside = [key for key in known if key.startswith(before) and key.endswith(".weight")]
            missing += _unchanged(inside, lora.targets, {*self._sums, *own})
            missing += _unchanged(inside, lora.saved, own)
            unexpected += [key for key in self._sums if not _is_in(key, lora.targets)]
        misfits = [
            f"{key} {self.keys[key].shape} with LoRA {added}"
            for key, added in self._sums.items()
            if key in known and not added.fits(self.keys[key])
        ]
        over = f" over {self._base.path}" if self._base is not None else ""
        _refuse(f"{tuned.path}{over}", missing, unexpected, misfits)
        self.keys |= {key: added.info(self.keys[key]) for key, added in self._sums.items()}

    def tensor(self, key: str) -> Tensor:
        """The tensor on the CPU: a view of a mapped file, or a sum computed anew."""
        if key not in self._sums:
            return self._source(key).tensor(key)
        shape = self.keys[key].shape
        return self.flat(key, 0, math.prod(shape)).reshape(shape)

    def flat(self, key: str, start: int, stop: int) -> Tensor:
        """Elements start..stop of the flattened tensor; of a sum, only the rows around them."""
        if key not in self._sums:
            return self._source(key).flat(key, start, stop)
        dtype, added = self.keys[key].dtype, self._sums[key]
        found = torch.empty(stop - start, dtype=dtype)
        for first, last in self._blocks(key, start, stop):
            block = added.rows(self._source(key).flat(key, first, last), first, dtype)
            low, high = max(start, first), min(stop, last)
            found[low - start : high - start] = block[low - first : high - first]
        return found

    def _blocks(self, key: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Blocks of whole rows that cover start..stop.

        They are the same wherever it starts: a slice has the very bits of the whole, though
        products of other shapes may round otherwise.
        """
        rows, columns = self.keys[key].shape
        size = max(1, BLOCK // columns) * columns
        for first in range(start // size * size, stop, size):
            yield first, min(first + size, rows * columns)

    def _source(self, key: str) -> Checkpoint:
        return self._own if self._base is None or key in self._own.keys else self._base

    def digest(self) -> str:
        """SHA-256 over the base, what was changed of it, and the scale of LoRA.

        The digest of the base where nothing was changed. Heads are not in it.
        """
        base = None if self._base is None else self._base.digest()
        changed = self._parts[ENCODER]
        if base is not None and not changed:
            return base
        scales = sorted({added.lora.scale for added in self._sums.values()})
        seen = [base, Checkpoint(None, changed).digest(), scales]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def heads(self) -> Heads:
        """The head, and the scaler of the labels.

        Raises `WeightsError` where a head is stored twice and differs.
        """
        adapter, scaler = self._parts[ADAPTER], self._parts[SCALER]
        differ = [
            DECODER + name
            for name, tensor in self._parts[DECODER].items()
            if name not in adapter or not torch.equal(tensor, adapter[name])
        ]
        if differ:
            raise WeightsError(
                f"{self.path} holds two heads: {listed_names(differ)} differ from {ADAPTER}*",
                "which one is meant cannot be told: save the model again",
            )
        both = (scaler["_mean"], scaler["_std"]) if scaler else None
        return Heads(Checkpoint(self.path, adapter), both)


def holds_backbone(tuned: Lightning) -> bool:
    """Whether the file has all of the backbone, so that the base is not needed."""
    return _Changes(tuned.path, _parts(tuned)[ENCODER]).complete


# --------------------------------------------------------------------------- reading the names


def _parts(tuned: Lightning) -> dict[str, dict[str, Tensor]]:
    """The tensors of each part of the model, by its prefix, under names without it."""
    parts: dict[str, dict[str, Tensor]] = {ENCODER: {}, DECODER: {}, ADAPTER: {}, SCALER: {}}
    unexpected = []
    for key, tensor in tuned.state.items():
        prefix = next((prefix for prefix in parts if key.startswith(prefix)), None)
        if prefix is not None:
            parts[prefix][key.removeprefix(prefix)] = tensor
        elif key not in UNUSED:
            unexpected.append(key)
    scaler = {"_mean", "_std"} if parts[SCALER] else set()
    unexpected += [SCALER + name for name in parts[SCALER] if name not in scaler]
    missing = [SCALER + name for name in sorted(scaler) if name not in parts[SCALER]]
    _refuse(tuned.path, missing, unexpected, [])
    return parts


class _Changes:
    """What the file holds of the encoder, by the encoder's own names.

    - `own`: whole tensors.
    - `thin`: the thin matrices that are added to a weight, by their kind.
    - `complete`: the encoder is there, not only what was trained. Biases alone are none: they may
      have been trained beside LoRA.
    """

    def __init__(self, path: Path, encoder: Mapping[str, Tensor]) -> None:
        self.own: dict[str, Tensor] = {}
        self.thin: dict[str, dict[str, Tensor]] = {}
        self.complete = False
        self._replaced: dict[str, str] = {}
        self._unknown: list[str] = []
        self._unexpected: list[str] = []
        wrapped = any(name.startswith(PEFT) for name in encoder)
        for name, tensor in encoder.items():
            if wrapped:
                self._take(name, tensor)
            else:
                self.own[name], self.complete = tensor, True
        self._check(path)

    @property
    def names(self) -> list[str]:
        return [*self.own, *self.thin]

    def _take(self, full: str, tensor: Tensor) -> None:
        """Put a tensor of a model that PEFT wrapped in its place."""
        name = full.removeprefix(PEFT)
        if name == full:
            self._unexpected.append(full)
        elif thin := THIN.fullmatch(name):
            self.thin.setdefault(f"{thin[1]}.weight", {})[thin[2] or thin[3]] = tensor
        elif OTHER_LORA.fullmatch(name):
            self._unknown.append(name)
        elif (saved := SAVED.fullmatch(name)) and saved[2] == "original_module":
            self._replaced[f"{saved[1]}.{saved[3]}"] = name
        elif saved:
            self._put(f"{saved[1]}.{saved[3]}", name, tensor)
        else:
            self.complete |= not name.endswith(".bias")
            self._put(name.replace(".base_layer.", "."), name, tensor)

    def _put(self, place: str, name: str, tensor: Tensor) -> None:
        if place in self.own:
            self._unexpected.append(name)
        self.own[place] = tensor

    def _check(self, path: Path) -> None:
        if self._unknown:
            raise WeightsError(
                f"{path} holds LoRA of a kind that is not supported: {listed_names(self._unknown)}",
                "merge it into the weights where it was trained, and save the model again",
            )
        missing, unexpected = [], list(self._unexpected)
        unexpected += [name for place, name in self._replaced.items() if place not in self.own]
        for weight, thin in self.thin.items():
            beside = f"{weight.removesuffix('.weight')}.lora_"
            missing += [f"{beside}{TWINS[kind]}" for kind in thin if TWINS[kind] not in thin]
            unexpected += [f"{beside}{kind}" for kind in list(thin)[2:]]
        _refuse(path, missing, unexpected, [])


# --------------------------------------------------------------------------- base and settings


def _base_of(path: Path, changes: _Changes, base: Checkpoint | None) -> Checkpoint | None:
    """The base, where it is needed."""
    if changes.complete:
        return None
    drawn = isinstance(base, SeededCheckpoint) and bool(base.keys)
    if drawn or (base is None and changes.names):
        held = listed_names(changes.names) or "nothing of it"
        what = f"{path} does not hold the backbone, but what was trained of it: {held}"
        if drawn:
            raise WeightsError(
                f"{what}; the rest was drawn at random and not saved",
                "these weights are lost: train again with save_peft_only: false",
            )
        raise WeightsError(
            what,
            "give the config.yaml of its training, and the weights of the model that it changed "
            "(--weights FOLDER)",
        )
    return None if isinstance(base, SeededCheckpoint) else base


def _prefix(names: Sequence[str], keys: Mapping[str, object]) -> str:
    """What the base puts before the names of the encoder."""
    found: set[str] = set()
    for name in names:
        if found := {key.removesuffix(name) for key in keys if f".{key}".endswith(f".{name}")}:
            break
    return max(
        sorted(found, key=len),
        key=lambda before: sum(before + name in keys for name in names),
        default="",
    )


def _is_in(weight: str, modules: Sequence[str]) -> bool:
    module = weight.removesuffix(".weight")
    return any(f".{module}".endswith(f".{name}") for name in modules)


def _unchanged(
    weights: Sequence[str], modules: Sequence[str], changed: Container[str]
) -> list[str]:
    """The weights of these modules of an encoder that were to be changed and are not."""
    # The head of a published model is no part of what is adapted.
    return [
        f"what was trained of {weight}"
        for weight in weights
        if not weight.startswith("cls.") and _is_in(weight, modules) and weight not in changed
    ]


def _sums_of(path: Path, changes: _Changes, lora: Lora | None) -> dict[str, _Sum]:
    """What LoRA adds, by the encoder's own names."""
    if lora is None and changes.thin:
        raise WeightsError(
            f"{path} holds LoRA matrices, and it is not known what they are multiplied by",
            "lora_r and lora_alpha of the training are needed: they are in its config",
        )
    if lora is not None and not changes.thin:
        raise WeightsError(f"{path} holds no LoRA, but its config says that it does", OTHER_CONFIG)
    return {name: _sum(thin, lora) for name, thin in changes.thin.items() if lora is not None}


def _refuse(
    what: object, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]
) -> None:
    """Raise, where a list has anything in it."""
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    lists = [
        f"{len(names)} {kind} ({listed_names(names)})" for kind, names in kinds.items() if names
    ]
    if lists:
        raise WeightsError(f"{what}: tensors {'; '.join(lists)}", OTHER_MODEL)


# --------------------------------------------------------------------------- sums


class _Sum(NamedTuple):
    """A product of two thin matrices, which is added to a weight."""

    left: Tensor  # (rows, r)
    right: Tensor  # (r, columns)
    lora: Lora

    def __str__(self) -> str:
        return f"{tuple(self.left.shape)} x {tuple(self.right.shape)} of rank {self.lora.r}"

    def fits(self, weight: TensorInfo) -> bool:
        shapes = self.left.shape, self.right.shape
        dtypes = self.left.dtype, self.right.dtype, weight.dtype
        if len(weight.shape) != 2 or not math.prod(weight.shape):
            return False
        rows, columns = weight.shape
        return shapes == ((rows, self.lora.r), (self.lora.r, columns)) and set(dtypes) <= ADDED

    def info(self, weight: TensorInfo) -> TensorInfo:
        thin = torch.promote_types(self.left.dtype, self.right.dtype)
        return TensorInfo(torch.promote_types(thin, weight.dtype), weight.shape)

    def rows(self, weight: Tensor, start: int, dtype: torch.dtype) -> Tensor:
        """The flat rows of the weight that begin at element `start`, with the product added."""
        wide = torch.promote_types(dtype, torch.float32)
        right = self.right.to(wide)
        rows = weight.to(wide).view(-1, right.shape[1])
        first = start // right.shape[1]
        left = self.left[first : first + len(rows)].to(wide)
        return torch.addmm(rows, left, right, alpha=self.lora.scale).to(dtype).view(-1)


def _sum(thin: Mapping[str, Tensor], lora: Lora) -> _Sum:
    if "A" in thin:
        return _Sum(thin["B"], thin["A"], lora)
    # An embedding is adapted the other way round: its tokens are the columns of A.
    left, right = thin["embedding_A"], thin["embedding_B"]
    return _Sum(_turned(left), _turned(right), lora)


def _turned(matrix: Tensor) -> Tensor:
    return matrix.permute(*range(matrix.dim())[::-1])
