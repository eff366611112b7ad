"""The trainer's arguments and callbacks in our own terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MgenError
from ..objects import place
from . import classes
from .classes import WRITER, choices, own_name
from .merging import Block

FILETYPES = ("pt", "tsv")

PRECISIONS = {
    **dict.fromkeys(("32-true", "32", "64-true", "64"), "fp32"),
    **dict.fromkeys(("16-mixed", "16-true", "16"), "fp32"),
    **dict.fromkeys(("transformer-engine", "transformer-engine-float16"), "fp32"),
    **dict.fromkeys(("bf16-mixed", "bf16-true", "bf16"), "bf16"),
}

# Whether each rank has the whole model, come what may.
STRATEGIES = {"auto": False, "ddp": True, "fsdp": False, "deepspeed": False, "single": False}


def find_writer(callbacks: Sequence[Block], notes: list[str]) -> dict[str, Any]:
    """The arguments of the PredictionWriter; {} without one."""
    found = [one for one in callbacks if own_name(one.path) == WRITER]
    if len(found) > 1:
        notes.append(f"{len(found)} PredictionWriters: only the last one counts")
    return dict(found[-1].args) if found else {}


def output_of(writer: Mapping[str, Any]) -> dict[str, Any]:
    """`output` and `writer`."""
    form = writer.get("filetype")
    if form not in (None, *FILETYPES):
        raise MgenError(f"PredictionWriter has no filetype {form!r}", choices(str(form), FILETYPES))
    folder = writer.get("output_dir")
    return {"output": place(str(folder)) if folder else None, "writer": form}


def training_callbacks(callbacks: Sequence[Block]) -> list[str]:
    """Callbacks of training. Raises `MgenError` for one that we do not know."""
    found = []
    for one in callbacks:
        name = own_name(one.path)
        if name == WRITER:
            continue
        if name is not None and name not in classes.LIGHTNING_CALLBACKS:
            hint = choices(name, classes.CALLBACKS)
            raise MgenError(f"no callback {one.path!r}", f"{hint}; those of Lightning are ignored")
        found.append(f"trainer.callbacks.{one.name}")
    return found


def trainer_values(trainer: Mapping[str, Any], batch_size: int, notes: list[str]) -> dict[str, Any]:
    """`precision`, `devices`, `num_nodes`, `strategy` and `limit`."""
    if trainer.get("accelerator") == "cpu":
        notes.append(
            "accelerator cpu: a GPU is used where there is one (CUDA_VISIBLE_DEVICES= hides it)"
        )
    devices = _devices(trainer.get("devices"))
    nodes = int(trainer.get("num_nodes") or 1)
    return {
        "precision": _precision(trainer.get("precision"), notes),
        "devices": devices,
        "num_nodes": nodes if nodes > 1 else None,
        "strategy": _strategy(trainer.get("strategy"), notes),
        "limit": _limit(trainer, batch_size * (devices or 1) * nodes),
    }


def _precision(given: Any, notes: list[str]) -> str:
    name = "32-true" if given is None else str(given)
    if name not in PRECISIONS:
        raise MgenError(f"no precision {name!r}", choices(name, PRECISIONS))
    if name.startswith(("16", "64", "transformer-engine")):
        notes.append(f"precision {name}: computed in 32-true")
    return PRECISIONS[name]


def _devices(given: Any) -> int | None:
    if isinstance(given, str) and "," in given:
        given = [one for one in given.split(",") if one]
    if isinstance(given, (list, tuple)):
        return len(given)
    if given in (None, "auto", -1, "-1"):
        return None
    try:
        return int(given)
    except (TypeError, ValueError) as error:
        raise MgenError(f"trainer.devices is {given!r}", "give a number, or auto") from error


def _strategy(given: Any, notes: list[str]) -> str | None:
    path = str(given.get("class_path") if isinstance(given, Mapping) else given or "auto")
    name = path.rpartition(".")[2].removesuffix("Strategy").lower()
    kind = next((kind for kind in STRATEGIES if kind in name), None)  # fsdp of any make
    if kind is None:
        raise MgenError(f"no strategy {path!r}", choices(name, STRATEGIES))
    if STRATEGIES[kind]:
        return "replicate"
    if kind in ("fsdp", "deepspeed"):
        notes.append(f"{path}: shards where the model needs it (--strategy zero3: always)")
    return None


def _limit(trainer: Mapping[str, Any], rows: int) -> int | None:
    """Rows of so many batches, where the trainer stops early."""
    fast, limit = trainer.get("fast_dev_run"), trainer.get("limit_predict_batches")
    batches = int(fast) if fast else limit
    if batches is None or (batches == 1 and isinstance(batches, float)):
        return None
    if not isinstance(batches, int) or batches < 1:
        raise MgenError(
            f"limit_predict_batches {batches} is not supported", "use --limit N, which counts rows"
        )
    return int(batches) * rows
