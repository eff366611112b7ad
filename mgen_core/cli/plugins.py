"""`mgen plugins`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import options as o


def plugins(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the traceback of a broken plugin.")
    ] = False,
    as_json: o.Json = False,
) -> None:
    """The installed plugins: what each offers, or what is wrong with it."""
    import json

    from ..catalog import discover
    from .listing import show

    found = discover().plugins
    rows = [
        {
            "name": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "import ms": round(plugin.seconds * 1000, 1),
            "offers": [card.name for card in plugin.cards],
            "problem": plugin.problem,
        }
        for plugin in found
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    show(rows)
    for plugin in found:
        if verbose and plugin.traceback:
            typer.echo(f"\n{plugin.distribution}:\n{plugin.traceback}")
