"""`mgen run`."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from . import options as o


@o.run_command()
def run(
    task: Annotated[
        Optional[str], typer.Option(help="The task: `mgen list tasks`.", rich_help_panel=o.MODEL)
    ] = None,
) -> dict[str, Any]:
    """Any installed task, by name; its options go into --option.

    Leaves a run directory; `mgen merge` makes one file of it.

    Started again, the same command goes on where it was stopped.
    """
    return {"task": task}
