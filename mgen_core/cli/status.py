"""`mgen status`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from ..manifest import Manifest


def status(
    run: o.RunFolder,
    failed: Annotated[
        bool,
        typer.Option("--failed", help="List the rows that were set aside: row, id and reason."),
    ] = False,
    as_json: o.Json = False,
) -> None:
    """What a run has done, what is missing, what was set aside, and what to type next."""
    import json

    from ..manifest import Manifest

    manifest = Manifest.open(run)
    if failed:
        list_failed(manifest, as_json=as_json)
        return
    found = facts(manifest)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        show(found, run)


def facts(manifest: Manifest) -> dict[str, Any]:
    """What `--json` prints."""
    import shlex

    from ..aside import kinds
    from ..spent import merged_files

    folder = shlex.quote(str(manifest.folder))
    done = manifest.done()
    missing = manifest.missing(done)
    computed, failed = sum(part.rows for part in done), manifest.failed(done)
    return {
        "run": str(manifest.folder),
        "task": manifest.record["identity"]["task"],
        "backbone": manifest.record["identity"]["backbone"],
        "rows": manifest.rows,
        "rows_done": computed,
        "rows_missing": manifest.rows - computed - failed,
        "rows_set_aside": failed,
        "set_aside": dict(kinds(manifest, done).most_common()),
        "batches": manifest.batches,
        "batches_done": manifest.batches - len(missing),
        "batches_missing": missing,
        "merged": merged_files(manifest) if missing else [],
        "next": manifest.command() if missing else f"mgen merge {folder}",
    }


def show(found: dict[str, Any], run: Path) -> None:
    """The same in lines, few enough for a screen."""
    from collections import Counter

    from ..aside import kind_lines, where_told
    from ..merge import listed
    from ..screen import rows

    typer.echo(f"{run}: {found['task']} with {found['backbone']}")
    typer.echo(f"  rows      {found['rows_done']:,} of {found['rows']:,} done")
    typer.echo(f"  batches   {found['batches_done']:,} of {found['batches']:,} done")
    if found["merged"]:
        typer.echo(f"  merged    to {listed(found['merged'], 3)}; then the parts were deleted")
        return
    if found["batches_missing"]:
        batches = listed(found["batches_missing"])
        typer.echo(f"  missing   {rows(found['rows_missing'])}: batches {batches}")
    if found["rows_set_aside"]:
        typer.echo(f"  set aside {rows(found['rows_set_aside'])}{where_told(run)}")
        for line in kind_lines(Counter(found["set_aside"])):
            typer.echo(f"            {line}")
    typer.echo(f"  next      {found['next']}")


def list_failed(manifest: Manifest, *, as_json: bool) -> None:
    """A line for each row that was set aside, in input order: tabs between, or JSON."""
    from ..aside import set_aside
    from ..errors import printable

    for failure in set_aside(manifest, manifest.done()):
        told = "\t".join(printable(str(value)) for value in failure)
        typer.echo(failure.line().rstrip() if as_json else told)
