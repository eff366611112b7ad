"""jsonl: one JSON object a line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mgen_core import InputError, Reader, RowError, Rows

from .source import NOT_TEXT, chunked, digest, is_text, lines, not_utf8, readable

LOOK_AHEAD = 1000  # lines whose keys are the columns
MOST_KEYS = 100_000
_may_hold_surrogate = re.compile(r"\\u[dD]").search


class JsonLinesReader(Reader):
    """Opens files of one JSON object a line, plain or compressed."""

    def open(self, uri: str) -> Rows:
        return JsonLinesRows(readable(uri))


class JsonLinesRows(Rows):
    """The rows of one file; a key that a line lacks is None. Blank lines are no rows.

    Lines stand for themselves, so that a bad one is a bad row. But if the first is bad, the file
    holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        keys: dict[str, None] = {}
        for number, (_, record) in enumerate(islice(self._objects(), LOOK_AHEAD)):
            if isinstance(record, RowError):
                if number == 0:
                    raise _no_json_lines(path, record) from record
                continue
            keys.update(dict.fromkeys(record))
            if len(keys) > MOST_KEYS:
                what = f"{path} has more than {MOST_KEYS:,} different keys"
                raise InputError(what, "give all lines the same keys: they are the columns")
        if not keys:
            raise InputError(f"{path} is empty", "write one JSON object a line")
        self.columns = list(keys)

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        return chunked(
            columns, ((size, _cells(record, columns)) for size, record in self._objects())
        )

    def digest(self) -> str:
        return digest(self.path)

    def _objects(self) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
        for number, line in enumerate(lines(self.path), 1):
            if not line.isspace():
                try:
                    yield len(line), _object(line, number)
                except RowError as error:
                    yield len(line), error


def _no_json_lines(path: Path, first: RowError) -> InputError:
    """The error for a file whose first line is not one of this format."""
    if str(first).startswith(NOT_TEXT):
        return not_utf8(path)
    hint = "write one object a line; `jq -c '.[]'` turns an array into that"
    return InputError(f"{path}: {first}", hint)


def _object(line: str, number: int) -> dict[str, Any]:
    """Raises `RowError`."""
    if not is_text(line):
        raise RowError(f"{NOT_TEXT}: line {number}")
    try:
        found = json.loads(line)
        if _may_hold_surrogate(line):
            # JSON may escape half of a character, which no text can hold.
            json.dumps(found, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg} at character {error.pos + 1} of line {number}"
        raise RowError(what) from error
    except UnicodeEncodeError as error:
        raise RowError(f"half a character: a lone surrogate in line {number}") from error
    except ValueError as error:
        raise RowError(f"a number with too many digits: line {number}") from error
    except RecursionError as error:
        raise RowError(f"nested too deep: line {number}") from error
    if not isinstance(found, dict):
        raise RowError(f"not a JSON object: line {number}: {line.strip():.40}")
    return found


def _cells(record: dict[str, Any] | RowError, columns: Sequence[str]) -> list[Any]:
    if isinstance(record, RowError):
        return [record] * len(columns)
    return [_value(record.get(name)) for name in columns]


def _value(value: Any) -> Any:
    # Ids are often whole numbers: text, as from every other format.
    return str(value) if type(value) is int else value
