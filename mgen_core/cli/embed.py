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
    from . import running

    chosen = {"pool": o.split_list(pool), "layers": o.split_list(layers)}
    flags = {
        "data": data,
        "backbone": backbone,
        "output": output,
        "weights": weights,
        "revision": revision,
        "id_col": id_col,
        "x_col": x_col,
        "split": split,
        "reader": reader,
        "limit": limit,
        "max_length": max_length,
        "too_long": too_long,
        "writer": writer,
        "dtype": dtype,
        "precision": precision,
        "batch_tokens": o.parse_batch_tokens(batch_tokens),
        "on_error": on_error,
        "overwrite": overwrite,
        "options": o.parse_options(option) | {k: v for k, v in chosen.items() if v},
    }
    running.start("embed", config, flags, plan_only=plan_only)
