"""Parts: the files of computed batches, written so that they count only when they are whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from . import storage
from .api import Writer
from .columns import HostColumn, to_table
from .errors import RunError
from .job import Job
from .manifest import Done, Manifest, write_lines
from .plan import Batch, Failure


def part_path(rank: int, batch: int, suffix: str) -> str:
    """Where a part lies, relative to the run directory."""
    return f"parts/rank-{rank:05d}/batch-{batch:08d}{suffix}"


def failures_path(rank: int, batch: int) -> str:
    """Where the rows that failed in a batch are told, relative to the run directory."""
    return f"failed/rank-{rank:05d}/batch-{batch:08d}.jsonl"


class Computed(NamedTuple):
    """A batch whose columns are off the device, on the way to the disk."""

    batch: Batch
    columns: dict[str, HostColumn]
    seconds: float
    limit: int | None = None


def write_parts(job: Job, manifest: Manifest, rank: int, waiting: Sequence[Computed]) -> list[Done]:
    """Commit batches: the rows that failed, the parts, then the lines that make them count."""
    files: dict[Path, Callable[[Path], None]] = {}
    filed = []
    for computed in waiting:
        batch, columns = computed.batch, computed.columns
        table, failures = to_table(batch, columns, job.task.metadata, job.config.dtype)
        if failures and job.config.on_error == "stop":
            raise stopped_by(failures[0])
        told = failures_path(rank, batch.number) if failures else None
        if told:
            lines = [failure.line() for failure in failures]
            files[manifest.folder / told] = partial(write_lines, lines)
        file = part_path(rank, batch.number, job.writer.card.suffix)
        files[manifest.folder / file] = partial(_write_table, job.writer, table)
        filed.append((computed, file, table.num_rows, len(failures), told))
    for folder in {path.parent for path in files}:
        storage.make_folder(folder)
    storage.write_all(files)
    parts = [_done(manifest.folder, *facts) for facts in filed]
    manifest.log(rank, parts)
    return parts


def _write_table(writer: Writer, table: pa.Table, path: Path) -> None:
    writer.write(path, [table], table.schema)


def _done(
    folder: Path, computed: Computed, file: str, rows: int, failed: int, told: str | None
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
        bytes=(folder / file).stat().st_size,
        sha256=storage.checksum(folder / file),
        seconds=round(computed.seconds, 4),
        failures=told,
        tokens=batch.tokens,
        limit=computed.limit,
    )


def stopped_by(failure: Failure) -> RunError:
    return RunError(
        f"row {failure.row} (id {failure.id}): {failure.reason}",
        "--on-error skip sets such rows aside and goes on",
    )


def read_part(manifest: Manifest, source: Writer, part: Done) -> pa.Table:
    """A part, after its bytes were checked. Raises `RunError` when it is not what was written."""
    path = manifest.folder / part.file
    if storage.checksum(path) != part.sha256:
        raise RunError(
            f"{path} is damaged: its checksum is not the one in the done-log",
            f"delete the file, then {manifest.command()} computes batch {part.batch} again",
        )
    table = source.read(path)
    if table.num_rows != part.rows:
        raise RunError(
            f"{path} holds {table.num_rows} rows, the done-log says {part.rows}",
            f"delete the file, then {manifest.command()} computes batch {part.batch} again",
        )
    return table
