"""The walk of a run, top to bottom: plan, load, compute, commit.

Each function here is one stage; each takes what the one before it made. Killed at any moment,
the same command goes on with the batches that the done-logs do not hold.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from . import manifest as manifests
from . import storage
from .api import Columns, Inputs, Row, Rows, Writer
from .background import Behind, ahead
from .catalog import Catalog
from .columns import HostColumn, to_table
from .config import RunConfig
from .errors import InputError, MgenError, RunError, Stopped
from .job import AUTO_BATCH_TOKENS, Job, open_job
from .manifest import Done, Manifest
from .plan import Batch, Failure, PlanSettings, Survey, Work, survey
from .screen import Screen

if TYPE_CHECKING:
    import pyarrow as pa

    from .engine import LocalEngine, Placement

RANK = 0


class Pass(NamedTuple):
    """One forward pass of a batch, its rows collated."""

    batch: Batch
    work: Work
    rows: Sequence[Row]
    inputs: Inputs


class Computed(NamedTuple):
    """A batch whose columns are off the device, on the way to the disk."""

    batch: Batch
    columns: dict[str, HostColumn]
    seconds: float


@dataclass(frozen=True)
class Report:
    """How a run ended. `signal` is what stopped it, or None when it came to its end."""

    folder: Path
    rows: int
    done: int
    failed: int
    missing_batches: int
    signal: int | None = None


def run(config: RunConfig, catalog: Catalog, screen: Screen, *, rows: Rows | None = None) -> Report:
    """Run the config to its end, or as far as a signal lets it. Raises `MgenError`."""
    job = open_job(config, catalog, rows=rows)
    storage.make_folder(config.output)
    with storage.lock(config.output / manifests.LOCK), tidy(config.output), stoppable() as stop:
        placement, settings = settle(job)
        identity = identify(job, settings, placement)
        begun = reopen(config, identity)
        plan, failures = make_plan(job, settings, screen, stop)
        engine = load(job, placement, screen)
        manifest = record(job, identity, plan, failures, begun)
        compute(job, settings, engine, manifest, screen, stop)
    return report(manifest, stop)


def plan_only(
    config: RunConfig, catalog: Catalog, *, rows: Rows | None = None
) -> tuple[Job, Survey]:
    """The plan that a run would follow; needs no weights, writes nothing."""
    job = open_job(config, catalog, rows=rows, download=False)
    total = Survey()
    for item in survey(job.windows(settle(job)[1]), job.row_bytes):
        if isinstance(item, Survey):
            total = item
    return job, total


# --------------------------------------------------------------------------- before the walk


def settle(job: Job) -> tuple[Placement, PlanSettings]:
    """Decide what `auto` means here; a run that was begun keeps what it was begun with."""
    from .engine import place

    config, begun = job.config, _begun(job.config)
    precision = config.precision
    if begun and precision == "auto":
        precision = begun["precision"]
    placement = place(precision)
    tokens = config.batch_tokens
    if tokens is None:
        tokens = begun["batch_tokens"] if begun else AUTO_BATCH_TOKENS[placement.device.type]
    return placement, job.settings(tokens)


def identify(job: Job, settings: PlanSettings, placement: Placement) -> dict[str, Any]:
    """What must be the same for the parts of two starts to be parts of one run."""
    from .checkpoint import open_checkpoint

    config, weights = job.config, job.backbone.options.weights
    return {
        "task": config.task,
        "backbone": config.backbone,
        "input": job.table.digest(),
        "weights": open_checkpoint(weights).digest() if weights else job.backbone.card.seed,
        "options": {key: str(value) for key, value in sorted(config.options.items())},
        "writer": config.writer,
        "dtype": config.dtype,
        "precision": placement.precision,
        "batch_tokens": settings.batch_tokens,
        "max_length": settings.max_tokens,
        "too_long": settings.too_long,
    }


def reopen(config: RunConfig, identity: dict[str, Any]) -> Manifest | None:
    """The run that the folder holds, if it is this very run; None when there is none.

    Raises `RunError` for a folder with another run, or with files that are not ours.
    """
    folder = config.output
    if config.overwrite:
        return None
    if not (folder / manifests.RECORD).exists():
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in manifests.OURS)
        if foreign:
            raise RunError(
                f"{folder} is not empty and holds no run ({', '.join(foreign[:3])})",
                "choose another --output",
            )
        return None
    begun = Manifest.open(folder)
    if changes := manifests.difference(begun.record["identity"], identity):
        raise _another_run(folder, changes)
    return begun


def _another_run(folder: Path, changes: Sequence[str]) -> RunError:
    return RunError(
        f"{folder} holds another run ({'; '.join(changes)})",
        "choose another --output, or --overwrite to start anew",
    )


def _begun(config: RunConfig) -> dict[str, Any] | None:
    """The identity that an earlier start of this run recorded."""
    if config.overwrite or not (config.output / manifests.RECORD).exists():
        return None
    return dict(Manifest.open(config.output).record["identity"])


@contextlib.contextmanager
def tidy(folder: Path) -> Iterator[None]:
    """A run that fails before it has a record leaves nothing behind."""
    try:
        yield
    except BaseException:
        if not (folder / manifests.RECORD).exists():
            for name in manifests.OURS:
                storage.remove(folder / name)
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


class Stop:
    """Set by SIGTERM or Ctrl-C: finish the batch at hand, write what is computed, end."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        if self.signal is not None:  # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        """Raises `Stopped` when a signal came."""
        if self.signal is not None:
            raise Stopped(self.signal)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """Signals become a `Stop` in the main thread; elsewhere they are left alone."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, action in before.items():
            signal.signal(number, action)


# --------------------------------------------------------------------------- the walk


def make_plan(
    job: Job, settings: PlanSettings, screen: Screen, stop: Stop
) -> tuple[Survey, IO[str]]:
    """Read and measure every row once: what the run comes to, and the rows set aside.

    The latter are a JSON line each in a temporary file: there may be more than memory holds.
    Raises `MgenError` for an input of which no row can be computed, or too little disk.
    """
    spool = tempfile.SpooledTemporaryFile(2**24, "w+", encoding="utf-8")  # noqa: SIM115
    total = Survey()
    for item in survey(job.windows(settings), job.row_bytes):
        stop.check()
        if isinstance(item, Survey):
            total = item
            break
        screen.planning(item.first + item.rows)
        if item.failures and job.config.on_error == "stop":
            raise _stopped_by(item.failures[0])
        spool.writelines(failure.line() for failure in item.failures)
    screen.planned(job, total)
    _check_plan(job, total)
    return total, spool


def _check_plan(job: Job, total: Survey) -> None:
    card = job.backbone.card
    if total.rows == 0:
        raise InputError("the input has no rows", "check the file")
    if total.batches == 0:
        reason = total.reasons.most_common(1)[0][0]
        raise InputError(
            f"none of the {total.rows:,} rows can be computed: {reason}",
            f"{card.name} takes {card.modality} from column {job.table.x_col!r}: "
            "check the backbone and --x-col",
        )
    free = storage.free_bytes(job.config.output)
    if _begun(job.config) is None and total.bytes > free:
        raise RunError(
            f"the output needs about {total.bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free",
            "choose another disk with --output, --dtype float16, or fewer --pool and --layers",
        )


def load(job: Job, placement: Placement, screen: Screen) -> LocalEngine:
    """Put the model on its device. Raises `WeightsError` for weights that do not fit."""
    from .engine import LocalEngine

    start = time.perf_counter()
    engine = LocalEngine(job.backbone, job.task, placement)
    screen.loaded(job, engine.parameters, str(placement), time.perf_counter() - start)
    return engine


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
    for name in manifests.OURS:  # with --overwrite; the record first: nothing counts without it
        if name != manifests.LOCK:
            storage.remove(folder / name)
    storage.make_folder(folder / "done")
    storage.make_folder(folder / "failed")
    failures.seek(0)
    storage.write_atomic(folder / "failed/plan.jsonl", partial(manifests.write_lines, failures))
    described = _record(job, identity, plan)
    text = json.dumps(described, indent=1, ensure_ascii=False)
    storage.write_text(folder / manifests.RECORD, text + "\n")
    return Manifest.open(folder)


def compute(
    job: Job,
    settings: PlanSettings,
    engine: LocalEngine,
    manifest: Manifest,
    screen: Screen,
    stop: Stop,
) -> None:
    """Every batch that is not done: collated ahead, computed here, committed behind."""
    done = manifest.done()

    def pending() -> Iterator[Pass]:
        for window in job.windows(settings):
            for batch in window.batches:
                if batch.number not in done:
                    work = job.work(batch, settings)
                    for rows in work.passes:
                        yield Pass(batch, work, rows, job.backbone.collate(rows))

    def commit(waiting: Sequence[Computed]) -> None:
        parts = write_parts(job, manifest, waiting)
        for computed, part in zip(waiting, parts):
            screen.committed(computed.batch, part)

    screen.start(manifest, done)
    found: list[Columns] = []
    start = 0.0
    with Behind(commit) as writer, contextlib.closing(ahead(pending())) as passes:
        for batch, work, rows, inputs in passes:
            if not found:
                start = time.perf_counter()
            found.append(engine.forward(rows, inputs))
            if len(found) == len(work.passes):
                columns = engine.collect(found, work.counts, job.config.dtype)
                writer.put(Computed(batch, columns, time.perf_counter() - start))
                found = []
            if stop.signal is not None:
                break


def write_parts(job: Job, manifest: Manifest, waiting: Sequence[Computed]) -> list[Done]:
    """Commit batches: the rows that failed, the parts, then the lines that make them count."""
    files: dict[Path, Callable[[Path], None]] = {}
    filed = []
    for batch, columns, seconds in waiting:
        table, failures = to_table(batch, columns, job.task.metadata, job.config.dtype)
        if failures and job.config.on_error == "stop":
            raise _stopped_by(failures[0])
        told = manifests.failures_path(RANK, batch.number) if failures else None
        if told:
            lines = [failure.line() for failure in failures]
            files[manifest.folder / told] = partial(manifests.write_lines, lines)
        file = manifests.part_path(RANK, batch.number, job.writer.card.suffix)
        files[manifest.folder / file] = partial(_write_table, job.writer, table)
        filed.append((batch, seconds, file, table.num_rows, len(failures), told))
    for folder in {path.parent for path in files}:
        storage.make_folder(folder)
    storage.write_all(files)
    parts = [_done(manifest.folder, *facts) for facts in filed]
    manifest.log(RANK, parts)
    return parts


def _write_table(writer: Writer, table: pa.Table, path: Path) -> None:
    writer.write(path, [table], table.schema)


def _done(
    folder: Path, batch: Batch, seconds: float, file: str, rows: int, failed: int, told: str | None
) -> Done:
    indices = [row.index for row in batch.rows]
    return Done(
        batch=batch.number,
        file=file,
        rows=rows,
        failed=failed,
        first=min(indices),
        last=max(indices),
        bytes=(folder / file).stat().st_size,
        sha256=storage.checksum(folder / file),
        seconds=round(seconds, 4),
        failures=told,
    )


def report(manifest: Manifest, stop: Stop) -> Report:
    """What the run directory holds now."""
    done = manifest.done()
    return Report(
        folder=manifest.folder,
        rows=manifest.rows,
        done=sum(part.rows for part in done.values()),
        failed=manifest.record["plan"]["failed"] + sum(part.failed for part in done.values()),
        missing_batches=manifest.batches - len(done),
        signal=stop.signal,
    )


# --------------------------------------------------------------------------- the record


def _record(job: Job, identity: dict[str, Any], plan: Survey) -> dict[str, Any]:
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
    return str(value) if isinstance(value, Path) else value


def _stopped_by(failure: Failure) -> MgenError:
    return RunError(
        f"row {failure.row} (id {failure.id}): {failure.reason}",
        "--on-error skip sets such rows aside and goes on",
    )
