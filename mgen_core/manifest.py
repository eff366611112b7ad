"""The run directory's record of itself: what was planned, what is done.

    run.json                     config, versions, digests, plan: written once, by rank 0
    failed/plan.jsonl            rows set aside while planning (row, id, reason)
    parts/rank-00000/batch-00000017.parquet
    failed/rank-00000/batch-00000017.jsonl
    done/rank-00000.jsonl        one line a part: what it holds and its checksum
    run.lock                     held while a process is at work here
    merged.json                  where the rows are, once a merge has deleted the parts
    metrics.json                 of `mgen test`, with confusion.png or scatter.png

Parts are found through the done-logs, never by looking what lies in the folder.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from . import storage
from .errors import RunError
from .plan import Failure

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FORMAT = 1
RECORD = "run.json"
SEAL = "sha256"
LOCK = "run.lock"
MERGED = "merged.json"
PARTS = "parts"
PLAN_FAILURES = "failed/plan.jsonl"
DIGESTS = ("input", "weights", "head")
MOST_BATCHES = 10**8
MOST_ROWS = 10**7  # of a window
OURS = (
    RECORD,
    PARTS,
    "done",
    "failed",
    LOCK,
    MERGED,
    "metrics.json",
    "confusion.png",
    "scatter.png",
    "predict_predictions_0_*.pt",
)
"""Names, or patterns of them, of all that mgen leaves in a run directory; the record first."""

WRITTEN = (*OURS, PLAN_FAILURES, "*/rank-*/*")
"""Likewise of the files that it writes there."""


@dataclass(frozen=True)
class Done:
    """A line of the done-log: a part that is complete and durable, of one or several batches.

    `file` is relative to the run directory; `rows` are in it, `failed` beside it in `failures`;
    `first` and `last` are the smallest and largest row index of both; `tokens` carry data.
    `limit` is how many tokens at once the memory was found to allow, where that was not enough
    for the whole batch.
    """

    batches: tuple[int, ...]
    file: str
    rows: int
    failed: int
    first: int
    last: int
    bytes: int
    sha256: str
    seconds: float
    failures: str | None = None
    failures_sha256: str | None = None
    tokens: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        told = Path(self.failures or "")
        if not self.batches or told.is_absolute() or ".." in told.parts:
            raise ValueError("no line of ours")


@dataclass(frozen=True)
class Manifest:
    """A run directory that holds a run."""

    folder: Path
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Manifest:
        """Raises `RunError` for a folder without a run, or one made by a newer mgen."""
        path = folder / RECORD
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"no run in {folder}", "give the folder that --output named") from None
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"cannot read {path}: {error}", "restore the file") from error
        form = record.get("format") if isinstance(record, dict) else None
        if form != FORMAT:
            raise RunError(
                f"{path} has format {form!r:.40}, this mgen reads {FORMAT}",
                "use the mgen that made the run",
            )
        if fault := _fault(record):
            raise RunError(
                f"{path} is damaged: {fault}",
                "restore the file, or compute all again with --overwrite; "
                f"if you have edited it and know it to be right, delete its line {SEAL!r}",
            )
        return cls(folder, record)

    @property
    def batches(self) -> int:
        """How many batches the plan has."""
        return int(self.record["plan"]["batches"])

    @property
    def rows(self) -> int:
        """How many rows the input has."""
        return int(self.record["plan"]["rows"])

    @property
    def windows(self) -> list[tuple[int, int, int, int]]:
        """First row, rows, first batch, batches of each window."""
        return [tuple(window) for window in self.record["plan"]["windows"]]

    def done(self) -> list[Done]:
        """The parts whose files are there in their full length, in the order of the plan."""
        logged = {part.file: part for part in next(self.tail())}  # as it was written last
        sizes = storage.sizes(self.folder / PARTS)
        there = {f"{PARTS}/{file}": size for file, size in sizes.items()}
        whole = [part for part in logged.values() if there.get(part.file) == part.bytes]
        found = {number: part for part in whole for number in part.batches}
        return list(dict.fromkeys(found[number] for number in sorted(found)))

    def tail(self) -> Iterator[list[Done]]:
        """At each step, the lines that came to the done-logs since the one before."""
        for lines in storage.new_lines(self.folder / "done", "rank-*.jsonl"):
            yield [part for line in lines if (part := _done(line))]

    def by_window(self, done: Iterable[Done]) -> Iterator[tuple[int, int, int, list[Done]]]:
        """First row, rows, batches and the parts that are done, of each window."""
        found: dict[int, list[Done]] = {}
        for part in done:
            found.setdefault(self.window_of(part.batches[0]), []).append(part)
        for place, (first, rows, _, batches) in enumerate(self.windows):
            yield first, rows, batches, found.get(place, [])

    def window_of(self, batch: int) -> int:
        """The place of the window that the batch is in. Parts do not reach over windows."""
        return bisect_right(self._starts, batch) - 1

    @cached_property
    def _starts(self) -> list[int]:
        return [batch for _, _, batch, _ in self.windows]

    def missing(self, done: Iterable[Done]) -> list[int]:
        """Numbers of the batches that are not done."""
        there = {number for part in done for number in part.batches}
        return [number for number in range(self.batches) if number not in there]

    def failed(self, done: Iterable[Done]) -> int:
        """Rows set aside: while planning, and while computing what is done."""
        return int(self.record["plan"]["failed"]) + sum(part.failed for part in done)

    def log(self, rank: int, parts: Sequence[Done]) -> None:
        """Acknowledge parts: from these lines on they count as done."""
        lines = [json.dumps(asdict(part)) for part in parts]
        storage.append_lines(self.folder / f"done/rank-{rank:05d}.jsonl", lines)

    def command(self) -> str:
        """What the user typed to start the run, and where."""
        typed = [word for word in self.record["command"] if word != "--overwrite"]
        folder = self.record["directory"]
        there = "" if folder == str(Path.cwd()) else f"cd {shlex.quote(folder)} && "
        return there + shlex.join(typed)

    def planned_failures(self) -> Iterator[Failure]:
        """Rows set aside while planning, in input order."""
        return self._failures(PLAN_FAILURES, self.record["plan"]["failures_sha256"])

    def part_failures(self, part: Done) -> Iterator[Failure]:
        """Rows set aside while computing a part."""
        return self._failures(part.failures, part.failures_sha256) if part.failures else iter(())

    def _failures(self, file: str, sha256: str | None) -> Iterator[Failure]:
        """Streamed: what was handed out may turn out wrong at the end, by a `RunError`."""
        path = self.folder / file
        digest = hashlib.sha256()
        damaged = RunError(
            f"{path} is damaged: it is not what the run wrote",
            "delete the run directory, then start the run again",
        )
        try:
            with path.open("rb") as lines:
                for line in lines:
                    digest.update(line)
                    yield Failure(**json.loads(line))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise damaged from error
        if digest.hexdigest() != sha256:
            raise damaged


def is_ours(name: str) -> bool:
    """Whether mgen leaves a file or folder of this name in a run directory."""
    return any(fnmatch(name, pattern) for pattern in OURS)


def ours(folder: Path) -> list[Path]:
    """All that mgen has left in a run directory; the record first."""
    there = list(folder.iterdir())
    return [path for name in OURS for path in there if fnmatch(path.name, name)]


def write_lines(lines: Iterable[str], file: BinaryIO) -> None:
    """A text file of lines that end in a newline."""
    file.writelines(line.encode() for line in lines)


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Words for each key whose value differs between two records."""
    told = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            told += difference(before, after)
        elif key in DIGESTS:
            told.append(f"{key} has changed")
        else:
            told.append(f"{key} was {_short(before)}, now {_short(after)}")
    return told


def _done(line: str) -> Done | None:
    from pydantic import ValidationError

    try:
        found: Done = _shape(Done).validate_json(line)
    # A line torn by a crash: its part was not acknowledged and is computed again.
    except ValidationError:
        return None
    return found


@dataclass(frozen=True)
class _Plan:
    rows: int
    failed: int
    failures_sha256: str
    digest: str
    batches: int
    windows: list[tuple[int, int, int, int]]

    def __post_init__(self) -> None:
        if self.batches > MOST_BATCHES or any(rows > MOST_ROWS for _, rows, *_ in self.windows):
            raise ValueError("more than any run has")


@dataclass(frozen=True)
class _Identity:
    task: str
    backbone: str
    input: str
    dtype: str
    weights: Any

    def __post_init__(self) -> None:
        "".join(
            map(str, vars(self).values())
        ).encode()  # goes into the merged file, and half a character cannot


@dataclass(frozen=True)
class _Config:
    writer: str


@dataclass(frozen=True)
class _Versions:
    mgen: str

    def __post_init__(self) -> None:
        self.mgen.encode()


@dataclass(frozen=True)
class _Record:
    """What is read of `run.json`."""

    identity: _Identity
    command: list[str]
    directory: str
    config: _Config
    versions: _Versions
    plan: _Plan


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the SHA-256 of what it says (`SEAL`), however that is laid out in a file.

    The seal comes second, so that whoever deletes its line leaves JSON.
    """
    rest = {key: value for key, value in record.items() if key != SEAL}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return {"format": rest.pop("format"), SEAL: digest, **rest}


def _fault(record: dict[str, Any]) -> str:
    """What is wrong with a record that may come from anywhere; nothing where it is sound."""
    from pydantic import ValidationError

    try:
        # One without a seal was edited, and is taken at its word.
        if SEAL in record and record != sealed(record):
            return "it is not what the run wrote"
        _shape(_Record).validate_python(record)
    except RecursionError:
        return "nested too deep"
    except ValidationError as error:
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return ""


@cache
def _shape(kind: type[Any]) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
