"""What the run commands share: start a run, show it, and say how it ended."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from .. import launch
from ..api import Rows
from ..aside import kind_lines, where_told
from ..catalog import discover
from ..config import RunConfig, make_config, read_config
from ..cores import share_cores
from ..errors import MgenError
from ..join import LAUNCHER, LOCAL, join
from ..machine import amount
from ..ranks import TOGETHER
from ..run import Forecast, Report, run
from ..run import plan_only as plan
from ..screen import ConsoleScreen, Screen, counted, plan_lines
from ..screen import rows as counted_rows
from ..storage import free_bytes
from ..strategy import describe
from ..turns import PeerFailed
from ..world import World


def make(configs: list[Path] | None, flags: dict[str, Any]) -> RunConfig:
    """What the config files say, overruled by the flags that were given."""
    return make_config(merged_values(read_config(configs or []), flags))


def start(config: RunConfig, *, plan_only: bool, rows: Rows | None = None) -> None:
    """Run, or only plan; exit 130 or 143 when a signal ended it, 1 when rows are missing.

    `rows` stand for those of the config's data.
    """
    world = join(os.environ)
    # A shell that srun gave is a rank of its own; --devices there starts some below it.
    ours = os.environ.get(LAUNCHER) == LOCAL
    alone = world is None or (world.size == 1 and config.devices is not None and not ours)
    if alone and not plan_only:
        start_ranks(config)
    world = world or World()
    share_cores(world, os.environ)
    if plan_only:
        if world.rank == 0:
            show_plan(config, plan(config, discover(), planned_hosts(config, world), rows=rows))
        return
    screen = ConsoleScreen(Console(stderr=True)) if world.rank == 0 else Screen()
    try:
        report = run(config, discover(), screen, rows=rows, world=world)
    except PeerFailed:
        raise typer.Exit(TOGETHER if ours else 1) from None
    except MgenError as error:
        if world.rank > 0:
            error.what = f"{world}: {error.what}"
        raise
    except Exception:
        if world.rank > 0:
            sys.stderr.write(f"error: {world}:\n")
        raise
    finally:
        screen.close()
    if isinstance(screen, ConsoleScreen):
        show_end(screen, report)
    if report.signal is not None:
        raise typer.Exit(130 if report.signal == signal.SIGINT else 143)
    if world.rank == 0 and report.missing_batches:
        raise typer.Exit(1)


def planned_hosts(config: RunConfig, world: World) -> list[str]:
    """The host of each rank that a run would have."""
    if config.hostfile is not None:
        return launch.hosts_of(config.hostfile, config.num_nodes, config.devices)
    return [world.host] * (world.size if world.size > 1 else launch.devices(config.devices))


def start_ranks(config: RunConfig) -> None:
    """Start what `--devices` and `--hostfile` ask for, and exit as they do; return for one rank."""
    if config.hostfile is not None or (config.num_nodes or 1) > 1:
        raise typer.Exit(launch.start_nodes(config.hostfile, config.num_nodes, config.devices))
    if (count := launch.devices(config.devices)) > 1:
        raise typer.Exit(launch.start_local(count, bind=config.bind))


def merged_values(values: Mapping[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Values of a `RunConfig`, overruled by the flags that were given."""
    given = {
        key: _plain(value)
        for key, value in flags.items()
        if value is not None and value != [] and value is not False
    }
    chosen = {key: _plain(value) for key, value in given.pop("options", {}).items()}
    options = {**values.get("options", {}), **chosen}
    return {**values, **given, "options": options}


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def show_plan(config: RunConfig, forecast: Forecast) -> None:
    """The plan, how it would be computed, and what it would take on disk."""
    screen, total = ConsoleScreen(Console(stderr=True)), forecast.plan
    screen.chosen(forecast.choice)
    for label, text in plan_lines(forecast.job, total):
        screen.say(label, text)
    screen.say("longest", f"{total.longest:,} tokens")
    screen.say("ranks", describe(forecast.decision, len(forecast.shares)))
    for rank, share in enumerate(forecast.shares if len(forecast.shares) > 1 else ()):
        batches = counted(share.batches, "batch", "batches")
        screen.say("", f"rank {rank}: {batches}, {share.tokens:,} tokens computed")
    free = free_bytes(config.output)
    room = "" if free is None else f", {amount(free)} free"
    screen.say("disk", f"about {amount(total.bytes)} of output{room}")


def show_end(screen: ConsoleScreen, report: Report) -> None:
    """Rows done, rows set aside, why, and where that is told; and what to type next."""
    if report.missing_batches:
        screen.say(
            "stopped" if report.signal else "missing",
            f"{report.done:,} of {report.rows:,} rows are done in {report.folder}; "
            "the same command goes on from there",
        )
    else:
        screen.say("done", f"{report.done:,} of {report.rows:,} rows in {report.folder}")
    if report.failed:
        screen.say("set aside", f"{counted_rows(report.failed)}{where_told(report.folder)}")
        for line in kind_lines(report.kinds):
            screen.say("", line)
    if not report.missing_batches:
        screen.say("next", f"mgen merge {shlex.quote(str(report.folder))}")
