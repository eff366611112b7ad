"""A run as the files that ModelGenerator's PredictionWriter leaves: one a batch, by its keys.

For scripts that were written for those files. They lie in the run directory, which is what such a
script knows as the `output_dir`, in input order and `batch_size` rows each. A file holds tensors,
lists and text: `torch.load(path, weights_only=True)` reads it.

What mgen has no number for is NaN: special tokens and padding in predictions that have an entry a
token, and rows that were set aside.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

from .. import storage
from ..api import Backbone, Row
from ..errors import InputError, MgenError, RunError
from .merging import Block, Foreign
from .translation import Translated

if TYPE_CHECKING:
    import pyarrow as pa

    from ..checkpoint import Checkpoint
    from ..job import Job

NAME = "predict_predictions_0_{}.pt"
OURS = re.compile(r"predict_predictions_0_\d+\.pt")
ERROR = "error"  # as a merged file has it
PADDING = -100  # of labels
PAIRS = "classify_pairs"
COLUMNS = {
    "embed": ("embedding",),
    "infer": ("logits", "log_probabilities", "probabilities"),
    "classify": ("logits",),
    "classify_tokens": ("logits",),
    "classify_pairs": ("logits",),
    "regress": ("prediction",),
}

Entry = Optional[Tensor]


def write_layout(
    folder: Path,
    foreign: Foreign,
    found: Translated,
    job: Job,
    tables: Iterable[pa.Table],
    head: Checkpoint | None = None,
) -> int:
    """Write the files of a finished run into its directory; how many.

    `job` is that of the run, its table opened anew; `tables` are all rows merged, in input order
    (`merge.selected`), `head` is what the checkpoint holds beside the backbone. Raises `MgenError`
    for a run whose columns are not those that the configuration asks for.
    """
    batches = Batches(foreign, found, job, head)
    rows, merged = iter(batches.table), Merged(tables)
    clear(folder)
    number = 0
    while taken := list(islice(rows, batches.size)):
        content = batches.content(taken, merged.take(len(taken)))
        storage.write_atomic(folder / NAME.format(number), partial(torch.save, content))
        number += 1
    return number


def clear(folder: Path) -> None:
    """Remove what `write_layout` wrote before."""
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            storage.remove(path)


class Merged:
    """Arrow tables, taken a few rows at a time."""

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        self._tables = iter(tables)
        self._left: list[pa.Table] = []

    def take(self, count: int) -> pa.Table:
        """The next rows. Raises `RunError` where there are fewer."""
        import pyarrow as pa

        while sum(map(len, self._left)) < count:
            table = next(self._tables, None)
            if table is None:
                raise RunError(
                    "the run holds fewer rows than the input", "start anew with --overwrite"
                )
            self._left.append(table)
        whole = pa.concat_tables(self._left)
        self._left = [whole.slice(count)]
        return whole.slice(0, count)


# --------------------------------------------------------------------------- one file


class Batches:
    """What a batch holds, as the data module, the tokenizer and the task give it there."""

    def __init__(
        self, foreign: Foreign, found: Translated, job: Job, head: Checkpoint | None
    ) -> None:
        self.task = job.config.task
        if self.task not in COLUMNS:
            raise MgenError(f"ModelGenerator has no task {self.task}", "leave out --layout")
        if job.config.options.get("top_pairs"):
            raise MgenError("--layout has all pairs of residues", "leave out --top-pairs")
        self.size = found.batch_size
        self.writer = found.writer
        self.scaled = bool(found.head.get("scaled"))
        self.job = job
        self.units = _units(job, head) if self.scaled else None
        columns = sorted({name for source in job.table.sources for name in source.columns})
        there = {n for n in columns if all(n in source.columns for source in job.table.sources)}
        self.data = DataModule(foreign.data, found, job, there)
        wanted = [*job.table.fields, *self.data.columns]
        self.table = dataclasses.replace(job.table, fields=tuple(dict.fromkeys(wanted)))

    def content(self, rows: Sequence[Row], merged: pa.Table) -> dict[str, Any]:
        """Keys and values of the file of these rows."""
        if merged["row"].to_pylist() != [row.index for row in rows]:
            raise RunError("rows of the run are not those of the input", "use --overwrite")
        good = _good(merged)
        tokens = read_tokens(rows, good, self.job)
        found: dict[str, Any] = {"predictions": self._predictions(merged, tokens)}
        found.update(self.data.values(rows))
        if tokens is not None:
            found.update(tokens.keys())
        return self._chosen(found)

    def _predictions(self, merged: pa.Table, tokens: Tokens | None) -> Tensor:
        name = next((name for name in COLUMNS[self.task] if name in merged.column_names), None)
        if name is None:
            raise MgenError(
                f"the run has no column {COLUMNS[self.task][0]}", "merge it with `mgen merge`"
            )
        entries = read_entries(merged, name)
        if self.task == "infer":
            entries = [_whole(entry, self.job.backbone) for entry in entries]
        if self.task == PAIRS:
            entries = [_square(entry) for entry in entries]
        ragged, shape = _shape(merged.schema.field(name).type)
        if self.task == "infer":
            shape = (len(self.job.backbone.vocabulary),)
        if ragged:
            return _placed(entries, shape, tokens, axes=2 if self.task == PAIRS else 1)
        nothing = torch.full(shape, torch.nan)
        rows = torch.stack([nothing if entry is None else entry for entry in entries])
        if self.task == "regress":
            rows = self.units(rows) if self.units else rows
            return rows if self.scaled or rows.ndim > 1 else rows[:, None]
        return rows

    def _chosen(self, found: dict[str, Any]) -> dict[str, Any]:
        """As the arguments of the PredictionWriter ask."""
        if self.writer.get("argmax_predictions"):
            values = found["predictions"]
            best = values.nan_to_num(-torch.inf).argmax(dim=-1)
            found["predictions"] = best.masked_fill(values.isnan().all(dim=-1), -1)
        names = self.writer.get("write_cols")
        if not names:
            return found
        names = [names] if isinstance(names, str) else list(names)
        if missing := [name for name in names if name not in found]:
            raise MgenError(f"write_cols: no {missing[0]!r}", f"there are: {', '.join(found)}")
        return {name: found[name] for name in names}


@dataclass(frozen=True)
class Units:
    """From units of the labels back to those that a SequenceRegressionWithScaling is trained in."""

    mean: Tensor
    std: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std


def _units(job: Job, head: Checkpoint | None) -> Units | None:
    # There, predictions are not scaled: a script that does so itself must not do it twice.
    if getattr(job.task.options, "as_reference", False) or head is None:
        return None
    if "scaler._mean" not in head.keys:
        return None
    return Units(head.tensor("scaler._mean").float(), head.tensor("scaler._std").float())


# --------------------------------------------------------------------------- predictions


def read_entries(merged: pa.Table, name: str) -> list[Entry]:
    """The entry of each row in a column of numbers; None where it is null."""
    import pyarrow as pa

    column = merged[name].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)
    half = (merged.schema.field(name).metadata or {}).get(b"mgen.dtype") == b"bfloat16"
    return [_tensor(one, half) if one.is_valid else None for one in column]


def _tensor(scalar: Any, half: bool) -> Tensor:
    """A number or a nest of lists, as float32 (or whole numbers)."""
    import pyarrow as pa

    nested = pa.types.is_nested(scalar.type)
    array = scalar.values if nested else pa.array([scalar.as_py()], scalar.type)
    sizes = [len(array)]
    while pa.types.is_nested(array.type):
        sizes.append(array.type.list_size)
        array = array.flatten()
    values = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    values = (values.view(torch.bfloat16) if half else values).reshape(sizes)
    values = values.float() if values.is_floating_point() else values
    return values if nested else values[0]


def _shape(kind: Any) -> tuple[bool, tuple[int, ...]]:
    """Whether a column's entries have lengths of their own, and the sizes below that."""
    import pyarrow as pa

    ragged = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    kind = kind.value_type if ragged else kind
    sizes = []
    while pa.types.is_nested(kind):
        sizes.append(kind.list_size)
        kind = kind.value_type
    return ragged, tuple(sizes)


def _whole(entry: Entry, backbone: Backbone) -> Entry:
    """Over all outputs of the model: those without a name are not computed, so NaN."""
    if entry is None or entry.shape[-1] == len(backbone.vocabulary):
        return entry
    named = [number for number, name in enumerate(backbone.vocabulary) if name]
    if entry.shape[-1] != len(named):
        raise MgenError("--layout has the whole vocabulary", "leave out --alphabet")
    whole = torch.full((*entry.shape[:-1], len(backbone.vocabulary)), torch.nan)
    whole[..., named] = entry
    return whole


def _square(entry: Entry) -> Entry:
    """(L^2, ...) to (L, L, ...)."""
    if entry is None:
        return None
    length = round(len(entry) ** 0.5)
    return entry.reshape(length, length, *entry.shape[1:])


def _placed(
    entries: Sequence[Entry], shape: tuple[int, ...], tokens: Tokens | None, axes: int
) -> Tensor:
    """Entries a residue (or a pair of them) where their tokens are, NaN elsewhere."""
    lengths = [0 if entry is None else len(entry) for entry in entries]
    width = max(lengths) if tokens is None else tokens.residues.shape[1]
    placed = torch.full((len(entries), *[width] * axes, *shape), torch.nan)
    for number, entry in enumerate(entries):
        if entry is None:
            continue
        where = torch.arange(len(entry))
        if tokens is not None:
            where = tokens.residues[number].nonzero().squeeze(1)
        if len(where) != len(entry):
            raise RunError("the run was made of other sequences", "use --overwrite")
        if axes == 1:
            placed[number, where] = entry
        else:
            placed[number, where[:, None], where] = entry
    return placed


# --------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Tokens:
    """(B, L) each: ids, what is a token and no padding, what is a residue."""

    ids: Tensor
    real: Tensor
    residues: Tensor

    def keys(self) -> dict[str, Tensor]:
        """By ModelGenerator's names. There, padding counts as special too."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.real.long(),
            "special_tokens_mask": (~self.residues).long(),
        }


def read_tokens(rows: Sequence[Row], good: Sequence[bool], job: Job) -> Tokens | None:
    """The tokens of the rows that are `good`, none of the others.

    None for a backbone that does not tell them: one whose `collate` gives no `tokens` (ids end to
    end), `slots` (their places in B x L), `real` and `mask`.
    """
    kept = [number for number, fine in enumerate(good) if fine]
    if not kept:
        nothing = torch.zeros((len(rows), 0))
        return Tokens(nothing.long(), nothing.bool(), nothing.bool())
    inputs = job.backbone.collate([_prepared(rows[number], job) for number in kept])
    if not isinstance(inputs, Mapping) or not {"tokens", "slots", "real", "mask"} <= inputs.keys():
        return None
    real, mask, stream = inputs["real"], inputs["mask"], inputs["tokens"]
    ids = stream.new_zeros(real.shape)
    if inputs["slots"] is None:
        ids = stream.view(real.shape)
    else:
        ids.view(-1)[inputs["slots"]] = stream

    def among(found: Tensor) -> Tensor:
        whole = found.new_zeros((len(rows), found.shape[1]))
        whole[kept] = found
        return whole

    return Tokens(among(ids.long()), among(real), among(mask))


def _prepared(row: Row, job: Job) -> Row:
    """As it was computed."""
    prepared, most = job.backbone.prepare(row), job.max_tokens
    if most is not None and job.backbone.measure(prepared) > most:
        return job.backbone.truncate(prepared, most)
    return prepared


def _good(merged: pa.Table) -> list[bool]:
    if ERROR not in merged.column_names:
        return [True] * len(merged)
    return [reason is None for reason in merged[ERROR].to_pylist()]


# --------------------------------------------------------------------------- data


class DataModule:
    """The keys that a data module of ModelGenerator gives a batch.

    Ids and further columns stay text, as our readers give them: `001` is not 1.
    `columns` are those of the table that it reads beside the model's input.
    """

    def __init__(self, module: Block | None, found: Translated, job: Job, there: set[str]) -> None:
        self.name = module.name if module else "SequencesDataModule"
        self.args: Mapping[str, Any] = module.args if module else {}
        self.labels = [name for name in found.labels if name in there]
        self.complete = bool(found.labels) and len(self.labels) == len(found.labels)
        self.headed = bool(found.head)
        others = {key: name for key, name in self._inputs().items() if name is not None}
        self.others = {key: name for key, name in others.items() if name in there}
        self.key = next((key for key, name in self._inputs().items() if name is None), "sequences")
        self.columns = tuple(dict.fromkeys([*self.labels, *self.others.values()]))
        self.normalized = self.name.endswith("RegressionDataModule") and (
            self._flag("normalize", default=self.name == "SequenceRegressionDataModule")
        )
        options = job.task.options
        self.in_label_units = bool(
            getattr(options, "label_std", ()) or getattr(options, "label_mean", ())
        )

    def values(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Keys and values of these rows."""
        found: dict[str, Any] = {}
        if self.name == "SequencesDataModule":
            found["ids"] = [row.id for row in rows]
        if self.headed or self.complete:
            found["labels"] = self._labels(rows) if self.complete else None
        found[self.key] = [row.data for row in rows]
        for key, name in self.others.items():
            found[key] = [row.fields[name] for row in rows]
        if self._flag("generate_uid"):
            found["uid"] = torch.tensor([row.index for row in rows])
        return found

    def _inputs(self) -> dict[str, str | None]:
        """Key of a batch -> column of the table; None: the model's input."""
        if self.name == "SequencesDataModule":
            return {"sequences": None}
        if self.name == "ColumnRetrievalDataModule":
            sources = _listed(self.args.get("in_cols"))
            renamed = dict(zip(sources, _listed(self.args.get("out_cols")) or sources))
        else:
            usual = "utr" if self.name == "RNAMeanRibosomeLoadDataModule" else "sequences"
            sources = _listed(self.args.get("x_col", usual))
            renamed = dict(self.args.get("rename_cols") or {})
        keys = {renamed.get(name, name): name for name in sources}
        model = "sequences" if "sequences" in keys else next(iter(keys))
        extra = {name: name for name in _listed(self.args.get("extra_cols"))}
        return {**{key: None if key == model else name for key, name in keys.items()}, **extra}

    def _labels(self, rows: Sequence[Row]) -> Tensor | None:
        cells = [[row.fields[name] for name in self.labels] for row in rows]
        if self.name == "TokenClassificationDataModule":
            return self._of_tokens(rows, [_parsed(one[0]) for one in cells])
        if self.name == "SequenceClassificationDataModule":
            whole = torch.tensor([[_whole_number(one) for one in row] for row in cells])
            return whole[:, 0] if len(self.labels) == 1 else whole
        if self.normalized and not self.in_label_units:
            return None  # mean and deviation are those of rows that need not be here
        numbers = torch.tensor([[_number(one) for one in row] for row in cells])
        return numbers[:, 0] if self.name.startswith("RNAMean") else numbers

    def _of_tokens(self, rows: Sequence[Row], lists: Sequence[list[Any]]) -> Tensor:
        pairwise = self._flag("pairwise")
        lengths = [len(row.data) for row in rows]
        if not pairwise:
            most = [found[:n] for found, n in zip(lists, lengths)]
            width = max(map(len, most))
            return torch.tensor([one + [PADDING] * (width - len(one)) for one in most])
        width = max(lengths)
        found = torch.full((len(rows), width, width), PADDING)
        for number, (length, ends) in enumerate(zip(lengths, lists)):
            found[number, :length, :length] = 0
            for i, j in ends:
                if max(i, j) < length:
                    found[number, i, j] = found[number, j, i] = 1
        return found

    def _flag(self, name: str, default: bool = False) -> bool:
        return bool(self.args.get(name, default))


def _parsed(cell: Any) -> list[Any]:
    """A list, or its text in a csv file."""
    try:
        found = json.loads(cell) if isinstance(cell, str) else cell
    except ValueError:
        found = cell
    if not isinstance(found, (list, tuple, type(None))):
        raise InputError(f"labels {cell!r:.40} are no list", "leave out --layout")
    return list(found or ())


def _whole_number(cell: Any) -> int:
    return PADDING if cell in (None, "") else int(_number(cell))


def _number(cell: Any) -> float:
    try:
        return float("nan") if cell in (None, "") else float(cell)
    except (TypeError, ValueError) as error:
        raise InputError(f"label {cell!r:.40} is not a number", "leave out --layout") from error


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]
