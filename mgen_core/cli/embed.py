"""`mgen embed`."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from . import options as o


@o.run_command("embed")
def embed(
    pool: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="mean|max|cls|tokens",
            help="One vector a row, or one a residue (tokens); repeatable. Default: mean.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    layers: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="N,...",
            help="Layers: 0 embeddings, -1 last; repeatable. Default: -1.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
) -> dict[str, Any]:
    """Embeddings: one vector a row, or one a residue.

    Leaves a run directory; `mgen merge` makes one file of it.

    Started again, the same command goes on where it was stopped.
    """
    return {"pool": o.split_list(pool), "layers": o.split_list(layers)}
