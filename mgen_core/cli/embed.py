"""`mgen embed`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from . import options as o


def embed(
    data: o.Data = None,
    backbone: o.Backbone = None,
    weights: o.Weights = None,
    revision: o.Revision = None,
    precision: o.PrecisionOption = None,
    option: o.Option = None,
    id_col: o.IdCol = None,
    x_col: o.XCol = None,
    split: o.Split = None,
    reader: o.Reader = None,
    limit: o.Limit = None,
    max_length: o.MaxLength = None,
    too_long: o.TooLongOption = None,
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
    output: o.Output = None,
    writer: o.Writer = None,
    dtype: o.DtypeOption = None,
    overwrite: o.Overwrite = False,
    plan_only: o.PlanOnly = False,
    batch_tokens: o.BatchTokens = None,
    on_error: o.OnErrorOption = None,
    config: o.Config = None,
) -> None:
    """Embeddings: one vector a row, or one a residue.

    Leaves a run directory; `mgen merge` makes one file of it.

    Started again, the same command goes on where it was stopped.
    """
    given = dict(locals())
    chosen = {name: o.split_list(given.pop(name)) for name in ("pool", "layers")}
    o.start("embed", given, chosen)
