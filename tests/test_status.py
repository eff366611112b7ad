"""`mgen status` and the last lines of a run: what is done, missing and set aside, and what next."""

import io
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import toy
from rich.console import Console
from typer.testing import CliRunner

from mgen_core.cli import app
from mgen_core.cli.running import show_end
from mgen_core.config import make_config
from mgen_core.errors import RunError
from mgen_core.manifest import Manifest
from mgen_core.run import Report, run
from mgen_core.screen import ConsoleScreen, Screen

TEXTS = ["ACD" * 30, *"ACDEFG", "", "A!", "AA!", "~", "G" * 200]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of 12 rows, of which 7 are done and 5 set aside for four reasons."""
    monkeypatch.setattr("mgen_core.parts.PART_BYTES", 0)  # a part a batch
    values = {
        "task": "embed",
        "backbone": "toy",
        "data": (str(toy.write_csv(tmp_path / "in.csv", TEXTS)),),
        "output": tmp_path / "run",
        "batch_tokens": 20,
    }
    run(make_config(values), toy.catalog(), Screen())
    return tmp_path / "run"


def status(folder, *words):
    done = CliRunner().invoke(app, ["status", str(folder), *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_finished_run(folder):
    lines = status(folder).splitlines()
    assert lines[1:5] == [
        "  rows      7 of 12 done",
        "  batches   2 of 2 done",
        f"  set aside 5 rows, kept in {folder}/failed; mgen status {folder} --failed lists them",
        "            2 rows: illegal character '!'",
    ]
    assert sorted(lines[5:8]) == [
        "            1 row: empty sequence",
        "            1 row: longer than 101 tokens",
        "            1 row: output is not finite in float32 (NaN or infinity)",
    ]
    assert lines[8:] == [f"  next      mgen merge {folder}"]


def test_what_is_missing_is_told_in_rows_with_the_command_to_finish(folder):
    _, last = toy.done_lines(folder)
    (folder / last["file"]).unlink()
    lines = status(folder).splitlines()
    assert lines[1] == "  rows      1 of 12 done"
    assert lines[3] == "  missing   7 rows: batches 1"  # 6 good ones, and what was not finite
    command = " ".join(json.loads((folder / "run.json").read_text())["command"])
    assert lines[-1].startswith("  next      ") and lines[-1].endswith(command)
    assert len(lines) < 20


def test_a_bit_that_flips_in_the_record_is_noticed(folder):
    path, draw = folder / "run.json", random.Random(5)
    whole, sound = path.read_bytes(), Manifest.open(folder).record
    refused = 0
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            found = Manifest.open(folder).record
        except RunError as error:
            assert "run.json" in error.what and error.hint
            refused += 1
            continue
        assert [found[key] for key in sound if key != "sha256"] == [
            sound[key] for key in sound if key != "sha256"
        ]
    assert refused > len(whole) // 6


def test_a_record_edited_on_purpose(folder):
    path = folder / "run.json"
    text = path.read_text().replace('"mgen": "', '"mgen": "1')
    path.write_text(text)
    with pytest.raises(RunError, match="not what the run wrote") as caught:
        Manifest.open(folder)
    assert "delete its line 'sha256'" in caught.value.hint
    path.write_text("".join(line for line in text.splitlines(True) if '"sha256"' not in line))
    assert Manifest.open(folder).record["versions"]["mgen"].startswith("1")


def test_a_run_that_was_killed_before_anything_was_done(folder):
    (folder / "done/rank-00000.jsonl").unlink()
    found = json.loads(status(folder, "--json"))
    assert (found["rows_done"], found["rows_missing"], found["rows_set_aside"]) == (0, 8, 4)
    assert found["batches_missing"] == [0, 1]
    assert "  rows      0 of 12 done" in status(folder)


@pytest.mark.parametrize("torn", [b'{"batches": [1], "fi', b"\xff\x00\n", b"[1]\n", b"7\n"])
def test_a_line_of_the_done_log_that_is_torn_does_not_count(folder, torn):
    log = folder / "done/rank-00000.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0] + torn)
    found = json.loads(status(folder, "--json"))
    assert found["batches_missing"] == [1] and found["rows_done"] == 1


def test_rows_set_aside_are_listed_in_input_order(folder):
    lines = status(folder, "--failed").splitlines()
    assert [line.split("\t")[0] for line in lines] == ["7", "8", "9", "10", "11"]
    assert lines[1] == "8\ts1\tillegal character '!' at position 2"
    found = [json.loads(line) for line in status(folder, "--failed", "--json").splitlines()]
    assert found[0] == {"row": 7, "id": "s0", "reason": "empty sequence"}


def test_what_a_plugin_says_is_no_order_to_the_terminal(tmp_path):
    written = io.StringIO()
    screen = ConsoleScreen(Console(file=written, width=40))
    kinds = Counter({"no [/bold] \x1b[2J here :smile:": 3})
    show_end(screen, Report(Path("a run"), 9, 6, 3, 0, kinds))
    assert written.getvalue().splitlines() == [
        "done      6 of 9 rows in a run",
        "set aside 3 rows, kept in a run/failed; mgen status 'a run' --failed lists them",
        r"          3 rows: no [/bold] \x1b[2J here :smile:",
        "next      mgen merge 'a run'",
    ]
    written.truncate(0)
    show_end(screen, Report(Path("run"), 9, 6, 1, 2, Counter({"empty sequence": 1}), 15))
    assert "6 of 9 rows are done in run; the same command goes on" in written.getvalue()
    assert "1 row: empty sequence" in written.getvalue()
    assert "merge" not in written.getvalue()
