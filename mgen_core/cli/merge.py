"""`mgen merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..objects import place
from . import options as o


def merge(
    run: o.RunFolder,
    to: Annotated[
        Optional[Path],
        typer.Option(
            parser=place,
            metavar="FILE|URL",
            help="The file to write. Default: RUN.parquet, beside RUN.",
        ),
    ] = None,
    format: Annotated[
        Optional[str], typer.Option(help="Its format, where the suffix does not tell.")
    ] = None,
    columns: Annotated[
        Optional[list[str]], typer.Option(metavar="A,B,...", help="Only these columns.")
    ] = None,
    where: Annotated[
        Optional[str],
        typer.Option(metavar="SQL", help="Only rows for which it holds, as in \"id LIKE 'P0%'\"."),
    ] = None,
    drop_failed: Annotated[
        bool, typer.Option("--drop-failed", help="Leave out rows that were set aside.")
    ] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Merge what there is of an unfinished run.")
    ] = False,
) -> None:
    """One file of a run: every row once, in input order."""
    from ..catalog import discover
    from ..machine import amount
    from ..merge import Selection
    from ..merge import merge as merge_run
    from ..screen import rows

    chosen = o.split_list(columns)
    selection = Selection(tuple(chosen) if chosen else None, where, drop_failed, allow_missing)
    merged = merge_run(run, to, discover(), selection, format)
    failed = f", {merged.failed:,} of them set aside (column error)" if merged.failed else ""
    typer.echo(f"{merged.path}: {rows(merged.rows)}{failed}, {amount(merged.bytes)}")
