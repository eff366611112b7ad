"""`mgen list`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from ..api import BackboneCard, Card


class Kind(str, Enum):
    """What there is to list."""

    backbones = "backbones"
    tasks = "tasks"
    readers = "readers"
    writers = "writers"


def list_cards(
    kind: Annotated[Kind, typer.Argument(help="What to list.")], as_json: o.Json = False
) -> None:
    """What the installed plugins offer."""
    import json

    from ..catalog import KINDS, discover

    offers = discover().offers(KINDS[kind.value.removesuffix("s")])
    rows = [{**_facts(offer.card), "plugin": offer.distribution} for offer in offers]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """Rows as a table, as wide as they need: nothing is cut where the output is a pipe."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=300)
    table = Table(box=None, pad_edge=False)
    names = list(rows[0]) if rows else ["nothing"]
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=name == "name")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in names))
    console.print(table)


def _facts(card: Card) -> dict[str, Any]:
    from ..api import BackboneCard, ReaderCard, WriterCard

    facts: dict[str, Any] = {"name": card.name}
    if isinstance(card, BackboneCard):
        facts |= {
            "modality": card.modality,
            "width": card.width,
            "max tokens": card.max_tokens,
            "parameters": card.parameters,
            "licence": card.licence,
            "weights": _weights(card),
        }
    elif isinstance(card, ReaderCard):
        facts["suffixes"] = list(card.suffixes)
    elif isinstance(card, WriterCard):
        facts["suffix"] = card.suffix
    return {**facts, "summary": card.summary}


def _weights(card: BackboneCard) -> str:
    if card.weights_required:
        return "yours: --weights"
    if card.parameters == 0:
        return "none needed"
    return card.weights[0] if card.weights else f"random, of seed {card.seed}"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(value)
    return f"{value:,}" if isinstance(value, int) else str(value)
