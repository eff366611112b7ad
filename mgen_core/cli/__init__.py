"""The command line. Commands parse options and make one call; errors become messages here."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Optional

import typer

from ..errors import MgenError, Stopped, printable
from . import doctor, embed, infer, listing, merge, plugins, predict, run, status, test

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Run pretrained biological foundation models over a table; keep every row.",
    epilog="Start with: mgen list backbones. Then: mgen embed --backbone NAME data.csv && "
    "mgen merge predictions",
)


def _version(show: bool) -> None:
    if show:
        from importlib.metadata import version

        typer.echo(f"mgen {version('mgen')}")
        raise typer.Exit


@app.callback()
def mgen(
    version: Annotated[
        Optional[bool],
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


app.command("embed")(embed.embed)
app.command("infer")(infer.infer)
app.command("predict", cls=predict.PredictCommand)(predict.predict)
app.command("test", cls=predict.PredictCommand)(test.test)
app.command("run")(run.run)
app.command("merge")(merge.merge)
app.command("status")(status.status)
app.command("list")(listing.list_cards)
app.command("doctor")(doctor.doctor)
app.command("plugins")(plugins.plugins)


def main() -> None:
    """The `mgen` script. A user's mistake is two lines and exit code 1, never a traceback."""
    try:
        app()
    except MgenError as error:
        sys.stderr.write(f"error: {_shown(error.what)}\n")
        if error.hint:
            sys.stderr.write(f"  try: {_shown(error.hint)}\n")
        code = 128 + error.signal if isinstance(error, Stopped) else 1
    except BrokenPipeError:  # `mgen list backbones | head`
        sys.stderr.close()
        code = 0
    except KeyboardInterrupt:  # before a run listens for it
        code = 128 + signal.SIGINT
    # Not inside the handlers: the error would keep half-read files open until the very end,
    # where the threads that read them may outlive the interpreter.
    sys.exit(code)


def _shown(text: str) -> str:
    """A message that may hold text of files: it gives the terminal no orders."""
    return "\n".join(map(printable, text.split("\n")))
