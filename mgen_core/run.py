"""The walk of a run, top to bottom: plan, load, compute, commit.

Each function here is one stage; each takes what the one before it made. Killed at any moment,
the same command goes on with the batches that the done-logs do not hold.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from . import budget, storage
from . import manifest as manifests
from .api import Columns, Row, Rows
from .aside import Trial, kinds, nothing_done, remedy, stop_at
from .background import Behind, ahead
from .budget import Choice
from .catalog import Catalog
from .columns import HostColumn, to_table
from .config import RunConfig
from .errors import InputError, RowError, RunError
from .footprint import stored_bytes, weigh
from .job import Job, open_job
from .machine import Machine, least, this_machine
from .manifest import Manifest
from .outcome import Outcome
from .parts import Computed, write_parts
from .plan import Failure, PlanSettings, Survey, deal, survey, unchanged
from .ranks import Ranks
from .record import begun_with, identify, record, reopen
from .screen import Screen
from .stop import Stop, stoppable
from .strategy import MAPPED, Decision, choose
from .turns import Fault, Lost, Pass, Piece, Turns, collated
from .world import World

if TYPE_CHECKING:
    from .engine import Engine, LocalEngine, Placement
    from .origin import Origin

ALONE = World()
POLL_S = 0.5
REST = 50  # times as long as writing a part took, no other is written: it costs at most 2 %
IN_MEMORY = 2**24  # bytes of rows set aside while planning; more are in a temporary file


@dataclass
class Share:
    """What a rank has to do: batches, and the tokens computed in them."""

    batches: int = 0
    tokens: int = 0


class Forecast(NamedTuple):
    """A run that is not made: its plan, each rank's share of it, and how the model would lie."""

    job: Job
    plan: Survey
    shares: list[Share]
    decision: Decision
    choice: Choice


@dataclass(frozen=True)
class Report:
    """How a run ended. `signal` is what stopped it, or None when it came to its end.

    `kinds` counts the rows that failed by the kind of their reason.
    """

    folder: Path
    rows: int
    done: int
    failed: int
    missing_batches: int
    kinds: Counter[str]
    signal: int | None = None


def run(
    config: RunConfig,
    catalog: Catalog,
    screen: Screen,
    *,
    rows: Rows | None = None,
    world: World = ALONE,
) -> Report:
    """Run the config to its end, or as far as a signal lets it. Raises `MgenError`.

    Every rank calls this. Rank 0 decides, records and speaks; up to `begin` an error of one rank
    ends them all.
    """
    with contextlib.ExitStack() as held:
        ranks = held.enter_context(contextlib.closing(Ranks(world)))
        stop = held.enter_context(stoppable())
        with ranks.together():
            job = open_job(config, catalog, rows=rows, download=needs_base(config))
            if ranks.leads:
                lock = held.enter_context(folder_of(config))
            placement, tokens = settle(job, world)
            origin = open_weights(job)
            ranks.at("choosing its batches")
            choice, early = find_budget(job, placement, origin, tokens, ranks, screen, stop)
            settings = job.settings(choice.tokens)
            identity = identify(job, settings, placement, origin)
            begun = reopen(config, identity) if ranks.leads else None
            ranks.at("planning")
            plan, failures = make_plan(job, settings, screen, stop)
            ranks.compare({**identity, "plan": plan.digest})
            decision = decide(job, placement, plan, ranks)
            screen.decided(decision, world)
            ranks.at("loading the model")
            if decision.strategy == "replicate":
                engine: Engine = early or load_whole(job, placement, origin, screen)
            else:
                early = None  # shards need the room
                engine = load_shards(job, placement, origin, plan, decision, ranks, screen)
            ranks.exchange("loaded")
            if ranks.leads:
                record(job, identity, plan, failures, begun)
                lock.share()
            manifest, missing = begin(config, ranks)
            if not ranks.leads:
                lock = held.enter_context(storage.lock(config.output / manifests.LOCK, shared=True))
            ranks.exchange("locked")
            ranks.at("computing its first batch")
        with keeping_step(decision, ranks):
            compute(job, settings, plan, engine, manifest, missing, ranks, screen, stop)
        if ranks.leads:
            wait(manifest, lock, ranks, screen)
    found = report(manifest, stop)
    if ranks.leads and not found.done and not found.missing_batches:
        raise nothing_done(manifest)
    return found


def plan_only(
    config: RunConfig, catalog: Catalog, hosts: Sequence[str] = ("",), *, rows: Rows | None = None
) -> Forecast:
    """The plan that a run of a rank on each of `hosts` would follow, were they like this one.

    Reads no weights, writes nothing.
    """
    job = open_job(config, catalog, rows=rows, download=False)
    placement, tokens = settle(job, ALONE)
    choice = Choice(tokens) if tokens else budget.foretell(job, placement)
    settings = job.settings(choice.tokens)
    total, shares, loads = Survey(), [Share() for _ in hosts], [0 for _ in hosts]
    for item in survey(job.windows(settings), job.row_bytes):
        if isinstance(item, Survey):
            total = item
            break
        for share, batches in zip(shares, deal(item.batches, loads)):
            share.batches += len(batches)
            share.tokens += sum(batch.computed for batch in batches)
    size, batch = weigh(job.backbone, job.task.needs, placement.dtype, total.largest)
    machine = this_machine(placement.device)
    decision = choose(size, batch, machine, hosts, config.strategy, config.offload)
    return Forecast(job, total, shares, decision, choice)


# --------------------------------------------------------------------------- before the walk


def settle(job: Job, world: World) -> tuple[Placement, int | None]:
    """Decide what `auto` means here; a run that was begun keeps what it was begun with.

    The tokens of a batch are None where they are to be found.
    """
    from .engine import place

    config, begun = job.config, begun_with(job.config)
    precision, tokens = config.precision, config.batch_tokens
    if begun and precision == "auto":
        precision = begun["precision"]
    placement = place(precision, world.local_rank)
    if begun and tokens is None:
        tokens = begun["batch_tokens"]
    if config.batch_rows and tokens is None:
        tokens = budget.usual(placement)
    return placement, tokens


def needs_base(config: RunConfig) -> bool:
    """Whether published weights are needed: a fine-tuned model's file may hold all of them."""
    if config.ckpt is None:
        return True
    from .lightning import open_lightning
    from .lora import holds_backbone

    return not holds_backbone(open_lightning(config.ckpt))


def open_weights(job: Job) -> Origin:
    """The weights, found and not read; raises `WeightsError` for what does not fit together."""
    from .origin import find_origin

    return find_origin(job.backbone.options.weights, job.config.ckpt, job.config.lora)


@contextlib.contextmanager
def folder_of(config: RunConfig) -> Iterator[storage.Lock]:
    """The run directory, locked. A run that fails before it has a record leaves nothing behind."""
    new = storage.make_folder(config.output)
    # The lock first: what another process is making is not ours to tidy up.
    with storage.lock(config.output / manifests.LOCK) as lock:
        try:
            yield lock
        except BaseException:
            if not (config.output / manifests.RECORD).exists():
                for path in manifests.ours(config.output):
                    storage.remove(path)
                for made in new:
                    with contextlib.suppress(OSError):
                        made.rmdir()
            raise


# --------------------------------------------------------------------------- the walk


def find_budget(
    job: Job,
    placement: Placement,
    origin: Origin,
    tokens: int | None,
    ranks: Ranks,
    screen: Screen,
    stop: Stop,
) -> tuple[Choice, LocalEngine | None]:
    """How many tokens a batch has at most: rank 0 finds it for all.

    Where it has to be measured the whole model is loaded for it, which is given back.
    """
    choice = Choice(tokens) if tokens else None
    engine = None
    if ranks.leads and choice is None:
        load = partial(load_whole, job, placement, origin, screen)
        choice, engine = budget.find(job, placement, load, stop.check)
    choice = Choice(*ranks.exchange(choice)[0])
    screen.chosen(choice)
    return choice, engine


def make_plan(
    job: Job, settings: PlanSettings, screen: Screen, stop: Stop
) -> tuple[Survey, IO[str]]:
    """Read and measure every row once: what the run comes to, and the rows set aside.

    The latter are a JSON line each in a temporary file: there may be more than memory holds.
    Raises `MgenError` for an input of which no row can be computed, or too little disk.
    """
    spool = tempfile.SpooledTemporaryFile(IN_MEMORY, "w+", encoding="utf-8")  # noqa: SIM115
    total = Survey()
    for item in survey(job.windows(settings), job.row_bytes):
        stop.check()
        if isinstance(item, Survey):
            total = item
            break
        screen.planning(item.first + item.rows)
        stop_at(item.failures, job.config)
        _set_down(item.failures, spool)
    screen.planned(job, total)
    _check_plan(job, total)
    return total, spool


def _set_down(failures: Collection[Failure], spool: IO[str]) -> None:
    try:
        spool.writelines(failure.line() for failure in failures)
        spool.flush()
    except OSError as error:
        what = f"cannot keep the rows set aside for now: {error.strerror or error}"
        raise RunError(what, "set TMPDIR to a folder with room") from error


def _check_plan(job: Job, total: Survey) -> None:
    card = job.backbone.card
    if total.rows == 0:
        raise InputError("the input has no rows", "check the file")
    if total.batches == 0:
        kind = total.reasons.most_common(1)[0][0]
        otherwise = f"{card.name} takes {card.modality}: check the backbone and --x-col"
        what = f"none of the {total.rows:,} rows can be computed: {kind}"
        raise InputError(what, remedy(kind, otherwise))
    free = storage.free_bytes(job.config.output)
    if free is not None and total.bytes > free and begun_with(job.config) is None:
        raise RunError(
            f"the output needs about {total.bytes / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free",
            "choose another disk with --output, --dtype float16, or fewer --pool and --layers",
        )


def decide(job: Job, placement: Placement, plan: Survey, ranks: Ranks) -> Decision:
    """Replicated or sharded: rank 0 decides for all."""
    machine = this_machine(placement.device)
    alone = ranks.world.size == 1 and job.config.strategy == "auto" and placement.on_cpu
    if alone and stored_bytes(job.backbone.options.weights) < machine.memory / 4:
        return MAPPED  # nothing to choose, and no doubt: at most a copy in float32
    told = ranks.exchange((ranks.world.host, machine))
    decision = None
    if ranks.leads:
        hosts = [host for host, _ in told]
        machine = least([Machine(*offer) for _, offer in told])
        size, batch = weigh(job.backbone, job.task.needs, placement.dtype, plan.largest)
        decision = choose(size, batch, machine, hosts, job.config.strategy, job.config.offload)
    return Decision(*ranks.exchange(decision)[0])


def load_whole(job: Job, placement: Placement, origin: Origin, screen: Screen) -> LocalEngine:
    """Put the model on this rank's device. Raises `WeightsError` for weights that do not fit."""
    from .engine import LocalEngine

    start = time.perf_counter()
    engine = LocalEngine(job.backbone, job.task, placement, origin)
    screen.loaded(job, engine.parameters, str(placement), time.perf_counter() - start)
    return engine


def load_shards(
    job: Job,
    placement: Placement,
    origin: Origin,
    plan: Survey,
    decision: Decision,
    ranks: Ranks,
    screen: Screen,
) -> Engine:
    """Put this rank's shards of the model on its device. Raises `WeightsError`, likewise."""
    from .zero3 import Group, Zero3Engine, connect

    start = time.perf_counter()
    connect(ranks.store, ranks.world, placement.device)
    fillers = [row for entry in plan.fillers for row in first_variant(job, entry.rows[0])]
    group, offload = Group(decision.groups), decision.offload
    engine = Zero3Engine(job.backbone, job.task, placement, origin, group, fillers, offload)
    screen.loaded(job, engine.parameters, str(placement), time.perf_counter() - start)
    return engine


def first_variant(job: Job, row: Row) -> Sequence[Row]:
    """One of the rows that are run for a row, if there are any."""
    with contextlib.suppress(RowError):
        return job.variants(row)[:1]
    return ()


def begin(config: RunConfig, ranks: Ranks) -> tuple[Manifest, set[int]]:
    """The run, and the batches that are to be done: the same on every rank."""
    missing: list[int] = []
    if ranks.leads:
        manifest = Manifest.open(config.output)
        missing = manifest.missing(manifest.done())
    missing = ranks.exchange(missing)[0]
    return Manifest.open(config.output), set(missing)


@contextlib.contextmanager
def keeping_step(decision: Decision, ranks: Ranks) -> Iterator[None]:
    """Ranks that hold a model together end together; replicas have nothing more to say."""
    if decision.strategy == "replicate":
        ranks.close()
        yield
        return
    from .zero3 import disconnect

    ranks.watch(next(group for group in decision.groups if ranks.world.rank in group))
    try:
        yield
    except Lost as error:
        raise ranks.lost(error) from error
    disconnect()


def compute(
    job: Job,
    settings: PlanSettings,
    plan: Survey,
    engine: Engine,
    manifest: Manifest,
    missing: Collection[int],
    ranks: Ranks,
    screen: Screen,
    stop: Stop,
) -> None:
    """This rank's share of what is missing: collated ahead, computed here, committed behind."""
    world = ranks.world

    def passes() -> Iterator[Pass]:
        loads = [0] * world.size
        for window in unchanged(job.windows(settings), plan):
            batches = [batch for batch in window.batches if batch.number in missing]
            for batch in deal(batches, loads)[world.rank]:
                work = job.work(batch, settings)
                for rows in work.passes:
                    yield Pass(batch, work, rows, collated(engine, rows))

    def commit(waiting: Sequence[Callable[[], Computed]]) -> None:
        good = trial.admit([make() for make in waiting])
        if good:
            write_parts(job, manifest, world.rank, good)
            screen.committed()

    screen.start(manifest)
    trial = Trial(job.config, any(part.rows for part in manifest.done()))
    turns = Turns(engine, job.cost, screen.learned)
    outcome: Outcome | None = None
    start = time.perf_counter()
    with Behind(commit, rest=REST) as writer, contextlib.closing(ahead(passes())) as ready:

        def use(piece: Piece, came: Columns | Fault) -> None:
            nonlocal outcome, start
            batch, work, *_ = piece.whole
            ranks.at(f"after batch {batch.number}")
            outcome = outcome or Outcome(batch, work)
            outcome.add(len(piece.rows), came)
            if outcome.complete:
                columns = outcome.columns(engine, job.config.dtype)
                seconds = time.perf_counter() - start
                made = partial(tabled, job, plan, outcome, columns, seconds, turns.limit)
                writer.put(made, sum(column.nbytes for column in columns.values()))
                outcome, start = None, time.perf_counter()

        turns.run(ready, use, lambda: stop.signal is not None, writer.check)
    if trial.held and stop.signal is None:
        write_parts(job, manifest, world.rank, trial.held)


def tabled(
    job: Job,
    plan: Survey,
    outcome: Outcome,
    columns: Mapping[str, HostColumn],
    seconds: float,
    limit: int | None,
) -> Computed:
    """A batch as it is written: its rows as a table, and those that failed."""
    stored, batch = job.config.dtype, outcome.batch
    metadata, reasons = job.task.metadata, outcome.reasons
    table, failures = to_table(batch, columns, metadata, stored, reasons, plan.kept)
    return Computed(batch, table, failures, seconds, limit)


def wait(manifest: Manifest, lock: storage.Lock, ranks: Ranks, screen: Screen) -> None:
    """Until the other ranks are through."""
    while ranks.world.size > 1 and not lock.alone():
        screen.committed()
        time.sleep(POLL_S)


def report(manifest: Manifest, stop: Stop) -> Report:
    """What the run directory holds now."""
    done = manifest.done()
    return Report(
        folder=manifest.folder,
        rows=manifest.rows,
        done=sum(part.rows for part in done),
        failed=manifest.failed(done),
        missing_batches=len(manifest.missing(done)),
        kinds=kinds(manifest, done),
        signal=stop.signal,
    )
