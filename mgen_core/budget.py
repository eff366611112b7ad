"""The most tokens that a batch computes: measured on batches of the input, and remembered.

What is best depends on the model, the machine and the rows, and differs by a factor of two and
more. So batches of the very plan are run at several budgets, in turn and at the same places of the
plan: what padding costs counts. On a CPU the processor time of the thread that computes tells which
is best: by the clock, a machine's other work would, and that of all threads leaves out what one
waits for another.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from . import memo
from .config import RESERVED
from .cores import usable_cores
from .errors import RowError
from .footprint import stored_bytes, weigh
from .job import AUTO_BATCH_TOKENS, Job
from .machine import processor, this_machine
from .plan import Batch, Entry, make_batches
from .strategy import USABLE
from .turns import OutOfMemory

if TYPE_CHECKING:
    from .engine import LocalEngine, Placement

BUDGETS = {
    "cpu": (256, 512, 1024, 2048, 4096, 8192),
    "cuda": (2048, 4096, 8192, 16_384, 32_768, 65_536),
}
SECONDS, SHARE = 5.0, 0.02  # what measuring may take: at most, and of the run
ROUNDS, MOST_ROUNDS = 2, 8
PLACES = (0.25, 0.75, 0.5)  # of the plan's tokens, where batches are taken from: a place a round
NEAR = 1.03
ENTRIES = 8192
FILE = "budgets.json"

Check = Callable[[], None]


class Choice(NamedTuple):
    """A budget, and why it is this one: empty where there is nothing to tell."""

    tokens: int
    why: str = ""


class Sample(NamedTuple):
    """Rows of the input's first window, longest first, and the tokens of all of that window."""

    entries: Sequence[Entry]
    tokens: int


class Lap(NamedTuple):
    """A pass: tokens that carry data, the time that it took, and what it is compared by."""

    tokens: int
    seconds: float
    cost: float


RunLap = Callable[[int, float], Lap]
"""Runs the batch that a budget has at a place of the plan."""


def usual(placement: Placement) -> int:
    """The budget of what is not measured."""
    return AUTO_BATCH_TOKENS[placement.device.type]


def sampled(job: Job, placement: Placement) -> Sample:
    """Reads the first window of the input. Raises `InputError`."""
    first = next(job.windows(job.settings(usual(placement))), None)
    entries = [entry for batch in first.batches for entry in batch.entries] if first else []
    step = max(1, len(entries) // ENTRIES)
    return Sample(entries[::step], sum(entry.tokens for entry in entries))


def find(
    job: Job, placement: Placement, load: Callable[[], LocalEngine], check: Check
) -> tuple[Choice, LocalEngine | None]:
    """The budget for this input, and the engine, if it had to be loaded to find it.

    `load` puts the whole model on this rank's device; `check` raises what is to end the run.
    """
    sample = sampled(job, placement)
    choice = known(job, placement, sample)
    return (choice, None) if choice else measure(job, placement, sample, load, check)


def foretell(job: Job, placement: Placement) -> Choice:
    """The budget, as far as that is known without measuring."""
    found = known(job, placement, sampled(job, placement))
    return found or Choice(usual(placement), "the usual number, a run would measure first")


def known(job: Job, placement: Placement, sample: Sample) -> Choice | None:
    """The budget, where nothing need be measured."""
    first, second, *_ = preferred(placement)
    if sample.tokens * SHARE < ROUNDS * (first + second):
        return Choice(first)
    if tokens := memo.recall(FILE, key(job, placement, sample)):
        return Choice(tokens, "the fastest when it was measured here")
    return None


def measure(
    job: Job, placement: Placement, sample: Sample, load: Callable[[], LocalEngine], check: Check
) -> tuple[Choice, LocalEngine | None]:
    """The budget with the most tokens a second."""
    budgets = within_memory(job, placement)
    if len(budgets) < 2:
        return Choice(usual(placement), "the usual number, not measured for shards"), None
    engine = load()
    try:
        found = race(budgets, laps(job, engine, sample, check), sample.tokens)
    except (RowError, OutOfMemory):  # the run meets it again, and tells the user
        return Choice(usual(placement), "the usual number, measuring failed"), engine
    if not found:
        most = f"{SECONDS:.0f} s or {SHARE:.0%} of the run"
        why = f"the usual number, measuring would take more than {most}"
        return Choice(usual(placement), why), engine
    tokens = first_near_best(found)
    memo.keep(FILE, key(job, placement, sample), tokens)
    return Choice(tokens, f"measured, speed {told(found)}"), engine


def first_near_best(found: Mapping[int, float]) -> int:
    """Of the budgets that are as good as the best: what is to be preferred is first."""
    best = min(found.values())
    return next(budget for budget, cost in found.items() if cost <= best * NEAR)


def told(found: Mapping[int, float]) -> str:
    """The speed at each budget, of the best one."""
    best = min(found.values())
    return ", ".join(f"{best / found[budget]:.0%} at {budget:,}" for budget in sorted(found))


# --------------------------------------------------------------------------- what is compared


def preferred(placement: Placement) -> list[int]:
    """The budgets to compare: the default first, then smaller and larger ones in turn.

    A smaller one before the larger: it costs less to measure, and is more often better.
    """
    first = usual(placement)
    return sorted(
        BUDGETS[placement.device.type],
        key=lambda budget: max(budget / first, first / budget) + (budget > first),
    )


def within_memory(job: Job, placement: Placement) -> list[int]:
    """Of these, those with which the whole model fits this rank's device, by what is expected.

    None where the model is to be sharded.
    """
    config = job.config
    if config.strategy == "zero3" or config.offload != "none":
        return []
    budgets = preferred(placement)
    size, most = weigh(job.backbone, job.task.needs, placement.dtype, max(budgets))
    room = this_machine(placement.device).memory * USABLE - size.bytes
    return [budget for budget in budgets if most * budget / max(budgets) <= room]


def laps(job: Job, engine: LocalEngine, sample: Sample, check: Check) -> RunLap:
    """Runs batches of the sample. A lap raises `RowError` and `OutOfMemory`."""
    meter = time.thread_time if engine.placement.on_cpu else time.perf_counter

    @cache
    def plan(budget: int) -> tuple[Batch, ...]:
        return make_batches(sample.entries, job.settings(budget))

    def lap(budget: int, place: float) -> Lap:
        check()
        batch = at(plan(budget), place)
        rows = job.work(batch, job.settings(budget)).passes[0]
        inputs = engine.collate(rows)
        start, before = time.perf_counter(), meter()
        engine.forward(rows, inputs)
        engine.finish()
        cost, seconds = meter() - before, time.perf_counter() - start
        return Lap(sum(map(job.measure, rows)), seconds, cost)

    return lap


def at(batches: Sequence[Batch], place: float) -> Batch:
    """The batch that holds the token at this share of all."""
    left = place * sum(batch.tokens for batch in batches)
    for batch in batches:
        left -= batch.tokens
        if left <= 0:
            return batch
    return batches[-1]


def race(budgets: Sequence[int], lap: RunLap, tokens: int) -> dict[int, float]:
    """Cost of a token at as many of the budgets as there is time for; none when it is too short.

    In the order of the budgets. The first of them is compared in any case: it is what would be
    taken without measuring.
    """
    lap(1, 1.0)  # the shortest row alone: weights that are mapped come to memory
    rate = pace(lap(1, 1.0))
    least = min(budgets)
    if least * rate > allowed(rate, tokens):
        return {}
    opening = lap(least, PLACES[0])
    rate, spent = pace(opening), opening.seconds
    most = allowed(rate, tokens)
    field = affordable(budgets, rate, most - spent)
    rounds: list[dict[int, float]] = []
    while len(field) > 1 and len(rounds) < MOST_ROUNDS:
        if len(rounds) >= ROUNDS and spent + sum(field) * rate > most:
            break
        taken: dict[int, float] = {}
        for budget in field:
            if len(rounds) < ROUNDS and spent > most:  # the machine is slower than it was
                return {}
            try:
                ran = lap(budget, PLACES[len(rounds) % len(PLACES)])
            except OutOfMemory:
                field = [other for other in field if other < budget]
                break
            spent += ran.seconds
            taken[budget] = ran.cost / max(ran.tokens, 1)
        rounds.append(taken)
    compared = len(field) > 1 and budgets[0] in field
    return averaged(field, rounds) if compared else {}


def allowed(rate: float, tokens: int) -> float:
    """Seconds that measuring may take, of a run of at least so many tokens."""
    return min(SECONDS, SHARE * tokens * rate)


def affordable(budgets: Sequence[int], rate: float, seconds: float) -> list[int]:
    """As many of the budgets, in their order, as can be run often enough."""
    field: list[int] = []
    for budget in budgets:
        if ROUNDS * (sum(field) + budget) * rate > seconds:
            break
        field.append(budget)
    return field


def averaged(field: Sequence[int], rounds: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Cost of a token over all places: at each the median of its laps."""
    found = {}
    for budget in field:
        costs = [taken[budget] for taken in rounds if budget in taken]
        places = [costs[place :: len(PLACES)] for place in range(len(PLACES))]
        found[budget] = statistics.mean(statistics.median(laps) for laps in places if laps)
    return found


def pace(lap: Lap) -> float:
    """Seconds a token."""
    return lap.seconds / max(lap.tokens, 1)


# --------------------------------------------------------------------------- what is remembered


def key(job: Job, placement: Placement, sample: Sample) -> str:
    """All that the best budget depends on, as far as that is known without measuring."""
    import torch

    chosen = {k: v for k, v in asdict(job.backbone.options).items() if k not in RESERVED}
    middle = sample.entries[len(sample.entries) // 2].tokens
    told = {
        "device": _device(placement),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "mgen": importlib.metadata.version("mgen"),
        "backbone": job.backbone.card.name,
        "options": chosen,
        "weights": [stored_bytes(path) for path in (job.backbone.options.weights, job.config.ckpt)],
        "needs": [list(job.task.needs.layers), job.task.needs.logits],
        "task": job.task.card.name,
        "precision": placement.precision,
        "row": 1 << middle.bit_length(),  # rows of this many tokens, more or less
    }
    return json.dumps(told, default=str)


def _device(placement: Placement) -> str:
    if placement.on_cpu:
        return f"{len(usable_cores())} cores of {processor()}"
    import torch

    return str(torch.cuda.get_device_name(placement.device))
