"""The README's two commands are the ones that the checks run."""

import re

from docs.pages import ROOT, blocks

COMMANDS = [block.text for block in blocks(ROOT / "README.md") if block.language == "bash"]


def test_the_first_command_installs_everything_and_runs_a_real_job():
    first = COMMANDS[0]
    assert re.search(r"pip install --quiet -c constraints\.txt \. \./plugins/mgen-\*", first)
    assert "mgen embed --backbone antiberty examples/antibodies.csv" in first
    assert "mgen merge" in first
    assert (ROOT / "constraints.txt").exists()
    missing = [
        path for path in ROOT.glob("plugins/mgen-*") if not (path / "pyproject.toml").exists()
    ]
    assert not missing


def test_the_second_command_is_what_ci_runs():
    assert COMMANDS[1].strip() in (ROOT / ".ci/run").read_text()


def test_nox_runs_the_tests():
    text = (ROOT / "noxfile.py").read_text()
    (sessions,) = re.findall(r"^nox\.options\.sessions = \[(.*)\]", text, re.MULTILINE)
    assert '"tests"' in sessions.split(", ")
