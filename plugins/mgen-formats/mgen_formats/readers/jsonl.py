"""jsonl: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mgen_core import InputError, Reader, Rows

from .source import chunked, digest, local_file, opened_text, reading

LOOK_AHEAD = 1000  # lines whose keys are the columns


class JsonLinesReader(Reader):
    """Opens files of one JSON object a line, plain or compressed."""

    def open(self, uri: str) -> Rows:
        return JsonLinesRows(local_file(uri))


class JsonLinesRows(Rows):
    """The rows of one file; a key that a line lacks is None. Blank lines are no rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        keys: dict[str, None] = {}
        for _, record in islice(self._objects(), LOOK_AHEAD):
            keys.update(dict.fromkeys(record))
        if not keys:
            raise InputError(f"{path} is empty", "write one JSON object a line")
        self.columns = list(keys)

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        return chunked(
            columns,
            (
                (size, [_value(record.get(name)) for name in columns])
                for size, record in self._objects()
            ),
        )

    def digest(self) -> str:
        return digest(self.path)

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with reading(self.path), opened_text(self.path) as text:
            for number, line in enumerate(text, 1):
                if not line.isspace():
                    yield len(line), _object(line, f"{self.path}, line {number}")


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"{where}: not JSON: {error.msg} at character {error.pos + 1}"
        raise InputError(what, "mend or remove that line") from error
    except RecursionError as error:
        raise InputError(f"{where}: nested too deep", "mend or remove that line") from error
    if not isinstance(found, dict):
        hint = "write one object a line; `jq -c '.[]'` turns an array into that"
        raise InputError(f"{where}: not a JSON object: {line.strip():.40}", hint)
    return found


def _value(value: Any) -> Any:
    # Ids are often whole numbers: text, as from every other format.
    return str(value) if type(value) is int else value
