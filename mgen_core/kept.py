"""Kinds of the values that go from the input to the result as they are.

A column has one type in all parts of a run, which are written before the last row is seen: so the
plan, which sees all of them, gathers the kinds of a column's values.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

OWN = frozenset({"row", "id", "error"})
"""Columns that every result has."""

TEXT = "text"
MISSING = "missing"


def kind(value: Any) -> str:
    """How one value can be stored: "bool", "int", "float", "text", or "missing"."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else TEXT
    return "float" if isinstance(value, float) else TEXT


def common(kinds: Collection[str]) -> str:
    """The kind that holds values of all these kinds."""
    found = set(kinds) - {MISSING}
    if found == {"int", "float"}:
        return "float"
    return found.pop() if len(found) == 1 else TEXT


def as_kind(value: Any, kind: str) -> Any:
    """A value as one of a kind that holds it; lists and mappings as JSON."""
    if value is None or kind in ("bool", "int"):
        return value
    if kind == "float":
        return float(value)
    text = value if isinstance(value, str) else _written(value)
    # Half a surrogate pair, which JSON allows, is no text: no file could hold it.
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _written(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, default=str, ensure_ascii=False)
    return str(value)
