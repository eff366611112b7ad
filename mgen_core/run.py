"""The walk of a run, top to bottom: plan, load, compute, commit.

Each function here is one stage; each takes what the one before it made. Killed at any moment,
the same command goes on with the batches that the done-logs do not hold.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from . import manifest as manifests
from . import storage
from .api import Columns, Inputs, Row, Rows
from .background import Behind, ahead
from .catalog import Catalog
from .config import RunConfig
from .errors import InputError, RunError
from .job import AUTO_BATCH_TOKENS, Job, open_job
from .manifest import Manifest
from .parts import Computed, stopped_by, write_parts
from .plan import TOO_LONG, Batch, PlanSettings, Survey, Work, survey
from .record import begun_with, identify, record, reopen
from .screen import Screen
from .stop import Stop, stoppable

if TYPE_CHECKING:
    from .engine import LocalEngine, Placement

RANK = 0


class Pass(NamedTuple):
    """One forward pass of a batch, its rows collated."""

    batch: Batch
    work: Work
    rows: Sequence[Row]
    inputs: Inputs


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
    new = storage.make_folder(config.output)
    # The lock first: what another process is making is not ours to tidy up.
    with (
        storage.lock(config.output / manifests.LOCK),
        tidy(config.output, new),
        stoppable() as stop,
    ):
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

    config, begun = job.config, begun_with(job.config)
    precision = config.precision
    if begun and precision == "auto":
        precision = begun["precision"]
    placement = place(precision)
    tokens = config.batch_tokens
    if tokens is None:
        tokens = begun["batch_tokens"] if begun else AUTO_BATCH_TOKENS[placement.device.type]
    return placement, job.settings(tokens)


@contextlib.contextmanager
def tidy(folder: Path, new: Sequence[Path]) -> Iterator[None]:
    """A run that fails before it has a record leaves nothing behind; `new` folders go too."""
    try:
        yield
    except BaseException:
        if not (folder / manifests.RECORD).exists():
            for name in manifests.OURS:
                storage.remove(folder / name)
            for made in new:
                with contextlib.suppress(OSError):
                    made.rmdir()
        raise


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
            raise stopped_by(item.failures[0])
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
        hint = f"{card.name} takes {card.modality}: check the backbone and --x-col"
        if reason.startswith(TOO_LONG):
            hint = "--too-long truncate cuts them, --max-length N takes longer ones"
        raise InputError(f"none of the {total.rows:,} rows can be computed: {reason}", hint)
    free = storage.free_bytes(job.config.output)
    if begun_with(job.config) is None and total.bytes > free:
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


def report(manifest: Manifest, stop: Stop) -> Report:
    """What the run directory holds now."""
    done = manifest.done()
    return Report(
        folder=manifest.folder,
        rows=manifest.rows,
        done=sum(part.rows for part in done.values()),
        failed=manifest.failed(done),
        missing_batches=len(manifest.missing(done)),
        signal=stop.signal,
    )
