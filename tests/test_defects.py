"""What goes wrong in today's tools: a test for each defect that we know of, under its name."""

import hashlib
import json
import pickle
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy

import mgen_core
from mgen_core import MgenError, RunError, WeightsError, storage
from mgen_core import run as runs
from mgen_core.catalog import discover
from mgen_core.config import make_config
from mgen_core.merge import Selection, merge
from mgen_core.run import run
from mgen_core.screen import Screen

TEXTS = ["ACD", "FFGH", "GH" * 9, "ACD", "E" * 14, "CC", "HAC", "DEF" * 5]


def start(texts, output, **more):
    data = toy.write_csv(output.parent / "in.csv", texts)
    values = {"task": "embed", "backbone": "toy", "data": (str(data),), "batch_tokens": 20}
    run(make_config({**values, "output": output, **more}), toy.catalog(), Screen())
    return output


def merged(folder, suffix=".parquet", **more):
    path = folder.parent / f"merged{suffix}"
    merge(folder, path, toy.catalog(), Selection(**more))
    return path


def rewritten(folder, changed):
    """The done-log with its lines as `changed` gives them."""
    log = folder / "done/rank-00000.jsonl"
    lines = changed([json.loads(line) for line in log.read_text().splitlines()])
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("planted", ["in place of a part", "beside the parts"])
def test_merge_never_unpickles(tmp_path, planted):
    """There: parts are loaded with pickle's full powers."""
    folder = start(TEXTS, tmp_path / "run", writer="pt")
    trap = pickle.dumps(Trap(tmp_path / "sprung"), protocol=2)
    part = folder / toy.done_lines(folder)[0]["file"]
    if planted == "in place of a part":
        part.write_bytes(trap)
        facts = {"bytes": len(trap), "sha256": hashlib.sha256(trap).hexdigest()}
        rewritten(folder, lambda lines: [{**lines[0], **facts}, *lines[1:]])
        with pytest.raises(MgenError):
            merged(folder)
    else:
        part.with_name("batch-99999999.pt").write_bytes(trap)
        assert pq.read_table(merged(folder)).num_rows == len(TEXTS)
    assert not (tmp_path / "sprung").exists()


def test_parts_are_not_deleted_before_the_result_is_durable(tmp_path, monkeypatch):
    """There: each part is deleted as it is read, and the result written after the last of them."""
    folder = start(TEXTS, tmp_path / "run")
    calls = []

    class Listening(storage.Disk):
        def sync(self, descriptor):
            super().sync(descriptor)
            calls.append("sync")

        def rename(self, old, new):
            super().rename(old, new)
            calls.append("rename")

        def remove(self, path):
            super().remove(path)
            if path.is_relative_to(folder / "parts"):
                calls.append("remove")

    monkeypatch.setattr(storage, "disk", Listening())
    merge(folder, tmp_path / "out.parquet", toy.catalog(), Selection())
    assert "remove" not in calls  # never, unless it was asked for
    calls.clear()
    merge(folder, tmp_path / "out.parquet", toy.catalog(), Selection(), delete_parts=True)
    first = calls.index("remove")
    assert (
        "sync" in calls[: calls.index("rename")] and "sync" in calls[calls.index("rename") : first]
    )


def test_order_is_the_inputs_not_the_file_systems(tmp_path):
    """There: rows come in the order in which the folder lists its files."""
    folder = start(TEXTS, tmp_path / "run")
    expected = merged(folder).read_bytes()
    lines = toy.done_lines(folder)
    assert len(lines) > 0
    # The same parts under names of other ranks, told in the opposite order.
    for number, line in enumerate(lines):
        file = f"parts/rank-{9 - number:05d}/batch-{99 - number:08d}.parquet"
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / line["file"]).rename(folder / file)
        line["file"] = file
    rewritten(folder, lambda _: lines[::-1])
    table = pq.read_table(merged(folder))
    assert table["row"].to_pylist() == list(range(len(TEXTS)))
    assert merged(folder).read_bytes() == expected


def test_stale_parts_of_another_run_are_not_merged(tmp_path):
    """There: whatever an earlier run left in the folder is merged with the new one."""
    folder = start(TEXTS, tmp_path / "run")
    expected = merged(folder).read_bytes()
    for part in folder.glob("parts/*/*"):
        stale = folder / "parts/rank-00007" / part.name
        stale.parent.mkdir(exist_ok=True)
        stale.write_bytes(part.read_bytes())
    assert merged(folder).read_bytes() == expected
    with pytest.raises(RunError, match="holds another run"):
        start(TEXTS, folder, batch_tokens=64)
    start(TEXTS, folder, batch_tokens=64, overwrite=True)
    assert pq.read_table(merged(folder)).num_rows == len(TEXTS)


def test_columns_are_not_those_of_the_first_file(tmp_path, monkeypatch):
    """There: what the first file lacks is dropped from all."""
    monkeypatch.setattr("mgen_core.parts.PART_BYTES", 0)  # a part a batch
    texts = ["~" * 18, *TEXTS]  # the first batch has no row that can be computed
    table = pq.read_table(merged(start(texts, tmp_path / "run")))
    assert table.column_names == ["row", "id", "embedding", "error"]
    assert table["embedding"].null_count == 1
    assert table["error"].null_count == len(TEXTS)


def test_variable_lengths_are_not_padded_and_keep_their_type(tmp_path):
    """There: every row is padded with NaN to the longest of all, in float32."""
    folder = start(TEXTS, tmp_path / "run", dtype="float16", options={"pool": ["tokens"]})
    column = pq.read_table(merged(folder))["embedding"].combine_chunks()
    assert [len(row) for row in column.to_pylist()] == list(map(len, TEXTS))
    values = column.flatten().flatten()
    assert pa.types.is_float16(values.type)
    assert np.isfinite(values.to_numpy()).all()


def test_what_was_not_asked_for_is_not_written(tmp_path):
    """There: inputs and masks are in the file, on the device that they were computed on."""
    import torch

    folder = start(TEXTS, tmp_path / "run")
    assert pq.read_table(merged(folder)).column_names == ["row", "id", "embedding"]
    found = torch.load(merged(folder, ".pt"), weights_only=True)
    assert set(found) == {"row", "id", "embedding", "metadata"}
    assert found["embedding"].device.type == "cpu"


@pytest.mark.parametrize("name", ["out.xyz", "out"])
def test_an_unknown_format_is_an_error(tmp_path, name):
    """There: the error is made and never raised."""
    folder = start(TEXTS, tmp_path / "run")
    with pytest.raises(MgenError, match="no writer for"):
        merge(folder, tmp_path / name, toy.catalog(), Selection())
    assert not (tmp_path / name).exists()
    with pytest.raises(MgenError, match="xyz"):
        start(TEXTS, tmp_path / "other", writer="xyz")


def test_results_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    """There: every prediction is kept until the end, though it was written long ago."""
    alive, most = [], 0
    tabled = runs.tabled

    def counted(*words):
        nonlocal most
        made = tabled(*words)
        alive.append(weakref.ref(made.table))
        most = max(most, sum(table() is not None for table in alive[-1000:]))
        return made

    monkeypatch.setattr(runs, "tabled", counted)
    start([f"AC{'D' * (n % 50)}" for n in range(1200)], tmp_path / "run", batch_rows=1)
    assert len(alive) == 1200
    assert most <= 2 * 256, "more than wait to be written, and are being written"
    assert not any(table() is not None for table in alive)


def test_merging_takes_no_code_of_the_users(tmp_path):
    """There: the manual has users write a loop over the folder that loads every file."""
    folder = start(TEXTS, tmp_path / "run")
    table = mgen_core.read(folder, catalog=toy.catalog())
    assert table.equals(pq.read_table(merged(folder)))
    page = (Path(__file__).parents[1] / "docs/how-to/merge.md").read_text()
    assert "mgen merge" in page and "listdir" not in page


def test_code_of_a_checkpoint_is_not_run(tmp_path):
    """There: several models are loaded with `trust_remote_code=True`."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    told = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.M"}}
    (weights / "config.json").write_text(json.dumps(told))
    data = toy.write_csv(tmp_path / "in.csv", TEXTS)
    values = {"task": "embed", "backbone": "huggingface", "data": (str(data),)}
    config = make_config({**values, "weights": str(weights), "output": tmp_path / "run"})
    with pytest.raises(WeightsError, match="mine"):
        run(config, discover(), Screen())
    assert not (tmp_path / "ran").exists()


def test_a_row_alone_is_computed_as_among_others(tmp_path):
    """There: the attention mask is left out for a batch of one."""
    texts = ["ACGT" * n for n in (1, 2, 5, 9)]
    values = {"backbone": "aido_dna_dummy", "catalog": discover()}
    among = mgen_core.embed(texts, **values)["embedding"].to_pylist()
    alone = [mgen_core.embed([text], **values)["embedding"][0].as_py() for text in texts]
    np.testing.assert_allclose(among, alone, rtol=1e-5, atol=1e-6)
