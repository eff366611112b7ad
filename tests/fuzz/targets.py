"""What reads files of others, each as a function of bytes that must end well.

Well is: an `MgenError`, or every row there, planned or set aside. Anything else that is raised is
a finding, and so are a hang and memory without bound, which whoever calls watches for.
"""

from __future__ import annotations

import atexit
import bz2
import functools
import gzip
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mgen_core import Backbone, BackboneCard, MgenError, RowError
from mgen_core.catalog import discover
from mgen_core.config import make_config, read_config
from mgen_core.manifest import Manifest
from mgen_core.merge import Selection, read
from mgen_core.modelgenerator.merging import merge_configs
from mgen_core.modelgenerator.sources import is_foreign
from mgen_core.modelgenerator.translation import translate
from mgen_core.plan import PlanSettings, windows
from mgen_core.table import Table, open_sources

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """A reader of files: `run` gives it bytes; `seeds` are good files, `words` what they hold."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()


@functools.cache
def folder() -> Path:
    """A folder of this process, in memory where there is one."""
    fast = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="mgen-fuzz-", dir=fast if fast.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def written(name: str, data: bytes) -> Path:
    """A file with these bytes."""
    path = folder() / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------ tables


class Letters(Backbone):
    """Counts letters; needs no torch."""

    def prepare(self, row):
        if not isinstance(row.data, str):
            raise RowError(f"{type(row.data).__name__} is no text")
        if not row.data.isascii():
            raise RowError(f"illegal character {row.data[:1]!r}")
        return row

    def measure(self, row):
        return len(row.data)


LETTERS = BackboneCard("letters", "for tests", "any", load=Letters, width=1, max_tokens=1000)
catalog = functools.cache(discover)


def table(suffix: str) -> Callable[[bytes], None]:
    """Reads a table as `mgen embed` does, every column of it, up to the plan."""

    def run(data: bytes) -> None:
        path = written(f"in{suffix}", data)
        values = {"task": "embed", "backbone": "letters", "data": (str(path),)}
        try:
            (source,) = open_sources(make_config(values), catalog())
            names = tuple(name for name in source.columns if name)
            if names:
                plan(Table((source,), names[-1], names[0], names))
        except MgenError as error:
            assert error.what

    return run


def plan(rows: Table) -> None:
    """Every row is in the plan, or set aside with a reason that can be written down."""
    backbone = LETTERS.load(LETTERS, LETTERS.options())
    settings = PlanSettings(batch_tokens=1000, max_tokens=1000, window_rows=100)
    expected = 0
    for window in windows(rows, backbone, settings):
        planned = [row for batch in window.batches for row in batch.rows]
        found = sorted([row.index for row in planned] + [bad.row for bad in window.failures])
        assert found == list(range(expected, expected + window.rows))
        expected += window.rows
        for row in planned:
            row.id.encode()
        for bad in window.failures:
            again = json.loads(bad.line().encode())
            assert again == bad._asdict()


TEXT = (b'id,sequence,label\n007,ACGT,x\n1e5,acgu*-,"a,b"\nNA,,"two\nlines"\n',)
LINES = (
    b'{"id": 7, "sequence": "ACGT"}\n{"id": "b", "sequence": "GG", "v": [1.5, null]}\n',
    rb'{"id": "\ud83d\ude00", "sequence": "A"}',
)
FASTA = (b">sp|P1 first protein\nMKV\nacgu*-\n\n>empty\n>last\nA", b"# comment\r\n>a\r\nAC\r\n")
TEXT_WORDS = (b",", b"\n", b"\r", b'"', b'""', b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b"\t")
JSON_WORDS = (b"{", b"}", b"[" * 200, b'"', b":", b"9" * 50, b"\\ud800", b"NaN", b"1e999", b"null")


def parquet_seeds() -> tuple[bytes, ...]:
    """Tables of text, and of everything else."""
    plain = pa.table({"id": ["a", "b", None], "sequence": ["ACGT", "", "GG"]})
    odd = {
        "id": pa.array([1, 2, None], pa.uint64()),
        "when": pa.array([1, 2, None], pa.timestamp("ns", tz="UTC")),
        "list": [[1.5], [], None],
        "struct": [{"a": 1}, None, {"a": 2}],
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "sequence": pa.array([b"AC", b"", None]),
    }
    return parquet(plain), parquet(pa.table(odd), compression="none")


def parquet(rows: pa.Table, **how: str) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, **how)
    return sink.getvalue().to_pybytes()


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


# ------------------------------------------------------------------------------ configurations


def our_config(data: bytes) -> None:
    """A `--config` file of ours."""
    path = written("ours.yaml", data)
    try:
        usual = {"task": "embed", "backbone": "letters", "data": "x.csv"}
        config = make_config({**usual, **read_config([path])})
        json.dumps(config.options, default=str)
    except MgenError as error:
        assert error.what


def foreign_config(data: bytes) -> None:
    """A config file of ModelGenerator's, up to our own terms."""
    path = written("theirs.yaml", data)
    try:
        is_foreign(path)
        translate(merge_configs([path]), [LETTERS, ONEHOT], ("x.csv",))
    except MgenError as error:
        assert error.what


ONEHOT = BackboneCard("aido_dna_onehot", "for tests", "dna", load=Letters, width=1, max_tokens=9)
OURS = (
    b"backbone: letters\nbatch_tokens: 512\noptions: {pool: mean, layers: [-1]}\ndevices: auto\n",
    b"data: [a.csv, b.csv]\noptions: &o {pool: max}\nlora: {<<: *o, r: 4, rslora: true}\n",
)
THEIRS = (
    b"""model:
  class_path: Embed
  init_args:
    backbone: {class_path: modelgenerator.backbones.aido_dna_onehot, init_args: {max_length: 4}}
data:
  class_path: SequencesDataModule
  init_args: {path: folder, x_col: sequence, id_col: id, batch_size: 2, test_split_name: test}
trainer:
  devices: auto
  callbacks:
    - class_path: modelgenerator.callbacks.PredictionWriter
      init_args: {output_dir: predictions, filetype: tsv, write_cols: [predictions]}
seed_everything: 42
""",
    b"model: Embed\nmodel.backbone: aido_dna_onehot\ndata: SequencesDataModule\ndata.path: x\n",
)
YAML_WORDS = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!python/name:os.system ",
        b"!!int ",
        b"!!timestamp ",
        b"!!set ",
    ),
    *(b"? ", b"- ", b": ", b"|\n", b"{", b"[" * 100, b'"\\ud800"', b'"\\0"', b"0x", b"9" * 5000),
    *(b"2024-13-45", b"1:99", b".nan", b"\t", b"\r", b"---\n", b"%YAML 1.1\n", b"class_path: "),
)

# ------------------------------------------------------------------------------ run directories


@functools.cache
def run_directory() -> Path:
    """A run with two parts, a row set aside in the plan and one in a batch."""
    import toy

    from mgen_core.run import run
    from mgen_core.screen import Screen

    texts = ["ACD", "", "AC!D", "A~C", "GG", "ACDEFGH" * 10]
    output = folder() / "run"
    values = {
        "task": "embed",
        "backbone": "toy",
        "data": (str(toy.write_csv(folder() / "in.csv", texts)),),
        "output": output,
        "batch_tokens": 64,
    }
    run(make_config(values), toy.catalog(), Screen())
    shutil.copytree(output, folder() / "sound")
    return output


def record_of(name: str) -> Callable[[bytes], None]:
    """Reads a run directory in which one file is not what the run wrote."""

    def run(data: bytes) -> None:
        output = run_directory()
        (output / name).write_bytes(data)
        try:
            manifest = Manifest.open(output)
            done = manifest.done()
            manifest.missing(done), manifest.failed(done), manifest.command(), manifest.rows
            table = read(output, catalog(), Selection(allow_missing=True))
            indices = table["row"].to_pylist()
            assert indices == sorted(set(indices))
        except MgenError as error:
            assert error.what
        finally:
            shutil.copyfile(folder() / "sound" / name, output / name)

    return run


def record_seeds(name: str) -> tuple[bytes, ...]:
    run_directory()
    content = (folder() / "sound" / name).read_bytes()
    # Without its seal a record is taken at its word: what is made of it gets past the checksum.
    return (
        content,
        b"".join(line for line in content.splitlines(True) if b' "sha256"' not in line),
    )


# ------------------------------------------------------------------------------ all of them


@functools.cache
def targets() -> dict[str, Target]:
    """Every target by its name."""
    tsv = tuple(text.replace(b",", b"\t") for text in TEXT)
    words = (*TEXT_WORDS, b"007", b"id")
    plain = {
        ".csv": (TEXT, words),
        ".tsv": (tsv, words),
        ".jsonl": (LINES, JSON_WORDS),
        ".fasta": (FASTA, (*TEXT_WORDS, b">", b"#", b"*")),
        ".parquet": (parquet_seeds(), (b"PAR1", b"\xff\xff\xff\x7f", b"\0\0\0\0")),
        ".csv.gz": (tuple(map(gz, TEXT)), (gz(b""), gz(b"\n" * 9), b"\x1f\x8b")),
        ".jsonl.bz2": (tuple(map(bz2.compress, LINES)), (b"BZh9",)),
        ".fasta.zst": (tuple(map(zstd, FASTA)), (b"\x28\xb5\x2f\xfd",)),
    }
    records = ("run.json", "done/rank-00000.jsonl", "failed/plan.jsonl")
    found = [Target(s[1:], table(s), seeds, words) for s, (seeds, words) in plain.items()]
    found += [
        Target("config", our_config, OURS, YAML_WORDS),
        Target("modelgenerator", foreign_config, THEIRS, YAML_WORDS),
    ]
    found += [
        Target(name, record_of(name), record_seeds(name), (*JSON_WORDS, b"../", b"-1"))
        for name in records
    ]
    return {target.name: target for target in found}
