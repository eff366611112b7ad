"""A Lightning checkpoint: its tensors as views of the mapped file, its settings as plain values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .archive import Archive, open_archive, reading
from .checkpoint import listed_names
from .errors import WeightsError
from .pickled import StandIn, Storage, Stored, TooMuch

MOST_VALUES = 10**6  # in the settings
DEEPEST = 64

NO_CHECKPOINT = "a checkpoint that Lightning's trainer wrote is needed"
MAKE_ONE_FILE = "make one file of it: python -m lightning.pytorch.utilities.consolidate_checkpoint"


@dataclass(frozen=True)
class Lightning:
    """What a fine-tuned model's file says: `state_dict`, and the settings of the training."""

    path: Path
    state: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any]


def open_lightning(path: Path) -> Lightning:
    """Open a `.ckpt` without reading its tensors and without running anything in it.

    A model is found also in files that `torch.load(weights_only=True)` refuses, such as those with
    a data module in their settings. Raises `WeightsError` for what is no such file, is damaged, or
    was made to do harm.
    """
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.ckpt"))
        hint = f"give one of {listed_names(inside)}" if inside else f"{MAKE_ONE_FILE} {path}"
        raise WeightsError(f"{path} is a folder, not a checkpoint file", hint)
    archive = open_archive(path)
    with reading(path):
        found = archive.content if isinstance(archive.content, dict) else {}
        settings = found.get("hyper_parameters")
        plain = _plain(settings, 0, iter(range(MOST_VALUES))) if isinstance(settings, dict) else {}
        return Lightning(path, _state(path, found, archive), plain)


def _state(path: Path, found: Mapping[str, Any], archive: Archive) -> dict[str, Tensor]:
    stored = found.get("state_dict")
    if not isinstance(stored, dict):
        held = listed_names([str(key) for key in found])
        raise WeightsError(f"{path} has no state_dict, but: {held or 'nothing'}", NO_CHECKPOINT)
    foreign = [
        f"{key} ({value.name if isinstance(value, StandIn) else type(value).__name__})"
        for key, value in stored.items()
        if not isinstance(key, str) or not isinstance(value, Stored)
    ]
    if foreign:
        raise WeightsError(
            f"state_dict of {path} holds what is not a plain tensor: {listed_names(foreign)}",
            "only weights can be used: save the model without it",
        )
    return {key: archive.tensor(key, value) for key, value in stored.items()}


def _plain(value: object, depth: int, room: Iterator[int]) -> Any:
    """A copy of plain values. What the pickle says once may be in it a million times."""
    if depth > DEEPEST or next(room, None) is None:
        raise TooMuch(f"settings of more than {DEEPEST} levels or {MOST_VALUES} values")
    if isinstance(value, dict):
        return {key: _plain(inner, depth + 1, room) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(inner, depth + 1, room) for inner in value)
    return StandIn("torch.Tensor") if isinstance(value, (Stored, Storage)) else value
