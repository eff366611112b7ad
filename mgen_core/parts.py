"""Parts: the files of computed batches, written so that they count only when they are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from . import storage
from .api import Writer
from .errors import RunError
from .job import Job
from .manifest import Done, Manifest, write_lines
from .plan import Batch, Failure
from .storage import Written


def part_path(rank: int, batch: int, suffix: str) -> str:
    """Where a part lies, relative to the run directory."""
    return f"parts/rank-{rank:05d}/batch-{batch:08d}{suffix}"


def failures_path(rank: int, batch: int) -> str:
    """Where the rows that failed in a batch are told, relative to the run directory."""
    return f"failed/rank-{rank:05d}/batch-{batch:08d}.jsonl"


class Computed(NamedTuple):
    """A batch on the way to the disk: its rows as a table, and those that failed, in order."""

    batch: Batch
    table: pa.Table
    failures: Sequence[Failure]
    seconds: float
    limit: int | None = None


def write_parts(job: Job, manifest: Manifest, rank: int, waiting: Sequence[Computed]) -> list[Done]:
    """Commit batches: the rows that failed, the parts, then the lines that make them count."""
    files: dict[Path, storage.Write] = {}
    filed = []
    for computed in waiting:
        batch, table, failures = computed.batch, computed.table, computed.failures
        told = failures_path(rank, batch.number) if failures else None
        if told:
            lines = [failure.line() for failure in failures]
            files[manifest.folder / told] = partial(write_lines, lines)
        file = part_path(rank, batch.number, job.writer.card.suffix)
        files[manifest.folder / file] = partial(_write_table, job.writer, table)
        filed.append((computed, file, table.num_rows, len(failures), told))
    for folder in {path.parent for path in files}:
        storage.make_folder(folder)
    written = storage.write_all(files)
    at = {path.relative_to(manifest.folder).as_posix(): what for path, what in written.items()}
    parts = [_done(at, *facts) for facts in filed]
    manifest.log(rank, parts)
    return parts


def _write_table(writer: Writer, table: pa.Table, file: BinaryIO) -> None:
    writer.write(file, [table], table.schema)


def _done(
    written: Mapping[str, Written],
    computed: Computed,
    file: str,
    rows: int,
    failed: int,
    told: str | None,
) -> Done:
    batch = computed.batch
    indices = [row.index for row in batch.rows]
    return Done(
        batch=batch.number,
        file=file,
        rows=rows,
        failed=failed,
        first=min(indices),
        last=max(indices),
        bytes=written[file].bytes,
        sha256=written[file].sha256,
        seconds=round(computed.seconds, 4),
        failures=told,
        failures_sha256=written[told].sha256 if told else None,
        tokens=batch.tokens,
        limit=computed.limit,
    )


def read_part(manifest: Manifest, source: Writer, part: Done) -> pa.Table:
    """A part, after its bytes were checked. Raises `RunError` when it is not what was written."""
    path = manifest.folder / part.file
    content = pa.py_buffer(path.read_bytes())
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise RunError(
            f"{path} is damaged: its checksum is not the one in the done-log",
            f"delete the file, then {manifest.command()} computes batch {part.batch} again",
        )
    table = source.read(pa.BufferReader(content))
    if table.num_rows != part.rows:
        raise RunError(
            f"{path} holds {table.num_rows} rows, the done-log says {part.rows}",
            f"delete the file, then {manifest.command()} computes batch {part.batch} again",
        )
    return table
