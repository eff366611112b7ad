"""`mgen merge`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from . import options as o


def merge(
    run: o.RunFolder,
    to: Annotated[
        Optional[Path],
        typer.Option(
            parser=o.place,
            metavar="FILE|URL",
            help="The file to write. Default: RUN.parquet, beside RUN.",
        ),
    ] = None,
    format: Annotated[
        Optional[str], typer.Option(help="Its format, where the suffix does not tell.")
    ] = None,
    into: Annotated[
        Optional[Path],
        typer.Option(
            parser=o.place,
            metavar="FILE|URL",
            help="Write a copy of this file (.h5ad) with the run's columns added.",
        ),
    ] = None,
    columns: Annotated[
        Optional[list[str]], typer.Option(metavar="A,B,...", help="Only these columns.")
    ] = None,
    where: Annotated[
        Optional[str],
        typer.Option(metavar="SQL", help="Only rows for which it holds, as in \"id LIKE 'P0%'\"."),
    ] = None,
    on_error: Annotated[
        Optional[o.OnError],
        typer.Option(help="Keep rows that were set aside as null rows, or refuse. Default: skip."),
    ] = None,
    drop_failed: Annotated[
        bool, typer.Option("--drop-failed", help="Leave out rows that were set aside.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Merge what there is of an unfinished run.")
    ] = False,
    rows_per_file: Annotated[
        Optional[int],
        typer.Option(
            min=1, metavar="N", help="Several files of N rows: NAME-00000-of-00012.parquet, ..."
        ),
    ] = None,
    delete_parts: Annotated[
        bool,
        typer.Option(
            "--delete-parts", help="Delete the run's parts once the file was read back, whole."
        ),
    ] = False,
) -> None:
    """One file of a run: every row once, in input order."""
    from ..catalog import discover
    from ..machine import amount
    from ..manifest import Manifest
    from ..merge import Selection, refuse_failed
    from ..merge import merge as merge_run
    from ..screen import rows

    chosen = o.split_list(columns)
    selection = Selection(tuple(chosen) if chosen else None, where, drop_failed, allow_missing)
    manifest = Manifest.open(run)
    if on_error is o.OnError.stop:
        refuse_failed(manifest)
    with passing(manifest.rows) as told:
        merged = merge_run(
            run,
            to,
            discover(),
            selection,
            format,
            into=into,
            rows_per_file=rows_per_file,
            delete_parts=delete_parts,
            told=told,
        )
    failed = f", {merged.failed:,} of them set aside (column error)" if merged.failed else ""
    first, last = merged.paths[0], merged.paths[-1]
    name = first if rows_per_file is None else f"{first} to {last.name}"
    typer.echo(f"{name}: {rows(merged.rows)}{failed}, {amount(merged.bytes)}")
    if delete_parts:
        typer.echo(f"the parts in {run} are deleted", err=True)


@contextlib.contextmanager
def passing(total: int) -> Iterator[Callable[[int], None]]:
    """Shows on stderr how many rows have passed: a bar on a terminal, else a line now and then."""
    from rich import progress
    from rich.console import Console

    from ..screen import QUIET_SECONDS

    console = Console(stderr=True)
    if not console.is_terminal:
        said = time.monotonic()

        def line(rows: int) -> None:
            nonlocal said
            if time.monotonic() - said >= QUIET_SECONDS:
                said = time.monotonic()
                console.print(f"merging   {rows:,} of {total:,} rows", highlight=False)

        yield line
        return
    columns = (
        progress.TextColumn("[bold]merging[/bold]"),
        progress.BarColumn(),
        progress.TextColumn("{task.completed:,.0f} of {task.total:,.0f} rows"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda rows: bar.update(task, completed=rows)
