"""What can go wrong, as a tree.

- `MgenError`: a user can mend it. Shown as two lines (what, how to mend it), exit code 1.
  - `InputError`: the table, a column, a file to read.
  - `PluginError`: a plugin is missing, broken or breaks its contract.
  - `WeightsError`: a checkpoint is absent, incomplete or does not fit the model.
  - `RunError`: the run directory, a part, a merge.
  - `Stopped`: a signal came before anything was computed.
- `RowError`: one row cannot be computed. The row is set aside, the run goes on.

Anything else that escapes is a bug in mgen and keeps its traceback.
"""

from __future__ import annotations


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
