"""A row that a plugin stumbles over is set aside with the reason; the others come out as ever."""

from collections import Counter

import pytest
import torch
import toy

from mgen_core import (
    BackboneCard,
    InputError,
    PluginError,
    Reader,
    ReaderCard,
    RowError,
    RunError,
    Task,
    TaskCard,
    Want,
    WriterCard,
    failures,
    hookimpl,
)
from mgen_core.aside import kind_lines, kinds
from mgen_core.catalog import Catalog
from mgen_core.config import make_config
from mgen_core.manifest import Manifest
from mgen_core.merge import Selection, read
from mgen_core.notebook import MemoryRows
from mgen_core.run import run
from mgen_core.screen import Screen


class Stumble(Exception):
    """What a plugin's author did not think of."""


MENDED = []


def check(place, rows):
    """Raise over a row, or a text, that names the place."""
    for row in rows:
        if place in str(row) and place not in MENDED:
            raise Stumble(f"over {place}")


class Faulty(toy.Toy):
    def prepare(self, row):
        check("prepare", [row])
        return row

    def measure(self, row):
        check("measure", [row])
        return super().measure(row)

    def collate(self, rows):
        check("collate", rows)
        return {**super().collate(rows), "rows": rows}

    def forward(self, module, inputs, want):
        check("forward", inputs["rows"])
        if any("memory" in row.data for row in inputs["rows"]):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return super().forward(module, inputs, want)


class FaultyTask(Task):
    """The mean code of a row, of two variants of it."""

    needs = Want(layers=(1,))

    def variants(self, row):
        check("variants", [row])
        return [row, row.with_data(row.data[::-1])]

    def columns(self, activations, rows):
        check("columns", rows)
        check("snmuloc", rows)  # the second variant alone
        codes = activations.layer(1)[..., 0]
        means = (codes * activations.mask).sum(1) / activations.mask.sum(1)
        return {"mean": means, "text": [str(row.data) for row in rows]}

    def gather(self, columns, counts):
        check("gather", columns["text"])
        assert set(counts) == {2}
        return {"mean": columns["mean"].reshape(-1, 2).mean(1), "text": columns["text"][::2]}

    def values(self, rows, tokens):
        return rows


class Lines(Reader):
    """Lines; `?` is a cell that cannot be read, `!` breaks the reader, `%` the disk."""

    def open(self, uri):
        class Rows(MemoryRows):
            def chunks(self, columns):
                for (text,) in zip(self._columns["sequence"]):
                    if text == "!":
                        raise Stumble("over a line")
                    if text == "%":
                        raise OSError(5, "Input/output error")
                    yield {"sequence": [RowError("line 3 is torn") if text == "?" else text]}

        with open(uri) as file:
            return Rows({"sequence": file.read().split("\n")})


class Plugin:
    @hookimpl
    def mgen_backbones(self):
        return [toy.CARD.__class__(**{**vars(toy.CARD), "name": "faulty", "load": Faulty})]

    @hookimpl
    def mgen_tasks(self):
        return [TaskCard("faulty_task", "", lambda *given: FaultyTask(*given))]

    @hookimpl
    def mgen_readers(self):
        return [ReaderCard("lines", "", Lines, suffixes=(".lines",))]


CATALOG = Catalog((*toy.catalog().plugins, *Catalog.of(Plugin()).plugins))
GOOD = [letter * length for length in (3, 9, 20, 30) for letter in "ACDEFGH"]


def start(folder, texts, **more):
    data = folder / "in.lines"
    data.write_text("\n".join(texts))
    values = {
        "task": "faulty_task",
        "backbone": "faulty",
        "data": (str(data),),
        "output": folder / "run",
        "batch_tokens": 100,
        **more,
    }
    return run(make_config(values), CATALOG, Screen())


def merged(folder):
    return read(folder / "run", CATALOG, Selection()).to_pylist()


PLACES = {
    "prepare": "faulty failed with Stumble: over prepare",
    "measure": "faulty failed with Stumble: over measure",
    "variants": "faulty_task failed with Stumble: over variants",
    "collate": "faulty failed with Stumble: over collate",
    "forward": "faulty failed with Stumble: over forward",
    "memory": "out of memory with one row alone: 19 tokens",
    "columns": "faulty_task failed with Stumble: over columns",
    "snmuloc": "faulty_task failed with Stumble: over snmuloc",
    "gather": "faulty_task failed with Stumble: over gather",
    "~": "output is not finite in float32 (NaN or infinity)",
    "?": "lines cannot read it: line 3 is torn",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_row_that_fails_costs_itself(tmp_path, place):
    bad = place if place == "?" else place.center(18, "K")
    texts = [*GOOD[:13], bad, *GOOD[13:], bad.replace("K", "L")]
    report = start(tmp_path, texts)
    assert (report.rows, report.done, report.failed) == (30, 28, 2)
    rows = merged(tmp_path)
    told = [row.pop("error") for row in rows]
    assert [number for number, error in enumerate(told) if error] == [13, 29]
    assert all(error.startswith(PLACES[place]) for error in (told[13], told[29]))
    if "failed with" in PLACES[place]:
        assert "test_aside.py:" in told[13], "where"
    for number, text in enumerate(texts):
        mean = None if told[number] else sum(map(ord, text)) / len(text)
        assert rows[number]["mean"] == (mean and pytest.approx(mean, rel=1e-6))
    found = list(failures(tmp_path / "run"))
    assert [(failure.row, failure.id) for failure in found] == [(13, "13"), (29, "29")]
    assert [failure.reason for failure in found] == [told[13], told[29]]


@pytest.mark.parametrize("place", PLACES)
def test_on_error_stop_ends_at_the_first(tmp_path, place):
    bad = place if place == "?" else place.center(18, "K")
    with pytest.raises(RunError, match=rf"row 28 \(id 28\): {PLACES[place].split(' (')[0]}"):
        start(tmp_path, [*GOOD, bad], on_error="stop")
    report = start(tmp_path, [*GOOD, bad])
    assert (report.done, report.failed) == (28, 1)


def test_no_room_for_the_rows_set_aside_while_planning(tmp_path, monkeypatch):
    monkeypatch.setattr("mgen_core.run.IN_MEMORY", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(RunError, match="cannot keep the rows set aside for now: No such") as caught:
        start(tmp_path, [*GOOD, "?"])
    assert "TMPDIR" in caught.value.hint
    assert not list((tmp_path / "run").glob("*.json"))
    monkeypatch.undo()
    assert start(tmp_path, [*GOOD, "?"]).failed == 1


def test_many_reasons_in_one_table_in_input_order_and_counted(tmp_path):
    bad = [place.center(18, "K") for place in PLACES if place != "?"]
    mixed = [text for pair in zip(GOOD, bad) for text in pair] + GOOD[len(bad) :] + ["?", "A"]
    report = start(tmp_path, mixed)
    assert (report.done, report.failed) == (29, len(PLACES))
    found = list(failures(tmp_path / "run"))
    assert [failure.row for failure in found] == [*range(1, 2 * len(bad), 2), len(mixed) - 2]
    manifest = Manifest.open(tmp_path / "run")
    counts = kinds(manifest, manifest.done())
    assert counts["faulty failed with Stumble"] == 4 and counts.total() == len(PLACES)
    lines = kind_lines(counts)
    assert lines[:2] == [
        "4 rows: faulty failed with Stumble",
        "4 rows: faulty_task failed with Stumble",
    ]
    assert kind_lines(Counter({letter: 1 for letter in "ABCDEFG"}))[-1] == "2 rows: 2 other reasons"


def test_rows_set_aside_are_not_tried_again(tmp_path, monkeypatch):
    texts = [*GOOD, "K~", "forward"]
    start(tmp_path, texts)
    whole = merged(tmp_path)
    good = [line for line in toy.done_lines(tmp_path / "run") if not line["failed"]]
    (tmp_path / "run" / good[0]["file"]).unlink()
    ran = []
    forward = Faulty.forward

    def watched(self, module, inputs, want):
        ran.extend(row.data for row in inputs["rows"])
        return forward(self, module, inputs, want)

    monkeypatch.setattr(Faulty, "forward", watched)
    assert start(tmp_path, texts).failed == 2
    assert ran and not {"K~", "forward"} & set(ran)
    assert merged(tmp_path) == whole


EVERYTHING = {
    "collate": (PluginError, "faulty failed with Stumble: over collate"),
    "forward": (PluginError, "faulty failed with Stumble: over forward"),
    "columns": (PluginError, "faulty_task failed with Stumble: over columns"),
    "gather": (PluginError, "faulty_task failed with Stumble: over gather"),
    "variants": (PluginError, "faulty_task failed with Stumble: over variants"),
    "memory": (RunError, "out of memory with one row alone"),
    "~": (RunError, "output is not finite in float32"),
}


@pytest.mark.parametrize("place", EVERYTHING)
def test_a_plugin_that_fails_on_everything_ends_the_run_soon(tmp_path, monkeypatch, place):
    kind, told = EVERYTHING[place]
    texts = [place + "K" * number for number in range(200)]
    ran = []
    forward = Faulty.forward
    monkeypatch.setattr(
        Faulty, "forward", lambda self, *given: ran.append(1) or forward(self, *given)
    )
    with pytest.raises(kind) as caught:
        start(tmp_path, texts, max_length=400, batch_tokens=2000)
    assert caught.value.what.startswith("none of the first ") and told in caught.value.what
    assert ("test_aside.py:" in caught.value.what) == (kind is PluginError)
    assert caught.value.hint
    assert len(ran) < 100
    # Nothing was set aside: once it is mended, the same command computes all.
    monkeypatch.setattr(f"{__name__}.MENDED", [place, "snmuloc"])
    if place not in ("memory", "~"):
        assert start(tmp_path, texts, max_length=400, batch_tokens=2000).done == 200


def test_few_rows_that_all_fail(tmp_path):
    with pytest.raises(PluginError, match=r"none of the 2 rows could be computed: faulty failed"):
        start(tmp_path, ["forward", "forwardK"])
    with pytest.raises(PluginError) as caught:
        start(tmp_path, ["forward", "forwardK"])
    assert "--overwrite" in caught.value.hint
    assert len(list(failures(tmp_path / "run"))) == 2


def test_long_rows_that_fail_first_do_not_end_the_run(tmp_path):
    texts = [*GOOD, *("K" * (60 + n) + "memory" for n in range(7))]  # each a batch of its own
    report = start(tmp_path, texts)
    assert (report.done, report.failed) == (28, 7)


def test_a_batch_that_fails_whole_after_others_is_set_aside(tmp_path):
    texts = ["A" * 50, "C" * 50, *("forward" + letter for letter in "ACDEFGHIKL")]
    report = start(tmp_path, texts)
    assert (report.done, report.failed) == (2, 10)
    assert [row["error"] is None for row in merged(tmp_path)] == [True] * 2 + [False] * 10


def test_equal_rows_fail_together(tmp_path):
    report = start(tmp_path, [*GOOD, "forward", "forward"])
    assert (report.done, report.failed) == (28, 2)
    assert [failure.row for failure in failures(tmp_path / "run")] == [28, 29]


def test_an_error_that_is_not_about_a_row_ends_the_run(tmp_path, monkeypatch):
    def broken(self, activations, rows):
        raise PluginError("the head has no weights", "give --ckpt")

    monkeypatch.setattr(FaultyTask, "columns", broken)
    with pytest.raises(PluginError, match="the head has no weights"):
        start(tmp_path, GOOD)


def test_a_reader_that_breaks_is_told_with_the_row(tmp_path):
    with pytest.raises(PluginError) as caught:
        start(tmp_path, [*GOOD, "!", "A"])
    assert "in.lines after row 28: lines failed with Stumble: over a line" in caught.value.what
    assert "test_aside.py:" in caught.value.what and "the reader lines" in caught.value.hint
    with pytest.raises(InputError, match=r"lines cannot read .* after row 2: Input/output error"):
        start(tmp_path, ["A", "C", "%"])


def test_a_run_without_failures_has_none_to_tell(tmp_path):
    start(tmp_path, GOOD)
    assert list(failures(tmp_path / "run")) == []
    with pytest.raises(RunError, match="no run in"):
        list(failures(tmp_path))


def test_a_device_that_has_failed_ends_the_run(tmp_path, monkeypatch):
    def failed(self, module, inputs, want):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(Faulty, "forward", failed)
    with pytest.raises(RunError, match=r"the device has failed while faulty ran") as caught:
        start(tmp_path, GOOD)
    assert "CUDA_VISIBLE_DEVICES=" in caught.value.hint
    assert not Manifest.open(tmp_path / "run").done()


# ------------------------------------------------------------------------------ loaded, built


def broken(*given):
    raise Stumble("when it was opened")


class Unbuilt(toy.Toy):
    build = broken


class UnbuiltTask(FaultyTask):
    build = broken


class Broken:
    """A plugin of which nothing can be opened."""

    @hookimpl
    def mgen_backbones(self):
        kinds = {"unloaded": broken, "unbuilt": Unbuilt}
        return [
            BackboneCard(**{**vars(toy.CARD), "name": n, "load": load}) for n, load in kinds.items()
        ]

    @hookimpl
    def mgen_tasks(self):
        kinds = {"unloaded_task": broken, "unbuilt_task": UnbuiltTask}
        return [TaskCard(name, "", load) for name, load in kinds.items()]

    @hookimpl
    def mgen_readers(self):
        return [ReaderCard("unloaded_reader", "", broken)]

    @hookimpl
    def mgen_writers(self):
        return [WriterCard("unloaded_writer", ".none", "", broken)]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("backbone", "unloaded"),
        ("backbone", "unbuilt"),
        ("task", "unloaded_task"),
        ("task", "unbuilt_task"),
        ("reader", "unloaded_reader"),
        ("writer", "unloaded_writer"),
    ],
)
def test_a_plugin_that_cannot_be_opened_is_named(tmp_path, monkeypatch, key, name):
    catalog = Catalog((*CATALOG.plugins, *Catalog.of(Broken()).plugins))
    monkeypatch.setitem(globals(), "CATALOG", catalog)
    with pytest.raises(PluginError) as caught:
        start(tmp_path, GOOD, **{key: name})
    assert f"{name} failed with Stumble: when it was opened (" in caught.value.what
    assert "test_aside.py:" in caught.value.what and "author" in caught.value.hint


def test_a_reader_that_stumbles_over_a_name_is_named(tmp_path, monkeypatch):
    class Claims:
        @hookimpl
        def mgen_readers(self):
            return [ReaderCard("claims_all", "", Lines, claims=broken)]

    catalog = Catalog((*CATALOG.plugins, *Catalog.of(Claims()).plugins))
    monkeypatch.setitem(globals(), "CATALOG", catalog)
    with pytest.raises(PluginError, match="claims_all failed with Stumble"):
        start(tmp_path, GOOD, data="no-suffix")
