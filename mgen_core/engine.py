"""The model on a device: weights in, one batch at a time through, columns off the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .api import (
    Activations,
    Backbone,
    BackboneCard,
    Column,
    Columns,
    Inputs,
    Ragged,
    Row,
    Task,
    TaskCard,
)
from .checkpoint import Checkpoint, seeded_checkpoint
from .columns import HostColumn
from .config import Precision, StoredDtype
from .dense import quicken
from .errors import MgenError, PluginError, RowError, RunError, WeightsError, defect, opening, told
from .origin import Origin
from .turns import OutOfMemory, Turn
from .weights import fill, parameters_on_meta

T = TypeVar("T")

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
            with opening(backbone.card):
                self.module = backbone.build()
            with opening(task.card):
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
        if placement.on_cpu and not backbone.plain:
            quicken(self.module)
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
        """One forward pass and the task's columns of it."""
        raise NotImplementedError

    def idle(self) -> None:
        """Take part in a pass of other ranks without rows of its own."""

    def agree(self, turn: Turn) -> Turn:
        """What this rank and those that it keeps step with come to."""
        return turn

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """What goes into a forward pass, on the CPU. Raises `RowError` and `OutOfMemory`."""

        def collate() -> Inputs:
            with watching(self.backbone.card):
                return self.backbone.collate(rows)

        return self._within_memory(collate)

    def forward(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        """One forward pass and the task's columns of it, on the device.

        Raises `RowError` when a plugin fails over it, and `OutOfMemory` when there is not enough.
        """
        return self._within_memory(lambda: self.run(rows, inputs))

    def _within_memory(self, work: Callable[[], T]) -> T:
        """What `work` gives. Raises `OutOfMemory`."""
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside the handler: the error holds the tensors that filled the memory.
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory

    def call(self, inputs: Inputs) -> Activations:
        """The backbone's forward pass."""
        moved = to_device(inputs, self.placement.device)
        return self.backbone.forward(self.module, moved, self.task.needs)

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """The task's columns of a pass. Raises `RowError` when the task fails over it."""
        with watching(self.task.card):
            return self.task.columns(activations, rows)

    def collect(
        self,
        found: Sequence[Columns],
        counts: Sequence[int],
        stored: StoredDtype,
        places: Sequence[int] | None = None,
    ) -> dict[str, HostColumn]:
        """The columns of a batch from those of its passes, on the CPU: one copy.

        `places` are the variants to use of all that were found, where not all are. Raises
        `RowError` when the task fails over them.
        """
        with torch.inference_mode(), watching(self.task.card):
            columns = joined(found, self.task.card)
            columns = self.task.gather(taken(columns, places), counts)
            host = {name: _to_host(column, STORED[stored]) for name, column in columns.items()}
        for name, column in host.items():
            if len(column) != len(counts):
                entries = f"{len(column)} entries for {len(counts)} rows"
                raise broken(self.task.card, f"column {name!r} has {entries}")
        return host


class LocalEngine(Engine):
    """One process, one device, the whole model on it."""

    def load(self) -> None:
        dtype, device = self.placement.dtype, self.placement.device
        fill(self.module, self.backbone, self.checkpoint, dtype=dtype, device=device)

    def run(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        with torch.inference_mode():
            with watching(self.backbone.card):
                activations = self.call(inputs)
            return self.columns(activations, rows)

    def finish(self) -> None:
        """Wait until the device has done all that it was given."""
        if not self.placement.on_cpu:
            torch.cuda.synchronize(self.placement.device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python or PyTorch says that memory is used up."""
    # On the CPU it is a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def watching(card: BackboneCard | TaskCard) -> Iterator[None]:
    """`blaming`, but for what is not about a row: memory, and a device that has failed.

    Raises `RunError` for the latter: until the process ends, it computes no other row either.
    """
    try:
        yield
    except (MgenError, RowError, OutOfMemory):
        raise
    except torch.AcceleratorError as error:
        raise RunError(
            f"the device has failed while {card.name} ran ({told(error)})",
            "start the same command again; if it fails again, hide the device from it with "
            "CUDA_VISIBLE_DEVICES= : on a CPU the row that does it is set aside",
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise defect(card, error) from error


@dataclass(frozen=True)
class HeadNames:
    """Names of a head's parameters are those of its checkpoint."""

    card: TaskCard
    ignored: tuple[str, ...] = ()
    keep_float32: tuple[str, ...] = ()

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        return (name,)


def _end_to_end(pieces: Sequence[Any]) -> Column:
    if isinstance(pieces[0], Ragged):
        lengths = [length for piece in pieces for length in piece.lengths]
        return Ragged(torch.cat([piece.values for piece in pieces]), lengths)
    if isinstance(pieces[0], Tensor):
        return torch.cat(list(pieces))
    return [value for piece in pieces for value in piece]


def joined(found: Sequence[Columns], card: TaskCard) -> Columns:
    """The columns of several passes, end to end."""
    if len(found) == 1:
        return found[0]
    if any(columns.keys() != found[0].keys() for columns in found):
        raise broken(card, "a pass has other columns than the one before")
    return {name: _end_to_end([columns[name] for columns in found]) for name in found[0]}


def broken(card: TaskCard, how: str) -> PluginError:
    """What to say of a task that breaks its contract."""
    return PluginError(
        f"task {card.name}: {how}", "this is a defect of the task plugin: report it to its author"
    )


def taken(columns: Columns, places: Sequence[int] | None) -> Columns:
    """The entries at these places, of each column; None: all."""
    if places is None:
        return columns
    return {name: _taken(column, places) for name, column in columns.items()}


def _taken(column: Column, places: Sequence[int]) -> Column:
    if isinstance(column, Tensor):
        return column[list(places)]
    if isinstance(column, Ragged):
        pieces = torch.split(column.values, list(column.lengths))
        lengths = [column.lengths[place] for place in places]
        return Ragged(torch.cat([column.values[:0], *(pieces[p] for p in places)]), lengths)
    return [column[place] for place in places]


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
