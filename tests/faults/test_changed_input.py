"""An input that changes between two starts, or while it is read: what was planned is computed."""

import copy
from collections import Counter

import numpy as np
import pytest
import toy
from faults import tiny

from mgen_core import InputError, Row, Rows, RunError
from mgen_core.plan import Batch, Entry, Window

BEFORE = ["ACD", "FFGH", "GH" * 9, "ACD", "E" * 14, "CC", "HAC", "DEF" * 5, "AA"]


class Changing(Rows):
    """A table that has other rows from its second reading on."""

    columns = ("id", "sequence")

    def __init__(self, first, later):
        self.readings = iter([first, later])

    def chunks(self, columns):
        texts = next(self.readings)
        table = {"id": [f"s{n}" for n in range(len(texts))], "sequence": texts}
        yield {name: table[name] for name in columns}

    def digest(self):
        return "taken at the start"


def edited(place, text):
    return [*BEFORE[:place], text, *BEFORE[place + 1 :]]


@pytest.mark.parametrize(
    ("later", "batches"),
    [
        (edited(1, "FFGA"), 0),  # as long as it was
        (edited(8, "AC"), 2),
        (edited(0, "AC!D"), 0),
        (BEFORE[:-1], 2),
        (BEFORE[:4], 1),
        ([*BEFORE, "CC"], 2),
        (["ACD", *BEFORE], 0),
    ],
)
def test_rows_that_changed_since_they_were_planned_are_not_computed(
    tmp_path, catalog, monkeypatch, later, batches
):
    tiny.make_small(monkeypatch)
    run = tmp_path / "run"
    with pytest.raises(InputError, match="was changed while mgen was reading it") as caught:
        tiny.start("rows", run, catalog, rows=Changing(BEFORE, later))
    assert "restore it" in caught.value.hint
    done = {number for part in tiny.acknowledged(run) for number in part.batches}
    assert len(done) >= batches  # windows before the change are as they were planned
    # Restored, the run goes on, and nothing of the other rows is in it.
    tiny.start("rows", run, catalog, rows=Changing(BEFORE, BEFORE))
    tiny.start("rows", tmp_path / "whole", catalog, rows=Changing(BEFORE, BEFORE))
    whole = tiny.merged(tmp_path / "whole", catalog).read_bytes()
    assert tiny.merged(run, catalog).read_bytes() == whole


def test_rows_that_changed_before_they_were_planned_are_not_mixed_with_others(
    tmp_path, catalog, monkeypatch
):
    """The digest is taken first: it may be of rows that nobody planned."""
    tiny.make_small(monkeypatch)
    run, later = tmp_path / "run", edited(1, "FFGA")
    tiny.start("rows", run, catalog, rows=Changing(later, later))
    with pytest.raises(RunError, match="its plan differs"):
        tiny.start("rows", run, catalog, rows=Changing(BEFORE, BEFORE))


def test_an_input_that_changed_between_two_starts_is_refused(tmp_path, catalog):
    data = toy.write_csv(tmp_path / "in.csv", BEFORE)
    tiny.start(data, tmp_path / "run", catalog)
    toy.write_csv(data, edited(1, "FFGA"))
    with pytest.raises(RunError, match="input has changed") as caught:
        tiny.start(data, tmp_path / "run", catalog)
    assert "--overwrite" in caught.value.hint


def digest(data, **fields):
    entry = Entry(3, (Row(0, "a", data, fields),))
    return Window(0, 1, (Batch(0, (entry,), 3),), (), Counter()).digest()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ACD", "ACE"),
        (np.arange(3), np.array([0, 1, 3])),
        (np.ones((2, 4), np.float16)[:, ::2], np.ones((2, 2), np.float16) * 2),
        ({"genes": np.arange(2), "counts": [1, 2]}, {"genes": np.arange(2), "counts": [1, 3]}),
        (("AC", b"D"), ("AC", b"E")),
        (None, 0),
    ],
)
def test_data_of_any_kind_is_told_from_other_data(one, other):
    assert digest(one) == digest(copy.deepcopy(one)) != digest(other)
    assert digest("A", more=one) == digest("A", more=copy.deepcopy(one)) != digest("A", more=other)


def test_data_without_bytes_is_not_taken_for_other_data():
    """It would be refused at every start: what `repr` tells of an object is where it lies."""
    assert digest(object()) == digest(object())
    assert digest(np.array([object()])) == digest(np.array([object()]))
