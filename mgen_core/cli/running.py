"""What the run commands share: start a run, show it, and say how it ended."""

from __future__ import annotations

import signal
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from ..catalog import discover
from ..config import RunConfig, make_config, read_config
from ..job import Job
from ..plan import Survey
from ..run import Report, run
from ..run import plan_only as make_plan_only
from ..screen import ConsoleScreen, plan_lines, rows
from ..storage import free_bytes


def start(configs: list[Path] | None, flags: dict[str, Any], *, plan_only: bool) -> None:
    """Run, or only plan; exit 130 or 143 when a signal ended it."""
    config = make_config(merged_values(configs, flags))
    screen = ConsoleScreen(Console(stderr=True))
    if plan_only:
        show_plan(screen, config, *make_plan_only(config, discover()))
        return
    try:
        report = run(config, discover(), screen)
    finally:
        screen.close()
    show_end(screen, report)
    if report.signal is not None:
        raise typer.Exit(130 if report.signal == signal.SIGINT else 143)


def merged_values(paths: list[Path] | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What the config files say, overruled by the flags that were given."""
    values = read_config(paths or [])
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


def show_plan(screen: ConsoleScreen, config: RunConfig, job: Job, plan: Survey) -> None:
    """The plan, and what it would take on disk."""
    for label, text in plan_lines(job, plan):
        screen.say(label, text)
    free = free_bytes(config.output)
    screen.say("longest", f"{plan.longest:,} tokens")
    screen.say("disk", f"about {size(plan.bytes)} of output, {size(free)} free")


def show_end(screen: ConsoleScreen, report: Report) -> None:
    """Rows done, rows set aside and where they are told, and what to type next."""
    if report.missing_batches:
        screen.say(
            "stopped",
            f"{report.done:,} of {report.rows:,} rows are done in {report.folder}; "
            "the same command goes on from there",
        )
        return
    screen.say("done", f"{report.done:,} of {report.rows:,} rows in {report.folder}")
    if report.failed:
        screen.say("set aside", f"{rows(report.failed)}, reasons in {report.folder / 'failed'}")
    screen.say("next", f"mgen merge {report.folder}")


def size(count: int) -> str:
    """Bytes in words: 1.5 GB."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "bytes" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"
