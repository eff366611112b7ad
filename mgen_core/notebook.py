"""The command line's verbs as Python calls: rows or a path in, an Arrow table out."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .api import Rows
from .catalog import Catalog, discover
from .config import make_config
from .errors import InputError, MgenError
from .merge import Selection
from .merge import read as read_merged
from .objects import place
from .run import run
from .screen import Screen
from .table import open_object

if TYPE_CHECKING:
    import pyarrow as pa


def embed(
    data: Any,
    *,
    backbone: str,
    pool: Sequence[str] | str = ("mean",),
    layers: Sequence[int] = (-1,),
    **settings: Any,
) -> pa.Table:
    """Embed a table and give it back as Arrow, one row for each input row, in input order.

    `data` is a path or a list of paths, a list of sequences, a list of dicts, a dict of columns,
    a pandas DataFrame, an Arrow table, or what an installed reader takes (mgen-cell: an AnnData).
    `settings` are the fields of `RunConfig` (`weights`,
    `id_col`, `dtype`, ...). With `output` the run directory is kept, and the same call resumes
    it. Raises `MgenError` for what the command line would report.
    """
    chosen = {"pool": pool, "layers": tuple(layers), **settings.pop("options", {})}
    return run_task("embed", data, backbone=backbone, options=chosen, **settings)


def infer(
    data: Any,
    *,
    backbone: str,
    kind: str = "probs",
    alphabet: str = "full",
    score: str | None = None,
    **settings: Any,
) -> pa.Table:
    """Token probabilities of each residue, or with `score` one number a row; else as `embed`."""
    chosen = {"kind": kind, "alphabet": alphabet, "score": score, **settings.pop("options", {})}
    return run_task("infer", data, backbone=backbone, options=chosen, **settings)


def run_task(
    task: str,
    data: Any,
    *,
    backbone: str,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> pa.Table:
    """Any installed task by name, with the options of task and backbone; else as `embed`."""
    catalog = settings.pop("catalog", None) or discover()
    output = settings.pop("output", None)
    paths = _paths(data)
    values = {
        **settings,
        "task": task,
        "backbone": backbone,
        "data": paths or ("rows in memory",),
        "options": options or {},
    }
    with tempfile.TemporaryDirectory(prefix="mgen-") as temporary:
        folder = place(str(output)) if output is not None else Path(temporary) / "run"
        config = make_config({**values, "output": folder})
        if (config.devices or 1) > 1 or config.hostfile is not None:
            raise MgenError(
                "a Python call is one process: it does not start others",
                "run `mgen` with --devices or --hostfile, then mgen_core.read(its --output)",
            )
        rows = None if paths else open_object(data, config, catalog) or MemoryRows(data)
        run(config, catalog, Screen(), rows=rows)
        return read_merged(folder, catalog, Selection())


def read(
    run: str | Path,
    *,
    columns: Sequence[str] | None = None,
    where: str | None = None,
    drop_failed: bool = False,
    catalog: Catalog | None = None,
) -> pa.Table:
    """A finished run as one Arrow table: every row once, in input order.

    `where` is an SQL condition over the text and number columns. Raises `RunError` when batches
    are missing.
    """
    selection = Selection(tuple(columns) if columns else None, where, drop_failed)
    return read_merged(place(str(run)), catalog or discover(), selection)


class MemoryRows(Rows):
    """Rows that are in memory already."""

    def __init__(self, data: Any) -> None:
        self._columns = _columns(data)
        self.columns = list(self._columns)
        self.length = len(next(iter(self._columns.values()), []))

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        yield {name: self._columns[name] for name in columns}

    def digest(self) -> str:
        text = json.dumps(self._columns, default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _paths(data: Any) -> tuple[str, ...]:
    if isinstance(data, (str, Path)):
        return (str(data),)
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, Path) for item in data):
        return tuple(map(str, data))
    return ()


def _columns(data: Any) -> dict[str, list[Any]]:
    if hasattr(data, "to_pydict"):  # Arrow
        return dict(data.to_pydict())
    if hasattr(data, "to_dict") and hasattr(data, "columns"):  # pandas
        return {str(name): data[name].tolist() for name in data.columns}
    if isinstance(data, Mapping):
        return {str(name): list(column) for name, column in data.items()}
    rows = list(data)
    if all(isinstance(row, Mapping) for row in rows):
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}
    if all(isinstance(row, str) for row in rows):
        return {"sequence": rows}
    raise InputError(
        f"cannot read rows from {type(data).__name__}",
        "give a path, a list of sequences or dicts, a dict of columns, a DataFrame or Arrow table",
    )
