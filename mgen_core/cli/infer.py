"""`mgen infer`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Optional

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


@o.run_command("infer")
def infer(
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
) -> dict[str, Any]:
    """Token probabilities of each residue, or a score of each row.

    Leaves a run directory; `mgen merge` makes one file of it.

    Started again, the same command goes on where it was stopped.
    """
    return {"kind": kind, "alphabet": alphabet, "score": score}
