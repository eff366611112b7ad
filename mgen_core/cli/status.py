"""`mgen status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")],
    as_json: o.Json = False,
) -> None:
    """What a run has done, what is missing, and what to type next."""
    import json

    from ..manifest import Manifest
    from ..merge import listed

    manifest = Manifest.open(run)
    done = manifest.done()
    missing = manifest.missing(done)
    found = {
        "run": str(run),
        "task": manifest.record["identity"]["task"],
        "backbone": manifest.record["identity"]["backbone"],
        "rows": manifest.rows,
        "rows_done": sum(part.rows for part in done.values()),
        "rows_set_aside": manifest.failed(done),
        "batches": manifest.batches,
        "batches_done": len(done),
        "next": manifest.command() if missing else f"mgen merge {run}",
    }
    if as_json:
        typer.echo(json.dumps({**found, "batches_missing": missing}))
        return
    typer.echo(f"{run}: {found['task']} with {found['backbone']}")
    typer.echo(f"  rows      {found['rows_done']:,} of {found['rows']:,} done")
    typer.echo(f"  batches   {found['batches_done']:,} of {found['batches']:,} done")
    if missing:
        typer.echo(f"  missing   batches {listed(missing)}")
    if found["rows_set_aside"]:
        typer.echo(f"  set aside {found['rows_set_aside']:,} rows, reasons in {run / 'failed'}")
    typer.echo(f"  next      {found['next']}")
