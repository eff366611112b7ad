"""Where a model's numbers come from: published weights, a seed, a fine-tuned model's file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint
from .errors import WeightsError
from .lightning import open_lightning
from .lora import FineTuned, Lora

LORA = {"r", "alpha", "rslora", "target_modules", "modules_to_save"}
LANGUAGE = "predictions."


class Origin(NamedTuple):
    """The checkpoints of a run, opened and not read.

    - `backbone`: None for a model whose parameters are drawn from its card's seed.
    - `head`: of the task; None where nothing was fine-tuned.
    """

    backbone: Checkpoint | None
    head: Checkpoint | None = None

    def digests(self, seed: int) -> dict[str, Any]:
        """What tells these numbers from others; of a seed, the seed."""
        told: dict[str, Any] = {"weights": self.backbone.digest() if self.backbone else seed}
        return {**told, "head": self.head.digest()} if self.head is not None else told


def find_origin(weights: Path | None, ckpt: Path | None, lora: Mapping[str, Any] | None) -> Origin:
    """Open what was given; raises `WeightsError` for what cannot be read or does not fit."""
    base = open_checkpoint(weights) if weights is not None else None
    if ckpt is None:
        return Origin(base)
    tuned = FineTuned(open_lightning(ckpt), base, make_lora(lora))
    adapter, scaler = tuned.heads()
    tensors = {key: adapter.tensor(key) for key in adapter.keys}
    # A masked-language head that was trained on takes the place of the published one.
    spoken = {f"cls.{key}": tensors.pop(key) for key in list(tensors) if key.startswith(LANGUAGE)}
    if scaler is not None:
        tensors |= {"scaler._mean": scaler[0], "scaler._std": scaler[1]}
    backbone: Checkpoint | None = tuned if tuned.keys else base
    if spoken and backbone is not None:
        backbone = Layered(Checkpoint(ckpt, spoken), backbone)
    return Origin(backbone, Checkpoint(ckpt, tensors))


class Layered(Checkpoint):
    """A checkpoint over another: what both hold is that of the upper one."""

    def __init__(self, upper: Checkpoint, lower: Checkpoint) -> None:
        super().__init__(upper.path, {})
        self.keys = {**lower.keys, **upper.keys}
        self._layers = upper, lower

    def tensor(self, key: str) -> Tensor:
        return self._of(key).tensor(key)

    def flat(self, key: str, start: int, stop: int) -> Tensor:
        return self._of(key).flat(key, start, stop)

    def digest(self) -> str:
        both = [layer.digest() for layer in self._layers]
        return hashlib.sha256(json.dumps(both).encode()).hexdigest()

    def _of(self, key: str) -> Checkpoint:
        upper, lower = self._layers
        return upper if key in upper.keys else lower


def make_lora(settings: Mapping[str, Any] | None) -> Lora | None:
    """The settings of LoRA as a config names them."""
    if settings is None:
        return None
    if settings.keys() - LORA or not {"r", "alpha"} <= settings.keys():
        raise WeightsError(
            f"lora has {', '.join(sorted(settings)) or 'nothing'}",
            "give r and alpha, and rslora, target_modules and modules_to_save where they were used",
        )
    return Lora(
        r=int(settings["r"]),
        alpha=float(settings["alpha"]),
        rslora=bool(settings.get("rslora", False)),
        targets=tuple(settings.get("target_modules") or ()),
        saved=tuple(settings.get("modules_to_save") or ()),
    )
