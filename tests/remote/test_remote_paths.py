"""A store and a disk are the same to whoever holds a path."""

import io
import os
import tempfile
from pathlib import Path, PurePosixPath

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgen_core import RunError, place, storage
from mgen_core.config import make_config
from mgen_core.objects import ObjectPath, matches

NAMES = st.sampled_from(["run.json", "a b", "parts", "ü", "x.tar.gz", "[1]", "*", "100%"])
KEYS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), KEYS, st.text("ab\n", max_size=5)),
        st.tuples(
            st.just("append"),
            KEYS,
            st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
        ),
        st.tuples(st.just("remove"), KEYS, st.none()),
    ),
    max_size=12,
)


@given(KEYS, NAMES)
def test_names_are_those_of_pathlib(key, name):
    path, pure = place(f"s3://bucket/{key}"), PurePosixPath("bucket") / key
    assert (path.name, path.stem, path.suffix) == (pure.name, pure.stem, pure.suffix)
    assert str(path / name) == f"s3://{pure / name}"
    assert str(path.parent) == f"s3://{pure.parent}"
    assert str(path.with_name(name)) == f"s3://{pure.with_name(name)}"
    assert (path / name).relative_to(path) == PurePosixPath(name)
    assert path == place(f"s3://bucket/{key}/") and hash(path) == hash(place(str(path)))


def tree(folder):
    """Path -> content of all that is below."""
    files = storage.sizes(folder)
    found = {name: (folder / name).read_text() for name in files}
    assert files == {name: len(text.encode()) for name, text in found.items()}
    return found


def possible(verb, folder, key):
    """On a disk: no file may be on the way, and no folder where a file is to be."""
    on_the_way = [folder / str(one) for one in PurePosixPath(key).parents][:-1]
    taken = verb == "write" and (folder / key).is_dir()
    return verb == "append" or not (taken or any(one.is_file() for one in on_the_way))


@settings(max_examples=30)
@given(STEPS)
def test_what_is_done_to_a_store_comes_out_as_on_a_disk(steps):
    fsspec.filesystem("memory").store.clear()
    with tempfile.TemporaryDirectory() as temporary:
        here, there = Path(temporary) / "files", place("memory://files")
        for verb, key, value in steps:
            for root in (here, there) if possible(verb, here, key) else ():
                if verb == "append":
                    storage.make_folder(root.with_name("log"))
                    storage.append_lines(root.with_name("log") / "rank-00000.jsonl", value)
                elif verb == "write":
                    storage.make_folder((root / key).parent)
                    storage.write_text(root / key, value)
                else:
                    storage.remove(root / key)
        assert tree(there) == tree(here)
        logs = (here.with_name("log"), there.with_name("log"))
        one, other = (next(storage.new_lines(log, "rank-*.jsonl")) for log in logs)
        assert one == other
        for _, key, _ in steps:
            mine, theirs = here / key, there / key
            assert mine.is_file() == theirs.is_file()
            # An empty folder is nothing on a store.
            assert theirs.is_dir() == (mine.is_dir() and bool(storage.sizes(mine)))


def test_a_log_is_followed(memory):
    log = place(memory) / "done/rank-00003.jsonl"
    lines = storage.new_lines(log.parent, "rank-*.jsonl")
    assert next(lines) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mgen_core.objects.LOOK_S", 0)
        storage.append_lines(log, ["1", "2"])
        storage.append_lines(log.with_name("rank-00001.jsonl"), ["3"])
        assert next(lines) == ["1", "2", "3"]
        assert next(lines) == []
        storage.append_lines(log, ["4"])
        assert next(lines) == ["4"]


def test_what_is_read_is_read_in_pieces(bucket):
    content = os.urandom(1 << 20)
    path = place(f"{bucket}/file")
    storage.write_atomic(path, lambda file: file.write(content))
    with path.open("rb") as file:
        assert file.read(10) == content[:10]
        file.seek(-10, io.SEEK_END)
        assert file.read() == content[-10:]
        file.seek(500_000)
        assert file.read(100_000) == content[500_000:600_000]
    storage.write_text(path, "ü\nb\n")
    with path.open(encoding="utf-8") as text:
        assert list(text) == ["ü\n", "b\n"]
    with pytest.raises(ValueError, match="storage"):
        path.open("wb")


def test_bytes_that_are_lost_on_the_way_are_asked_for_again(bucket, faulty):
    content = os.urandom(1 << 20)
    path = place(f"{bucket}/file")
    storage.write_atomic(path, lambda file: file.write(content))
    for fault in ("cut short", "dropped", "500"):
        with path.open("rb") as file:
            faulty.plan(fault, 1)
            assert file.read() == content
            assert faulty.heal() == 1
    with path.open("rb") as file:
        faulty.plan("cut short", 1, 10**9)
        with pytest.raises(RunError, match="cannot read"):
            file.read()


def test_a_store_that_does_not_answer_is_not_an_empty_one(bucket, faulty):
    path = place(f"{bucket}/run.json")
    storage.write_text(path, "{}")
    faulty.plan("500", 1, 10**9)
    for question in (path.exists, path.is_file, path.parent.is_dir, path.stat, path.read_bytes):
        with pytest.raises(RunError, match="cannot read"):
            question()
    with pytest.raises(RunError, match="cannot read"):
        list(path.parent.iterdir())


def test_a_path_of_this_machine_stays_one(tmp_path):
    assert type(place("a/b")) is type(Path("a/b"))
    assert place(f"file://{tmp_path}/x") == tmp_path / "x"
    assert isinstance(place("hf://datasets/lab/genes/data.csv"), ObjectPath)
    assert matches("memory://no/pattern.csv") == ["memory://no/pattern.csv"]


@pytest.mark.parametrize("output", ["plain", "s3://bucket/run"])
def test_a_config_takes_both(output):
    values = {"task": "embed", "backbone": "toy", "data": "x.csv"}
    for given_as in (output, place(output)):
        assert str(make_config({**values, "output": given_as}).output) == output
