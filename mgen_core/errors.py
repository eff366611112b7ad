"""What can go wrong, as a tree.

- `MgenError`: a user can mend it. Shown as two lines (what, how to mend it), exit code 1.
  - `InputError`: the table, a column, a file to read.
  - `PluginError`: a plugin is missing, broken or breaks its contract.
  - `WeightsError`: a checkpoint is absent, incomplete or does not fit the model.
  - `RunError`: the run directory, a part, a merge.
  - `Stopped`: a signal came before anything was computed.
- `RowError`: one row cannot be computed. The row is set aside, the run goes on.

What else a plugin raises over a row is a defect of the plugin: it costs that row, too (`blaming`).
Anything else that escapes is a bug in mgen and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any, Protocol


class MgenError(Exception):
    """A mistake that the user can mend.

    `what` says what happened and to which value; `hint` says what to do next.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class InputError(MgenError):
    """The input table cannot be read as asked."""


class PluginError(MgenError):
    """A plugin is missing, broken, ambiguous, or breaks its contract."""


class WeightsError(MgenError):
    """Weights are absent, incomplete, or do not fit the model."""


class RunError(MgenError):
    """The run directory cannot be used, completed or merged."""


class Stopped(MgenError):
    """SIGTERM or Ctrl-C came before anything was computed."""

    def __init__(self, signal: int) -> None:
        super().__init__("stopped before anything was computed", "start the same command again")
        self.signal = signal


class RowError(Exception):
    """This row cannot be computed; `str(error)` is the reason shown to the user."""


# --------------------------------------------------------------------------- defects of plugins

DEFECT = " failed with "
MOST_LETTERS = 200


class Named(Protocol):
    """What is known of a plugin: its card."""

    @property
    def name(self) -> str: ...

    @property
    def load(self) -> Any: ...


@contextlib.contextmanager
def blaming(card: Named) -> Iterator[None]:
    """What a plugin raises unawares becomes a `RowError` that names it."""
    try:
        yield
    except (MgenError, RowError):
        raise
    except Exception as error:
        raise defect(card, error) from error


@contextlib.contextmanager
def opening(card: Named) -> Iterator[None]:
    """What a plugin raises unawares when it is loaded or built becomes a `PluginError`."""
    try:
        yield
    except MgenError:
        raise
    except Exception as error:
        lacks = "install what it lacks, or " if isinstance(error, ImportError) else ""
        raise PluginError(str(defect(card, error)), f"{lacks}report it to its author") from error


def defect(card: Named, error: Exception) -> RowError:
    """The reason to set a row aside over which a plugin stumbled: its name, what and where."""
    return RowError(f"{card.name}{DEFECT}{told(error)} ({line_of(card, error)})")


def told(error: BaseException) -> str:
    """An exception in a line: its type, and the first line of its text."""
    text = str(error).strip().partition("\n")[0]
    if len(text) > MOST_LETTERS:
        text = f"{text[: MOST_LETTERS - 3]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def line_of(card: Named, error: BaseException) -> str:
    """Where it was raised: the last line of the plugin's own code on the way there."""
    package = str(getattr(card.load, "__module__", "")).partition(".")[0]
    frames = list(traceback.walk_tb(error.__traceback__))
    names = [(str(frame.f_globals.get("__name__", "?")), line) for frame, line in frames]
    own = [place for place in names if place[0].partition(".")[0] == package]
    module, line = (own or names or [("?", 0)])[-1]
    return f"{module.replace('.', '/')}.py:{line}"


def printable(text: str) -> str:
    """The text with what a terminal, or a line of text, would take for an order written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
