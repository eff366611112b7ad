"""What a person sees of a run: a few lines, and a progress bar on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from .budget import Choice
    from .job import Job
    from .manifest import Done, Manifest
    from .plan import Survey
    from .strategy import Decision
    from .world import World

from .aside import kind_lines
from .strategy import describe

QUIET_SECONDS = 30.0


class Screen:
    """Says nothing: what a notebook gets, and what `ConsoleScreen` overrides."""

    def planning(self, rows: int) -> None:
        """So many rows were read so far."""

    def planned(self, job: Job, plan: Survey) -> None:
        """The plan is made."""

    def loaded(self, job: Job, parameters: int, place: str, seconds: float) -> None:
        """The model is ready."""

    def chosen(self, choice: Choice) -> None:
        """How many tokens a batch has at most."""

    def decided(self, decision: Decision, world: World) -> None:
        """Several ranks: how they share the work."""

    def start(self, manifest: Manifest) -> None:
        """Computing begins, or goes on."""

    def committed(self) -> None:
        """Parts are durable: the done-logs of all ranks tell which."""

    def learned(self, limit: int) -> None:
        """The memory sufficed for no more than so many tokens at once."""

    def close(self) -> None:
        """The run is over, well or not."""


class ConsoleScreen(Screen):
    """Lines on stderr; a bar where that is a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.tail: Iterator[list[Done]] = iter(())
        self.said = self.began = time.monotonic()
        self.rows = self.total = self.tokens = 0

    def say(self, label: str, text: str) -> None:
        """One line: a label, then the facts."""
        from rich.markup import escape

        line = f"[bold]{label:<9}[/bold] {escape(text)}"
        self.console.print(line, highlight=False, soft_wrap=True, emoji=False)

    def planning(self, rows: int) -> None:
        if self._due():
            self.say("reading", f"{rows:,} rows so far")

    def planned(self, job: Job, plan: Survey) -> None:
        for label, text in plan_lines(job, plan):
            self.say(label, text)

    def loaded(self, job: Job, parameters: int, place: str, seconds: float) -> None:
        size = f"{parameters:,} parameters" if parameters else "no parameters"
        if parameters and not job.backbone.options.weights and job.config.ckpt is None:
            size += ", random"
        name = job.backbone.card.name
        self.say("model", f"{name}: {size}, {place}, ready in {seconds:.1f} s")

    def start(self, manifest: Manifest) -> None:
        self.tail = manifest.tail()
        next(self.tail)
        done = manifest.done()
        self.total = manifest.rows - manifest.record["plan"]["failed"]
        self.rows = sum(part.rows + part.failed for part in done)
        self.began = self.said = time.monotonic()
        if done:
            self.say("resuming", f"{self.rows:,} of {self.total:,} rows were done before")
        if self.console.is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("[bold]computing[/bold]"),
                progress.BarColumn(),
                progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
                progress.TextColumn("{task.fields[speed]}"),
                progress.TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=self.total, completed=self.rows, speed="")
            self.bar.start()

    def committed(self) -> None:
        parts = next(self.tail)
        self.rows += sum(part.rows + part.failed for part in parts)
        self.tokens += sum(part.tokens for part in parts)
        speed = f"{self.tokens / max(time.monotonic() - self.began, 1e-9):,.0f} tokens/s"
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.rows, speed=speed)
        elif self._due():
            self.say("computing", f"{self.rows:,} of {self.total:,} rows, {speed}")

    def decided(self, decision: Decision, world: World) -> None:
        if world.size > 1 or not decision.fits or decision.strategy == "zero3":
            self.say("ranks", describe(decision, world.size))

    def chosen(self, choice: Choice) -> None:
        if choice.why:
            self.say("batches", f"at most {choice.tokens:,} tokens: {choice.why}")

    def learned(self, limit: int) -> None:
        self.say("memory", f"used up: at most {limit:,} tokens at once from here on")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _due(self) -> bool:
        now = time.monotonic()
        due = now - self.said >= QUIET_SECONDS
        self.said = now if due else self.said
        return due


def plan_lines(job: Job, plan: Survey) -> list[tuple[str, str]]:
    """The plan in words: label and text of each line."""
    columns = f"input {job.table.x_col!r}, id {job.table.id_col!r}"
    if job.table.id_col is None:
        columns = f"input {job.table.x_col!r}, no id column: ids are row numbers"
    lines = [("rows", f"{plan.rows:,} ({columns})")]
    lines += [("", f"{rows(count)}: {note}") for note, count in plan.notes.most_common()]
    lines += [("set aside", line) for line in kind_lines(plan.reasons)]
    repeats = plan.rows - plan.failed - plan.distinct
    if repeats:
        lines.append(("", f"{rows(repeats)}: the same as an earlier one, computed once"))
    if plan.batches:
        batches = f"{counted(plan.batches, 'batch', 'batches')}, the largest {plan.largest:,}"
        useful = f"{plan.useful:.1%} of computed tokens are useful"
        lines.append(("plan", f"{plan.tokens:,} tokens in {batches}; {useful}"))
    return lines


def counted(count: int, one: str, many: str) -> str:
    """ "1 row", "2,100 rows"."""
    return f"{count:,} {one if count == 1 else many}"


def rows(count: int) -> str:
    """So many rows."""
    return counted(count, "row", "rows")
