"""`mgen infer`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Optional

import typer

from . import options as o


class Kind(str, Enum):
    """What is told of each residue."""

    probs = "probs"
    logprobs = "logprobs"
    logits = "logits"
    tokens = "tokens"


class Alphabet(str, Enum):
    """Over which tokens."""

    full = "full"
    residues = "residues"


class Score(str, Enum):
    """What is told of each row."""

    pll = "pll"
    masked_pll = "masked-pll"


def infer(
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
    kind: Annotated[
        Optional[Kind],
        typer.Option(
            help="Vectors over the vocabulary, or the likeliest token (tokens). Default: probs.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    alphabet: Annotated[
        Optional[Alphabet],
        typer.Option(
            help="Over all tokens, or over residue letters alone, renormalised. Default: full.",
            rich_help_panel=o.OUTPUT,
        ),
    ] = None,
    score: Annotated[
        Optional[Score],
        typer.Option(
            help="Instead, one number a row: the pseudo-log-likelihood, in one pass, or with each "
            "residue masked in turn.",
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
    """Token probabilities of each residue, or a score of each row.

    Leaves a run directory; `mgen merge` makes one file of it.

    Started again, the same command goes on where it was stopped.
    """
    given = dict(locals())
    chosen = {name: given.pop(name) for name in ("kind", "alphabet", "score")}
    o.start("infer", given, chosen)
