"""DeepSpeed ZeRO-3 for inference: each rank holds a slice of every layer, and reads only that.

What is sharded are the matrices of the layers (`units_of`). A layer is gathered as a whole before
it runs, while the one before it computes. All else (embeddings, norms, heads, routers in float32)
is small, and whole on every rank.

DeepSpeed's usual ways in are not taken: `zero.Init` allocates and broadcasts every parameter to
fill it, which takes longer than reading the slices; `deepspeed.initialize` is made for training.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore  # type: ignore[attr-defined]

from .api import Activations, Backbone, Columns, Inputs, Row, Task
from .checkpoint import Checkpoint
from .config import Offload
from .engine import Engine, Placement, is_out_of_memory, watching
from .errors import MgenError, PluginError, RunError
from .origin import Origin
from .turns import Lost, OutOfMemory, Turn
from .units import units_of
from .weights import fill, is_kept_float32, swap
from .world import World

TIMEOUT = timedelta(minutes=10)
NOTHING = torch.empty(0)
M_MMAP_THRESHOLD = -3  # of malloc.h


# --------------------------------------------------------------------------- the ranks


def connect(store: Any, world: World, device: torch.device) -> None:
    """Open the connections between all ranks. Raises `RunError` when they cannot be had."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.local_size == world.size and sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever is set for the cluster
    try:
        dist.init_process_group(
            backend,
            store=PrefixStore("zero3", store or HashStore()),
            rank=world.rank,
            world_size=world.size,
            timeout=TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"the ranks cannot connect to each other: {first_line(error)}",
            "where a host has several networks, name the one to use: "
            "export GLOO_SOCKET_IFNAME=... NCCL_SOCKET_IFNAME=...",
        ) from error


def disconnect() -> None:
    """Close what `connect` opened."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if "RANK" not in os.environ:  # no launcher's: it would tell the next mgen of one
        os.environ.pop("LOCAL_RANK", None)


class Group:
    """The ranks that hold one copy of the model. A forward pass is one of all of them."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        rank = dist.get_rank()
        for ranks in groups:  # every rank takes part in the making of every group
            weights = dist.new_group(list(ranks), timeout=TIMEOUT)
            # Verdicts are numbers on the CPU: they are not to wait for a GPU's queue.
            verdicts = dist.new_group(list(ranks), timeout=TIMEOUT, backend="gloo")
            if rank in ranks:
                self.ranks, self.weights, self.verdicts = tuple(ranks), weights, verdicts
        self.size = len(self.ranks)
        self.place = self.ranks.index(rank)

    def agree(self, turn: Turn) -> Turn:
        """What the ranks come to: the largest of each number."""
        told = torch.tensor(turn, dtype=torch.int64)
        try:
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.verdicts)
        except RuntimeError as error:
            raise Lost(first_line(error)) from error
        return Turn(*told.tolist())


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


# --------------------------------------------------------------------------- the engine


class Zero3Engine(Engine):
    """The model over the devices of a group.

    `fillers` are rows, the first of which that works is what a rank computes without any left.
    """

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        placement: Placement,
        origin: Origin,
        group: Group,
        fillers: Sequence[Row],
        offload: Offload = "none",
    ) -> None:
        self.group = group
        self.fillers = fillers
        self.shards = Shards(group, placement.device, offload)
        super().__init__(backbone, task, placement, origin)

    def load(self) -> None:
        """Read this rank's slices of the layers and all of the rest."""
        units = units_of(self.module, self.backbone.units)
        sharded = shardable(self.module, units, self.backbone)
        if not sharded:
            raise MgenError(
                f"{self.backbone.card.name} has no layers that could be sharded",
                "use --strategy replicate, or have its plugin name them in `Backbone.units`",
            )

        def elsewhere(slot: nn.Parameter, keys: Sequence[str], dtype: torch.dtype) -> bool:
            if id(slot) not in sharded:
                return False
            self.shards.take(slot, keys, dtype, self.checkpoint)
            return True

        fill(
            self.module,
            self.backbone,
            self.checkpoint,
            dtype=self.placement.dtype,
            device=self.placement.device,
            elsewhere=elsewhere,
        )
        for unit in units:
            hide_whole_parameters(unit)
        self.guard = Guard(units)
        with torch.no_grad():
            self.filler = self._rehearse(self.fillers)
        self.layers = self.shards.hand_over(self.guard.order)

    def run(self, rows: Sequence[Row], inputs: Inputs) -> Columns:
        with torch.no_grad():
            with watching(self.backbone.card):
                activations = self._together(inputs)
            return self.columns(activations, rows)

    def idle(self) -> None:
        with torch.no_grad(), watching(self.backbone.card):
            self._within_memory(lambda: self._together(self.filler))

    def agree(self, turn: Turn) -> Turn:
        return self.group.agree(turn)

    def _together(self, inputs: Inputs) -> Activations:
        """One pass of the group. Raises what went wrong here, once the others are through."""
        activations = self.layers(lambda: self.guard.run(lambda: self.call(inputs)))
        if self.guard.error is not None:
            error, self.guard.error = self.guard.error, None
            try:
                raise error
            finally:
                del error  # whose traceback holds this frame, and with it the pass's tensors
        return cast(Activations, activations)

    def _rehearse(self, fillers: Sequence[Row]) -> Inputs:
        """Learn the order of the layers; gives the inputs that it could be learned with."""
        for row in fillers:
            try:
                inputs = self.collate([row])
                self.guard.rehearse(lambda: self.call(inputs))  # noqa: B023
            except Exception as error:
                failure = error  # the row's, or the model's
            else:
                return inputs
        raise PluginError(
            f"the order of the layers cannot be found: {first_line(failure)}",
            "this model cannot be sharded: use --strategy replicate",
        ) from failure


# --------------------------------------------------------------------------- slices


def shardable(module: nn.Module, units: Sequence[nn.Module], backbone: Backbone) -> set[int]:
    """Ids of the parameters to shard: matrices that belong to one unit alone.

    Vectors and what stays float32 are whole on every rank: they are small, and a gather is of
    one dtype.
    """
    owners: dict[int, list[nn.Module | None]] = {}
    inside = {id(part): unit for unit in units for part in unit.modules()}
    names = {id(p): name for name, p in module.named_parameters()}
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(inside.get(id(part)))
    return {
        id(parameter)
        for parameter in module.parameters()
        if parameter.dim() > 1
        and parameter.is_floating_point()
        and not is_kept_float32(names[id(parameter)], backbone)
        and len({id(owner) for owner in owners[id(parameter)]}) == 1
        and owners[id(parameter)][0] is not None
    }


def hide_whole_parameters(unit: nn.Module) -> None:
    """Make buffers of a unit's parameters that are not sharded: DeepSpeed takes no notice of them.

    Their dtype is their own, too; of parameters, DeepSpeed would make one of all.
    """
    for part in unit.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and not hasattr(parameter, "ds_id"):
                del part._parameters[name]
                part.register_buffer(name, parameter.data, persistent=False)


class Shards:
    """This rank's slices of the sharded parameters."""

    def __init__(self, group: Group, device: torch.device, offload: Offload) -> None:
        self.group = group
        self.device = device
        self.offload = offload
        self.deepspeed = start_deepspeed(device)
        return_memory()
        self.init = self.deepspeed.zero.Init(
            data_parallel_group=group.weights,
            dtype=torch.float32,
        )

    def take(
        self, slot: nn.Parameter, keys: Sequence[str], dtype: torch.dtype, checkpoint: Checkpoint
    ) -> None:
        """Make `slot` a partitioned parameter and read this rank's slice of it.

        Ranks hold equal slices of the flattened parameter; the last one may be padded.
        """
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
        from deepspeed.runtime.zero.partition_parameters import free_param

        shape, size = slot.shape, math.ceil(slot.numel() / self.group.size)
        start = self.group.place * size
        shard = self._slice(checkpoint, keys, start, size, dtype)
        # A tensor of the shape that takes no memory: what DeepSpeed wants to see.
        swap(slot, torch.empty((), dtype=dtype, device=self.device).expand(shape))
        self.init._convert_to_deepspeed_param(slot)
        shard.ds_numel = size  # type: ignore[attr-defined]
        shard.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
        shard.final_location = None  # type: ignore[attr-defined]
        slot.ds_tensor = shard  # type: ignore[attr-defined]
        slot.ds_numel_aligned = size * self.group.size  # type: ignore[attr-defined]
        free_param(slot)

    def _slice(
        self, checkpoint: Checkpoint, keys: Sequence[str], start: int, size: int, dtype: torch.dtype
    ) -> Tensor:
        """Numbers start..start+size of the tensors end to end, in `dtype`.

        On a CPU, and offloaded to disk, it is the mapped file where nothing has to be changed.
        """
        pieces, first = [], 0
        for key in keys:
            length = math.prod(checkpoint.keys[key].shape)
            low, high = max(start - first, 0), min(start + size - first, length)
            if low < high:
                pieces.append(checkpoint.flat(key, low, high))
            first += length
        whole = len(pieces) == 1 and len(pieces[0]) == size and pieces[0].dtype == dtype
        if whole and (self.device.type == "cpu" or self.offload == "nvme"):
            return pieces[0]
        shard = self._room(size, dtype)
        first = 0
        for piece in pieces:
            shard[first : first + len(piece)].copy_(piece)
            first += len(piece)
        return shard

    def _room(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory for a slice where shards lie, zero."""
        if self.offload == "none":
            return torch.zeros(size, dtype=dtype, device=self.device)
        if self.offload == "cpu":
            return torch.zeros(size, dtype=dtype, pin_memory=self.device.type == "cuda")
        # Where the file of the weights cannot be it: a file without a name, in TMPDIR.
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(size * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)

    def hand_over(self, order: Sequence[nn.Module]) -> Layers:
        """DeepSpeed's hooks on the units, which gather before and release after each."""
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        layers = Layers(order)
        for unit in layers.units:
            self.deepspeed.utils.set_z3_leaf_module(unit, True)
        largest = max(sum(numbers(p) for p in unit.parameters()) for unit in layers.units)
        with without_compiler():
            offload = DeepSpeedZeRoOffload(
                layers,
                timers=None,
                ds_config=None,
                # The next unit is gathered while one computes, no more.
                prefetch_bucket_size=largest,
                max_live_parameters=2 * largest,
                max_reuse_distance=0,
                param_persistence_threshold=0,
                dp_process_group=self.group.weights,
            )
        for hook in offload.backward_hooks:
            hook.remove()
        layers.eval()
        return layers


class Layers(nn.Module):
    """The units, and the forward pass of which they are part: the root that DeepSpeed knows."""

    def __init__(self, order: Sequence[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(dict.fromkeys(order))

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


def return_memory() -> None:
    """Make glibc return a gathered layer's memory to the system when it is released.

    It would keep it for later, in pieces that the next layer does not fit in: after a few passes
    a process held most of the model.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**22)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Marks of what is not to be compiled do nothing: for them, torch imports its compiler."""
    compiler, hidden = torch.compiler, cast(Any, torch)
    before = compiler.disable, hidden._disable_dynamo
    compiler.disable = hidden._disable_dynamo = lambda function: function  # type: ignore
    try:
        yield
    finally:
        compiler.disable, hidden._disable_dynamo = before


def start_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, imported and quiet, on the connections that are open."""
    # Both are read when it is imported.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        with without_compiler():
            import deepspeed
            import deepspeed.runtime.zero.parameter_offload
    except ImportError as error:
        raise MgenError(
            f"--strategy zero3 needs DeepSpeed: {first_line(error)}",
            "pip install 'deepspeed>=0.19' (Linux), or use --strategy replicate",
        ) from error
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Extensions, which are tried out by compiling them. Gathers need none.
    deepspeed.ops.__compatible_ops__ = {}
    # Compares the order of layers over all ranks: groups take their turns on their own, and
    # `Guard` compares it with the rehearsal.
    coordinator.assert_ints_same_as_other_ranks = lambda ints: None
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


# --------------------------------------------------------------------------- keeping step


class Guard:
    """Sees to it that a pass gathers every unit in order, whatever goes wrong in it.

    A rank that left a pass early would leave the others waiting, or worse, give them slices of
    one layer for those of another. So what a unit raises is kept until the pass is over, and
    units that it did not come to are gathered and released without being computed.
    """

    def __init__(self, units: Sequence[nn.Module]) -> None:
        self.order: list[nn.Module] = []
        self.seen: list[nn.Module] = []
        self.error: Exception | None = None
        self.rehearsing: Callable[[Any], Any] | None = None
        for unit in units:
            self._watch(unit)

    def rehearse(self, call: Callable[[], Any]) -> None:
        """Learn the order in which units run: a pass in which each hands on what it was given."""
        for handed_on in (lambda x: x, lambda x: (x,)):
            self.order, self.rehearsing = [], handed_on
            try:
                call()
            except Exception as error:
                failure = error
            else:
                break
            finally:
                self.rehearsing = None
        else:
            raise failure

    def run(self, call: Callable[[], Any]) -> Any:
        """The pass; None when there is an `error`."""
        self.seen, self.error, result = [], None, None
        try:
            result = call()
        except Exception as error:
            self.error = self.error or error
        if self.error is None and self.seen != self.order:
            self.error = PluginError(
                "the layers ran in another order than in the pass before",
                "this model cannot be sharded: use --strategy replicate",
            )
        if self.error is not None:
            with contextlib.suppress(Exception):  # where nobody is left to gather from
                for unit in self.order[len(self.seen) :]:
                    unit(NOTHING)
            if is_out_of_memory(self.error):
                self.error = OutOfMemory()  # the error itself holds what filled the memory
            return None
        return result

    def _watch(self, unit: nn.Module) -> None:
        forward = unit.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.rehearsing is not None:
                self.order.append(unit)
                return self.rehearsing(args[0] if args else next(iter(kwargs.values())))
            self.seen.append(unit)
            if self.error is None:
                try:
                    return forward(*args, **kwargs)
                except Exception as error:
                    self.error = error
            return NOTHING

        unit.forward = watched


def numbers(parameter: nn.Parameter) -> int:
    """Of the whole parameter, of which this rank has a slice."""
    return int(parameter.ds_numel)  # type: ignore[attr-defined]
