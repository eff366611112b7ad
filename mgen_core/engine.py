"""The model on a device: weights in, one batch at a time through, columns off the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .api import Activations, Backbone, Column, Columns, Inputs, Ragged, Row, Task, TaskCard
from .checkpoint import Checkpoint, seeded_checkpoint
from .columns import HostColumn
from .config import Precision, StoredDtype
from .errors import PluginError, WeightsError
from .origin import Origin
from .turns import OutOfMemory, Turn
from .weights import fill, parameters_on_meta

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Placement:
    """Where the model runs and in which precision."""

    device: torch.device
    precision: Precision

    @property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic."""
        return PRECISIONS[self.precision]

    @property
    def on_cpu(self) -> bool:
        """Whether no device has memory of its own."""
        return self.device.type == "cpu"

    def __str__(self) -> str:
        return f"{self.precision} on {self.device}"


def place(precision: Precision, local_rank: int = 0) -> Placement:
    """The rank's CUDA device if there is one, else the CPU; `auto` is bf16 where a GPU has it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if fast else "fp32"
    return Placement(device, precision)


class Engine:
    """The model and the task on their device. Subclasses say how the weights lie and are used."""

    module: nn.Module

    def __init__(
        self, backbone: Backbone, task: Task, placement: Placement, origin: Origin
    ) -> None:
        self.backbone = backbone
        self.task = task
        self.placement = placement
        backbone.want = task.needs
        with parameters_on_meta():
            self.module = backbone.build()
            head = task.build()
        self.parameters = sum(parameter.numel() for parameter in self.module.parameters())
        if origin.backbone is None and origin.head is not None and self.parameters:
            raise WeightsError(
                f"{origin.head.path} holds no backbone, and {backbone.card.name} has no published "
                "weights: it was trained on numbers that were drawn and not saved",
                "these weights are lost: train again with save_peft_only: false",
            )
        self.checkpoint = origin.backbone or seeded_checkpoint(self.module, backbone.card.seed)
        self.load()
        if head is not None:
            self._fill_head(head, origin.head)

    def load(self) -> None:
        """Give the module its weights."""
        raise NotImplementedError

    def _fill_head(self, head: nn.Module, checkpoint: Checkpoint | None) -> None:
        """The task's own module, whole on every rank: it is small."""
        if checkpoint is None:
            raise WeightsError(
                f"task {self.task.card.name} has a head, which only a fine-tuned model holds",
                "give --ckpt model.ckpt",
            )
        device, dtype = self.placement.device, self.placement.dtype
        fill(head, HeadNames(self.task.card), checkpoint, dtype=dtype, device=device)
        self.task.head = head

    def run(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        """One forward pass and the task's columns of it; `inputs` are on the device."""
        raise NotImplementedError

    def idle(self) -> None:
        """Take part in a pass of other ranks without rows of its own."""

    def agree(self, turn: Turn) -> Turn:
        """What this rank and those that it keeps step with come to."""
        return turn

    def forward(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        """One forward pass and the task's columns of it, on the device.

        Raises `OutOfMemory` when the device has not enough memory for it.
        """
        try:
            return self.run(rows, to_device(inputs, self.placement.device))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error holds the tensors that filled the memory.
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory

    def call(self, inputs: Inputs) -> Activations:
        """The backbone's forward pass; `inputs` are on the device."""
        return self.backbone.forward(self.module, inputs, self.task.needs)

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


class LocalEngine(Engine):
    """One process, one device, the whole model on it."""

    def load(self) -> None:
        dtype, device = self.placement.dtype, self.placement.device
        fill(self.module, self.backbone, self.checkpoint, dtype=dtype, device=device)

    def run(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        with torch.inference_mode():
            return self.task.columns(self.call(inputs), rows)


def is_out_of_memory(error: Exception) -> bool:
    """Whether PyTorch says that memory is used up."""
    # On the CPU it is a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@dataclass(frozen=True)
class HeadNames:
    """Names of a head's parameters are those of its checkpoint."""

    card: TaskCard
    ignored: tuple[str, ...] = ()
    keep_float32: tuple[str, ...] = ()

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        return (name,)


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


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor of the inputs on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
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
