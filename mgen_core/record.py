"""`run.json`: what a run is, so that only its own continuation is let in."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from . import manifest as manifests
from . import spent, storage
from .config import RunConfig
from .errors import RunError
from .job import Job
from .join import LAUNCHER, LOCAL
from .manifest import Manifest
from .objects import ObjectPath
from .plan import PlanSettings, Survey

if TYPE_CHECKING:
    from .engine import Placement
    from .origin import Origin


def identify(
    job: Job, settings: PlanSettings, placement: Placement, origin: Origin
) -> dict[str, Any]:
    """What must be the same for the parts of two starts to be parts of one run."""
    config = job.config
    return {
        "task": config.task,
        "backbone": config.backbone,
        "input": job.table.digest(),
        "keep": list(job.table.kept),
        **origin.digests(job.backbone.card.seed),
        "options": job.options,
        "writer": config.writer,
        "dtype": config.dtype,
        "precision": placement.precision,
        "batch_tokens": settings.batch_tokens,
        "batch_rows": settings.batch_rows,
        "max_length": settings.max_tokens,
        "too_long": settings.too_long,
    }


def reopen(config: RunConfig, identity: dict[str, Any]) -> Manifest | None:
    """The run that the folder holds, if it is this very run; None when there is none.

    Raises `RunError` for a folder with another run, or with files that are not ours, or with a run
    whose parts were deleted after a merge.
    """
    folder = config.output
    storage.remove_temporaries(folder, manifests.WRITTEN)
    storage.make_durable(folder)  # from here on what its logs tell counts as done
    if config.overwrite:
        return None
    if not (folder / manifests.RECORD).exists():
        foreign = sorted(path.name for path in folder.iterdir() if not manifests.is_ours(path.name))
        if foreign:
            raise RunError(
                f"{folder} is not empty and holds no run ({', '.join(foreign[:3])})",
                "choose another --output",
            )
        return None
    begun = Manifest.open(folder)
    if changes := manifests.difference(begun.record["identity"], identity):
        raise _another_run(folder, changes)
    spent.check(begun, begun.missing(begun.done()))
    return begun


def _another_run(folder: Path, changes: Sequence[str]) -> RunError:
    return RunError(
        f"{folder} holds another run ({'; '.join(changes)})",
        "choose another --output, or --overwrite to start anew",
    )


def begun_with(config: RunConfig) -> dict[str, Any] | None:
    """The identity that an earlier start of this run recorded."""
    if config.overwrite or not (config.output / manifests.RECORD).exists():
        return None
    return dict(Manifest.open(config.output).record["identity"])


def record(
    job: Job,
    identity: dict[str, Any],
    plan: Survey,
    failures: IO[str],
    begun: Manifest | None,
) -> Manifest:
    """Write `run.json`, after which the run exists; one that was begun is only checked."""
    if begun is not None:
        # The same input may be planned otherwise by another version of a plugin.
        if begun.record["plan"]["digest"] != plan.digest:
            versions = manifests.difference(begun.record["versions"], _versions())
            raise _another_run(begun.folder, versions or ["its plan differs"])
        return begun
    folder = job.config.output
    for path in manifests.ours(folder):  # with --overwrite; nothing counts without the record
        if path.name != manifests.LOCK:
            storage.remove(path)
    storage.make_folder(folder / "done")
    storage.make_folder(folder / "failed")
    failures.seek(0)
    set_aside = storage.write_atomic(
        folder / manifests.PLAN_FAILURES, partial(manifests.write_lines, failures)
    )
    described = manifests.sealed(_record(job, identity, plan, set_aside.sha256))
    text = json.dumps(described, indent=1, ensure_ascii=False)
    storage.write_text(folder / manifests.RECORD, text + "\n")
    return Manifest.open(folder)


def _record(
    job: Job, identity: dict[str, Any], plan: Survey, failures_sha256: str
) -> dict[str, Any]:
    weights = job.backbone.options.weights
    return {
        "format": manifests.FORMAT,
        "identity": identity,
        "command": _command(),
        "directory": os.getcwd(),
        "config": {key: _plain(value) for key, value in asdict(job.config).items()},
        "input": {"x_col": job.table.x_col, "id_col": job.table.id_col},
        "weights": str(weights or f"drawn from seed {job.backbone.card.seed}"),
        "versions": _versions(),
        "plan": {
            "rows": plan.rows,
            "failed": plan.failed,
            "failures_sha256": failures_sha256,
            "distinct": plan.distinct,
            "batches": plan.batches,
            "tokens": plan.tokens,
            "computed": plan.computed,
            "digest": plan.digest,
            "windows": plan.windows,
        },
    }


def _command() -> list[str]:
    """What was typed, as it can be typed again; a notebook's own name says where to look."""
    program = Path(sys.argv[0])
    if os.environ.get(LAUNCHER) == LOCAL:  # mgen has started this rank itself
        return ["mgen", *sys.argv[1:]]
    if program.name == "__main__.py":
        return ["python", "-m", program.parent.name, *sys.argv[1:]]
    return [program.name, *sys.argv[1:]]


def _versions() -> dict[str, str]:
    names = {"mgen", "torch", "transformers", "pyarrow"}
    names |= {p.dist.name for p in importlib.metadata.entry_points(group="mgen") if p.dist}
    found = {}
    for name in sorted(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, (Path, ObjectPath)) else value
