"""The model on a device: weights in, one batch at a time through, columns off the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import Backbone, Column, Columns, Inputs, Ragged, Row, Task
from .checkpoint import Checkpoint, open_checkpoint, seeded_checkpoint
from .columns import HostColumn
from .config import Precision, StoredDtype
from .errors import PluginError, RunError
from .weights import fill, parameters_on_meta

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Where the model runs and in which precision."""

    device: torch.device
    precision: Precision

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}"


def place(precision: Precision) -> Placement:
    """The first CUDA device if there is one, else the CPU; `auto` is bf16 where a GPU has it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    return Placement(device, precision)


class LocalEngine:
    """One process, one device, the whole model on it."""

    def __init__(self, backbone: Backbone, task: Task, placement: Placement) -> None:
        self.backbone = backbone
        self.task = task
        self.placement = placement
        backbone.want = task.needs
        with parameters_on_meta():
            self.module: nn.Module = backbone.build()
        self.checkpoint = _checkpoint(backbone, self.module)
        fill(
            self.module,
            backbone,
            self.checkpoint,
            dtype=PRECISIONS[placement.precision],
            device=placement.device,
        )

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def forward(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        """One forward pass and the task's columns of it, on the device.

        Raises `RunError` when the device has not enough memory for it.
        """
        try:
            with torch.inference_mode():
                moved = _to_device(inputs, self.placement.device)
                activations = self.backbone.forward(self.module, moved, self.task.needs)
                return self.task.columns(activations, rows)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            longest = max(self.backbone.measure(row) for row in rows)
            raise RunError(
                f"out of memory on {self.placement.device} with {len(rows)} rows of up to "
                f"{longest:,} tokens",
                "start anew with --overwrite and a smaller --batch-tokens (or --max-length)",
            ) from error

    def collect(
        self, found: Sequence[Columns], counts: Sequence[int], stored: StoredDtype
    ) -> dict[str, HostColumn]:
        """The columns of a batch from those of its passes, on the CPU: one copy."""
        with torch.inference_mode():
            columns = self.task.gather(_joined(found), counts)
            host = {name: _to_host(column, STORED[stored]) for name, column in columns.items()}
        for name, column in host.items():
            if len(column) != len(counts):
                raise PluginError(
                    f"task {self.task.card.name}: column {name!r} has {len(column)} entries for "
                    f"{len(counts)} rows",
                    "this is a defect of the task plugin: report it to its author",
                )
        return host


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On the CPU it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _checkpoint(backbone: Backbone, module: nn.Module) -> Checkpoint:
    path: Path | None = backbone.options.weights
    if path is not None:
        return open_checkpoint(path)
    return seeded_checkpoint(module, backbone.card.seed)


def _joined(found: Sequence[Columns]) -> Columns:
    """The columns of several passes, end to end."""
    if len(found) == 1:
        return found[0]
    return {name: _end_to_end([columns[name] for columns in found]) for name in found[0]}


def _end_to_end(pieces: Sequence[Any]) -> Column:
    if isinstance(pieces[0], Ragged):
        lengths = [length for piece in pieces for length in piece.lengths]
        return Ragged(torch.cat([piece.values for piece in pieces]), lengths)
    if isinstance(pieces[0], Tensor):
        return torch.cat(list(pieces))
    return [value for piece in pieces for value in piece]


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value


def _to_host(column: Column, stored: torch.dtype) -> HostColumn:
    if isinstance(column, Ragged):
        host = _to_host(column.values, stored)
        lengths = torch.as_tensor(column.lengths, dtype=torch.int64).numpy()
        return HostColumn(host.values, lengths, host.bfloat16)
    if not isinstance(column, Tensor):
        return HostColumn(list(column))
    # Narrowed before it leaves the device: half the bytes to move. Integers stay as they are.
    if column.is_floating_point():
        column = column.to(stored)
    column = column.contiguous().cpu()
    if column.dtype == torch.bfloat16:
        return HostColumn(column.view(torch.uint16).numpy(), bfloat16=True)
    return HostColumn(column.numpy())
