"""`mgen test`: a run on labelled rows, then how good its predictions are."""

from __future__ import annotations

import os
from typing import Annotated, Any, Optional

import typer

from . import options as o
from . import predict


def start(task: str | None, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Check the labels, run, and once all rows are there compare them: in one process."""
    from ..join import LAUNCHER, LOCAL
    from . import running
    from .labels import compare, find_labels, tell

    y_col, as_json, plan_only = chosen.pop("y_col"), chosen.pop("as_json"), given.pop("plan_only")
    asked = predict.ask(task, given, chosen)
    asked.check(plan_only)
    config, rows = asked.open()
    if os.environ.get(LAUNCHER) == LOCAL:  # a rank of another mgen, which does the rest
        running.start(config, plan_only=plan_only, rows=rows)
        return
    labels = find_labels(asked, config, rows, o.split_list(y_col))
    labels.check()
    asked.tell(rows)
    if not plan_only:
        asked.check_weights()
    try:
        running.start(config, plan_only=plan_only, rows=rows)
    except typer.Exit as end:
        if end.exit_code and predict.speaks():
            _say("metrics", "none: they need every row, and some are not done")
        if end.exit_code or config.hostfile is not None:  # rank 0 of the hosts has compared them
            raise
    if not plan_only and predict.speaks():
        tell(compare(config, labels), as_json=as_json)
        _say("written", f"metrics.json and its picture in {config.output}")


def _say(label: str, text: str) -> None:
    typer.echo(f"{label:<9} {text}", err=True)


@o.run_command(start=start)
def test(
    ctx: typer.Context = None,  # type: ignore[assignment]  # typer gives one
    ckpt: predict.Ckpt = None,
    y_col: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="A,B,...",
            rich_help_panel=o.INPUT,
            help="Column with the labels, or one for each output. Default: that of the config, "
            "else labels or label.",
        ),
    ] = None,
    label_mean: predict.LabelMean = None,
    label_std: predict.LabelStd = None,
    label_stats: predict.LabelStats = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="JSON instead of a table.", rich_help_panel=o.OUTPUT),
    ] = False,
) -> dict[str, Any]:
    """How good a fine-tuned model is on labelled rows: predictions as of `predict`, and metrics.

    Prints them, and leaves them in the run directory: metrics.json, and a picture.
    """
    return {
        "sources": ctx.meta["sources"],
        "y_col": y_col,
        "label_mean": label_mean,
        "label_std": label_std,
        "label_stats": label_stats,
        "as_json": as_json,
    }
