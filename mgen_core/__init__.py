"""mgen: run pretrained biological foundation models over a table.

The names below are the public interface: what a plugin imports and what a notebook calls.
Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .alphabet import Alphabet
from .api import (
    Activations,
    Backbone,
    BackboneCard,
    BackboneOptions,
    Columns,
    Inputs,
    Ragged,
    Reader,
    ReaderCard,
    ReaderOptions,
    Row,
    Rows,
    Task,
    TaskCard,
    TaskOptions,
    Want,
    Writer,
    WriterCard,
)
from .errors import InputError, MgenError, PluginError, RowError, RunError, WeightsError
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from .aside import failures
    from .notebook import embed, infer, read, run_task
    from .objects import place

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Alphabet",
    "Backbone",
    "BackboneCard",
    "BackboneOptions",
    "Columns",
    "InputError",
    "Inputs",
    "MgenError",
    "PluginError",
    "Ragged",
    "Reader",
    "ReaderCard",
    "ReaderOptions",
    "Row",
    "RowError",
    "Rows",
    "RunError",
    "Task",
    "TaskCard",
    "TaskOptions",
    "Want",
    "WeightsError",
    "Writer",
    "WriterCard",
    "embed",
    "failures",
    "hookimpl",
    "infer",
    "place",
    "read",
    "run_task",
]


def __getattr__(name: str) -> Any:
    # These pull in the whole run; plugins and `--help` must not pay for that.
    if name == "failures":
        from .aside import failures

        return failures
    if name == "place":
        from .objects import place

        return place
    if name in ("embed", "infer", "read", "run_task"):
        from . import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'mgen_core' has no attribute {name!r}")
