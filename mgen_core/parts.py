"""Parts: files of computed batches, written so that they count only when they are whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
from .stream import Written

PART_BYTES = 2**25


def part_path(rank: int, batch: int, suffix: str) -> str:
    """Where a part lies, named by the first of its batches, relative to the run directory."""
    return f"parts/rank-{rank:05d}/batch-{batch:08d}{suffix}"


def failures_path(rank: int, batch: int) -> str:
    """Where the rows that failed beside a part are told, relative to the run directory."""
    return f"failed/rank-{rank:05d}/batch-{batch:08d}.jsonl"


class Computed(NamedTuple):
    """A batch on the way to the disk: its rows as a table, and those that failed, in order."""

    batch: Batch
    table: pa.Table
    failures: Sequence[Failure]
    seconds: float
    limit: int | None = None


def write_parts(job: Job, manifest: Manifest, rank: int, waiting: Sequence[Computed]) -> None:
    """Commit batches: the rows that failed, the parts, then the lines that make them count."""
    files: dict[str, storage.Write] = {}
    parts = []
    for together in grouped(waiting, manifest):
        table = pa.concat_tables([one.table for one in together])
        failures = [failure.line() for one in together for failure in one.failures]
        number = min(one.batch.number for one in together)
        file = part_path(rank, number, job.writer.card.suffix)
        told = failures_path(rank, number) if failures else None
        if told:
            files[told] = partial(write_lines, failures)
        files[file] = partial(_write_table, job.writer, table)
        parts.append((together, file, table.num_rows, len(failures), told))
    paths = {manifest.folder / file: write for file, write in files.items()}
    for folder in {path.parent for path in paths}:
        storage.make_folder(folder)
    written = dict(zip(files, storage.write_all(paths).values()))
    manifest.log(rank, [_done(written, *facts) for facts in parts])


def grouped(waiting: Sequence[Computed], manifest: Manifest) -> Iterator[list[Computed]]:
    """Batches that become one part: of one window and one schema, and not too much to read."""
    held: list[Computed] = []
    size = 0
    for one in waiting:
        size += one.table.nbytes
        if held and (
            manifest.window_of(held[0].batch.number) != manifest.window_of(one.batch.number)
            or held[0].table.schema != one.table.schema
            or size > PART_BYTES
        ):
            yield held
            held, size = [], one.table.nbytes
        held.append(one)
    if held:
        yield held


def _write_table(writer: Writer, table: pa.Table, file: BinaryIO) -> None:
    writer.write(file, [table], table.schema)


def _done(
    written: Mapping[str, Written],
    together: Sequence[Computed],
    file: str,
    rows: int,
    failed: int,
    told: str | None,
) -> Done:
    indices = [row.index for one in together for row in one.batch.rows]
    limits = [one.limit for one in together if one.limit is not None]
    return Done(
        batches=tuple(one.batch.number for one in together),
        file=file,
        rows=rows,
        failed=failed,
        first=min(indices),
        last=max(indices),
        bytes=written[file].bytes,
        sha256=written[file].sha256,
        seconds=round(sum(one.seconds for one in together), 4),
        failures=told,
        failures_sha256=written[told].sha256 if told else None,
        tokens=sum(one.batch.tokens for one in together),
        limit=min(limits, default=None),
    )


def open_part(manifest: Manifest, part: Done) -> pa.Buffer:
    """A part's bytes. Raises `RunError` when they are not what was written."""
    path = manifest.folder / part.file
    try:
        content = _content(path, part.bytes)
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror or error}",
            "mend the disk; if the file is lost, delete it, then "
            f"{manifest.command()} computes its rows again",
        ) from error
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise RunError(
            f"{path} is damaged: its checksum is not the one in the done-log",
            f"delete the file, then {manifest.command()} computes its rows again",
        )
    return content


def _content(path: Path, size: int) -> pa.Buffer:
    """A file of this size, and one byte at most of what is behind that.

    In Arrow's memory, which `release_unused` gives back: Python's own keeps what it once had.
    """
    content = pa.allocate_buffer(size + 1)
    with path.open("rb") as file:
        return content[: file.readinto(content)]


def outside(table: pa.Table, content: pa.Buffer) -> int:
    """Bytes of a table that was read from `content` and does not lie in it."""
    within = range(content.address, content.address + content.size)
    arrays = [chunk for column in table.columns for chunk in column.chunks]
    held = [buffer for array in arrays for buffer in array.buffers() if buffer is not None]
    return sum(buffer.size for buffer in held if buffer.address not in within)


def read_part(
    manifest: Manifest,
    source: Writer,
    part: Done,
    content: pa.Buffer | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A part, or some columns of it; `content` is what `open_part` gave, where that was done."""
    content = open_part(manifest, part) if content is None else content
    table = source.read(pa.BufferReader(content), columns)
    if table.num_rows != part.rows:
        raise RunError(
            f"{manifest.folder / part.file} holds {table.num_rows} rows, "
            f"the done-log says {part.rows}",
            f"delete the file, then {manifest.command()} computes its rows again",
        )
    return table
