"""Rewrites reference/cli.md from `mgen --help`: python docs/cli_reference.py"""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from mgen_core.cli import app

PAGE = Path(__file__).parent / "reference/cli.md"
INTRODUCTION = """\
# Command line

What `--help` prints, written here by `python docs/cli_reference.py`.
"""


def render() -> str:
    """The whole page."""
    commands = [command.name for command in app.registered_commands if command.name]
    return "\n".join([INTRODUCTION, *(_section(words) for words in ([], *([c] for c in commands)))])


def _section(words: list[str]) -> str:
    arguments = [*words, "--help"]
    shown = CliRunner().invoke(app, arguments, prog_name="mgen", env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    text = "\n".join(line.rstrip() for line in shown.output.strip().splitlines())
    return f"## {' '.join(['mgen', *words])}\n\n```text\n{text}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
