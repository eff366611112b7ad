"""`mgen doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from . import options as o

if TYPE_CHECKING:
    from pathlib import Path

    from ..api import Backbone, BackboneCard
    from ..catalog import Catalog
    from ..engine import Placement
    from ..machine import Machine

Devices = Annotated[
    Optional[int],
    typer.Option(
        "--devices", metavar="N", min=1, help="Devices to plan for. Default: those of this machine."
    ),
]


def doctor(
    backbone: o.Backbone = None,
    weights: o.Weights = None,
    precision: o.PrecisionOption = None,
    devices: Devices = None,
    as_json: o.Json = False,
) -> None:
    """What this machine has; with --backbone, whether the model fits here, and how."""
    import json

    from ..catalog import discover
    from ..engine import place
    from ..machine import this_machine

    catalog = discover()
    placement = place(precision.value if precision else "auto")
    machine = this_machine(placement.device)
    found = about_machine(machine, catalog)
    lines = [*machine_lines(found)]
    if backbone is not None:
        model = about_model(catalog, backbone, weights, placement)
        ranks = sorted({1, devices or found["devices"]})
        model["plans"] = [plan(model, machine, number) for number in ranks]
        lines += model_lines(model)
        found["model"] = model | {"size": model["size"] and model["size"]._asdict()}
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    for label, text in lines:
        typer.echo(f"{label:<10} {text}")


# --------------------------------------------------------------------------- the machine


def about_machine(machine: Machine, catalog: Catalog) -> dict[str, Any]:
    """Versions, devices, memory, and plugins that do not work."""
    import os
    import platform

    import torch

    gpus = machine.device == "cuda"
    return {
        "mgen": _version("mgen"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": _version("deepspeed"),
        "device": torch.cuda.get_device_name() if gpus else "cpu",
        "devices": torch.cuda.device_count() if gpus else 1,
        "device_memory": machine.memory,
        "host_memory": machine.host_memory,
        # A container or batch system may give fewer than there are.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "broken_plugins": {p.distribution: p.problem for p in catalog.plugins if p.problem},
    }


def machine_lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The machine in words: label and text of each line."""
    from ..machine import amount

    yield "mgen", f"{found['mgen']}, Python {found['python']}, torch {found['torch']}"
    cores = f"{found['cores']} cores, " if found["cores"] else ""
    host = f"{cores}{amount(found['host_memory'])} of free memory"
    if found["device"] == "cpu":
        yield "device", f"cpu, {host}"
    else:
        memory = amount(found["device_memory"])
        yield "device", f"{found['devices']} x {found['device']}, {memory} free"
        yield "host", host
    yield "deepspeed", found["deepspeed"] or "not installed: pip install deepspeed"
    for distribution, problem in found["broken_plugins"].items():
        yield "broken", f"plugin {distribution}: {problem}"


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# --------------------------------------------------------------------------- the model


def about_model(
    catalog: Catalog, name: str, weights: str | None, placement: Placement
) -> dict[str, Any]:
    """The size of a model, as exactly as it can be told from what is here.

    Raises `MgenError` for a name or place that does not exist, or weights that do not fit.
    """
    from ..api import BackboneCard, Want
    from ..errors import WeightsError
    from ..footprint import weigh
    from ..hub import locate
    from ..job import AUTO_BATCH_TOKENS

    card = catalog.find(BackboneCard, name)
    path = locate(weights, card, None, download=False)
    found: dict[str, Any] = {
        "name": name,
        "precision": placement.precision,
        "weights": str(path) if path else None,
        "missing": "" if path else how_to_get(card, weights),
        "size": None,
    }
    try:
        backbone = _opened(card, path)
        # A row that is longer than the budget is a batch of its own.
        tokens = max(AUTO_BATCH_TOKENS[placement.device.type], backbone.card.max_tokens or 0)
        needs = Want(layers=(backbone.layer(-1),))
        size, batch = weigh(backbone, needs, placement.dtype, tokens)
    except WeightsError:
        if not found["missing"]:
            raise
        return found
    return found | {"size": size, "batch_tokens": tokens, "batch_bytes": batch}


def how_to_get(card: BackboneCard, weights: str | None) -> str:
    """What brings weights here that are not; nothing where none are needed."""
    place = weights or next(iter(card.weights), None)
    if place is None:
        return "yours to give: --weights FOLDER or a hub id" if card.weights_required else ""
    if place.startswith("package:"):
        return f"not here: pip install {place.removeprefix('package:').partition('/')[0]}"
    folder = place.rpartition("/")[2]
    return (
        f"not here: the first run fetches {place}; or, where the hub can be reached, "
        f"hf download {place} --local-dir {folder}, then --weights {folder}"
    )


def plan(model: dict[str, Any], machine: Machine, ranks: int) -> dict[str, Any]:
    """What `--strategy auto` would do on so many ranks of one host."""
    from ..errors import MgenError
    from ..strategy import choose, describe

    if model["size"] is None:
        return {"ranks": ranks, "fits": None, "why": "only the weights would tell its size"}
    try:
        chosen = choose(model["size"], model["batch_bytes"], machine, [""] * ranks)
    except MgenError as error:
        why = f"{ranks} rank{'s' * (ranks > 1)}: {error.what}; try: {error.hint}"
        return {"ranks": ranks, "fits": False, "why": why}
    return {
        "ranks": ranks,
        "fits": chosen.fits,
        "strategy": chosen.strategy,
        "offload": chosen.offload,
        "why": describe(chosen, ranks),
    }


def model_lines(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The model in words: label and text of each line."""
    from ..machine import amount

    size = model["size"]
    about = "of unknown size"
    if size is not None:
        about = f"{size.parameters:,} parameters, {amount(size.bytes)} in {model['precision']}"
    yield "model", f"{model['name']}: {about}{'' if size is None or size.exact else ', about'}"
    none = "random" if size and size.parameters else "none needed"
    yield "weights", model["weights"] or model["missing"] or none
    if size is not None:
        taken = amount(model["batch_bytes"])
        yield "batch", f"up to {model['batch_tokens']:,} tokens: at most about {taken}"
    labels = {True: "runs", False: "too large", None: "unknown"}
    for planned in model["plans"]:
        yield labels[planned["fits"]], planned["why"]


def _opened(card: BackboneCard, path: Path | None) -> Backbone:
    from dataclasses import replace

    from ..api import open_backbone
    from ..config import checked

    return open_backbone(card, replace(checked(card.options, {}), weights=path))
