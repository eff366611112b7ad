"""The contracts between the core and its plugins.

A plugin offers *cards*: plain data with a `load` function that imports the heavy module in its
body. Cards come in four kinds, one for each thing that can be plugged in:

- `BackboneCard` -> `Backbone`: a pretrained model. Rows in, activations out.
- `TaskCard` -> `Task`: activations in, named columns out.
- `ReaderCard` -> `Reader`: a file in, rows out.
- `WriterCard` -> `Writer`: columns in, a file out, and back.

This module imports nothing heavy: it is read by every plugin at start-up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Union

from .errors import MgenError, PluginError, WeightsError, opening

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor, nn

NOTHING: Mapping[str, Any] = MappingProxyType({})

# Tensors on the CPU, in whatever structure the backbone's own `forward` takes: a mapping, or one.
Inputs = Any

# One entry per row: fixed-size, variable-length, or plain values.
Column = Union["Tensor", "Ragged", Sequence[Any]]

# What a task hands back: one entry per row and name (see `Task.columns`).
Columns = Mapping[str, Column]


class Row(NamedTuple):
    """One line of the user's table.

    `index` is its position in the input, from 0, for life; `id` is what the user calls it and
    may repeat; `data` is the model's input, of whatever type its readers and backbones agree on
    (a sequence is a `str`); `fields` holds further columns that the backbone or the task asked
    for, `kept` those that the user wants to find in the result: nobody computes with them.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants of a row
    id: str
    data: Any
    fields: Mapping[str, Any] = NOTHING
    kept: Mapping[str, Any] = NOTHING

    def with_data(self, data: Any) -> Row:
        """The same row with other data; itself when nothing changes."""
        # Not `_replace`: that costs several times more, for every row of the input.
        if data is self.data:
            return self
        return Row(self.index, self.id, data, self.fields, self.kept)


# --------------------------------------------------------------------------- backbones


@dataclass(frozen=True)
class BackboneOptions:
    """What a backbone is given beside its card. Subclass it to add `--option` keys.

    `weights` is the local folder or file that the core resolved, or None when the run needs no
    weights (planning, or a backbone that has none).
    """

    weights: Path | None = None

    def config(self) -> dict[str, Any]:
        """`config.json` of the weights. Raises `WeightsError` when it is absent or not JSON."""
        if self.weights is None:
            raise WeightsError("this backbone reads config.json", "give --weights FOLDER")
        folder = self.weights if self.weights.is_dir() else self.weights.parent
        path = folder / "config.json"
        try:
            found = json.loads(path.read_text())
        except OSError as error:
            raise WeightsError(
                f"cannot read {path}: {error.strerror}",
                "--weights takes a folder with config.json beside the weights",
            ) from error
        except ValueError as error:
            raise WeightsError(f"{path} is not JSON: {error}", "fetch the file again") from error
        if not isinstance(found, dict):
            raise WeightsError(f"{path} does not hold an object", "fetch the file again")
        return found


@dataclass(frozen=True)
class BackboneCard:
    """A backbone as `mgen list backbones` shows it: data only.

    - `modality`: "dna", "rna", "protein", "cell" or "any".
    - `width`: features per token; None when the weights' config decides.
    - `max_tokens`: longest input the model was made for, special tokens included; None: no limit.
    - `weights`: where published weights are, tried in order: hub ids (`org/name`) or
      `package:NAME/PATH`, files inside an installed Python distribution. Empty: the parameters
      are drawn from `seed`, the same on every machine (tests, dummies, baselines).
    - `weights_required`: the user must say which weights (`--weights`): there are none of its own.
    - `parameters`: how many, for the listing; None when unknown.
    - `needs`: the fields (columns of the table beside the input) that `Row.fields` must hold.
    - `takes`: fields that it uses where the table has them.
    """

    name: str
    summary: str
    modality: str
    load: Callable[[BackboneCard, Any], Backbone]
    width: int | None = None
    max_tokens: int | None = None
    licence: str = "unknown"
    weights: tuple[str, ...] = ()
    weights_required: bool = False
    revision: str | None = None
    parameters: int | None = None
    seed: int = 0
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    options: type[BackboneOptions] = BackboneOptions


@dataclass(frozen=True)
class Want:
    """What a task needs from a forward pass, so that nothing else is computed or kept.

    `layers` are numbered as in Hugging Face `hidden_states`: 0 is the embedding output, the
    model's depth what it calls last_hidden_state (`Backbone.layer` makes -1 of it).
    """

    layers: tuple[int, ...] = ()
    logits: bool = False


@dataclass(frozen=True)
class Activations:
    """What a forward pass gave, on the device it ran on.

    - `hidden`: layer number -> (B, L, H) for each layer of `Want.layers`; a bare tensor stands
      for the last layer.
    - `mask`: (B, L) bool, True at residues: no padding, no special tokens.
    - `logits`: (B, L, V) over `Backbone.vocabulary`, when wanted.
    - `tokens`: (B, L) bool, True at every token that is not padding, special ones too; None where
      there are no special ones.
    """

    hidden: Mapping[int, Tensor] | Tensor
    mask: Tensor
    logits: Tensor | None = None
    tokens: Tensor | None = None

    def layer(self, number: int) -> Tensor:
        """The hidden state (B, L, H) of one layer of `Want.layers`."""
        return self.hidden[number] if isinstance(self.hidden, Mapping) else self.hidden


class Backbone:
    """A pretrained model, in two halves: without weights (planning) and with them.

    Write `measure`, `collate`, `build` and `forward`; the rest has defaults that suit
    one-letter-a-token sequence models. A subclass has them at hand; a class of those four methods
    alone is given them (`open_backbone`). The core loads the weights, never the plugin.
    """

    vocabulary: Sequence[str] = ()
    """Names of the columns of `Activations.logits`; empty when the backbone has no logits."""

    token_names: Sequence[str] = ()
    """Names of the tokens that `Activations.mask` keeps, where every row has the same ones."""

    cls_position: int | None = None
    """Where the sequence-level token sits (usually 0), or None when the model has none."""

    depth: int | None = 0
    """Number of blocks: layers 0..depth can be asked for. None: unknown without the weights."""

    max_positions: int | None = None
    """Tokens beyond which the model cannot run at all (absolute positions); None: no limit."""

    packed: bool = False
    """Whether rows of a batch are computed end to end, so that padding costs nothing."""

    plain: bool = False
    """Whether its numbers are to be the very bits of PyTorch's own layers (`mgen_core.dense`)."""

    units: tuple[str, ...] = ()
    """Class names of the layers that are one shard unit each (one gather under ZeRO-3)."""

    ignored: tuple[str, ...] = ()
    """Regular expressions (full match) of checkpoint keys that inference does not need."""

    want: Want = Want()
    """What the task needs; set by the core before `build`, so that unused heads are not built."""

    keep_float32: tuple[str, ...] = ()
    """Regular expressions (full match) of parameters that stay float32 at any precision."""

    def __init__(self, card: BackboneCard, options: BackboneOptions) -> None:
        self.card = card
        self.options = options

    @property
    def width(self) -> int:
        """Features per token of a hidden state."""
        if self.card.width is None:
            raise NotImplementedError(f"{self.card.name}: no width on the card; define `width`")
        return self.card.width

    def layer(self, number: int) -> int:
        """A layer number as the user counts (-1 is the last) as a number from 0.

        Raises `MgenError` for a layer that the model does not have.
        """
        if self.depth is None:
            return number
        if not -self.depth - 1 <= number <= self.depth:
            raise MgenError(
                f"no layer {number} in {self.card.name}",
                f"its layers are 0 (embeddings) to {self.depth}, or -{self.depth + 1} to -1 (last)",
            )
        return number if number >= 0 else number + self.depth + 1

    # -- without weights -------------------------------------------------------------------

    def prepare(self, row: Row) -> Row:
        """Clean and check the row's data once, before anything else sees it.

        Raises `RowError` for data that this model cannot take. What is changed silently here is
        counted by `note`.
        """
        return row

    def note(self, row: Row, prepared: Row) -> str | None:
        """What `prepare` changed, in words for the run's report; None when nothing."""
        return None

    def measure(self, row: Row) -> int:
        """Tokens that this row occupies in a batch: exact, or an upper bound."""
        raise NotImplementedError

    def truncate(self, row: Row, tokens: int) -> Row:
        """The row cut so that `measure` gives at most `tokens`; only called on request."""
        letters = len(row.data) - (self.measure(row) - tokens)
        return row.with_data(row.data[: max(letters, 0)])

    def collate(self, rows: Sequence[Row]) -> Inputs:
        """CPU tensors for one forward pass; the batch dimension follows `rows`."""
        raise NotImplementedError

    def residues(self, row: Row) -> Sequence[int]:
        """Column of `vocabulary` of each residue of a prepared row, for scoring.

        Raises `MgenError` when the logits are over something else than residues.
        """
        try:
            return [self.vocabulary.index(letter) for letter in row.data]
        except ValueError:
            raise MgenError(
                f"{self.card.name} gives no probabilities of residues",
                "use --kind probs or --kind tokens",
            ) from None

    def masked(self, row: Row, position: int) -> Row:
        """A prepared row with one residue (from 0) hidden behind the model's mask token.

        `alphabet.hide` does it for texts that an `Alphabet` with a `mask` encodes. Raises
        `MgenError` when the model has no mask token.
        """
        raise MgenError(f"{self.card.name} cannot mask residues", "use --score pll")

    # -- with weights ----------------------------------------------------------------------

    def build(self) -> nn.Module:
        """The module, empty: parameters may be on the meta device; the core fills them."""
        raise NotImplementedError

    def sources(self, name: str, keys: Mapping[str, Any]) -> Sequence[str]:
        """Checkpoint keys whose concatenation along dim 0 is the parameter `name`.

        `keys` are those of the opened checkpoint, since one model is published under several
        prefixes. Several keys make a fused or stacked parameter (QKV, experts) from published
        files as they are. None for a buffer: it stays as it was built.
        """
        return (name,)

    def forward(self, module: nn.Module, inputs: Inputs, want: Want) -> Activations:
        """One forward pass; `inputs` are on the module's device."""
        raise NotImplementedError


def open_backbone(card: BackboneCard, options: BackboneOptions) -> Backbone:
    """What the card's `load` gives, with the defaults of `Backbone` where it has none.

    Raises `PluginError` when one of the four methods is missing.
    """
    with opening(card):
        found = card.load(card, options)
    missing = [n for n in ("measure", "collate", "build", "forward") if not hasattr(found, n)]
    if missing:
        raise PluginError(
            f"backbone {card.name} has no {', '.join(missing)}",
            "this is a defect of the backbone plugin: report it to its author",
        )
    if not isinstance(found, Backbone):
        kind: type = type(found)
        found.__class__ = type(kind.__name__, (kind, Backbone), {})
        vars(found).setdefault("card", card)
        vars(found).setdefault("options", options)
    return found


# --------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class TaskOptions:
    """Options of a task. Subclass it to add keys."""


@dataclass(frozen=True)
class TaskCard:
    """A task as `mgen list tasks` shows it: data only."""

    name: str
    summary: str
    load: Callable[[TaskCard, Any, Backbone], Task]
    options: type[TaskOptions] = TaskOptions


@dataclass(frozen=True)
class Ragged:
    """One variable-length entry per row: `values` (sum of lengths, ...), rows end to end."""

    values: Tensor
    lengths: Sequence[int]


class Task:
    """Turns activations into columns. It never sees ranks, files or padding rules.

    `needs` says what the forward pass must keep; `metadata` travels into the file's schema. `head`
    is what `build` gave, once the core has filled it.
    """

    needs: Want = Want()
    metadata: Mapping[str, str] = NOTHING
    head: nn.Module | None = None

    def __init__(self, card: TaskCard, options: TaskOptions, backbone: Backbone) -> None:
        self.card = card
        self.options = options
        self.backbone = backbone

    def build(self) -> nn.Module | None:
        """The task's own module, empty; the core fills it from the fine-tuned checkpoint.

        Its parameters have the names that the checkpoint has for the head. None: no head.
        """
        return None

    def columns(self, activations: Activations, rows: Sequence[Row]) -> Columns:
        """Named columns, one entry per row, in the order of `rows`.

        A tensor (n, ...) is a column of fixed-size entries, a `Ragged` of variable-length ones,
        a list of `str` or `int` is taken as it is. Tensors may stay on the device: the engine
        moves them to the CPU, once.
        """
        raise NotImplementedError

    def variants(self, row: Row) -> Sequence[Row]:
        """What is run for a row: itself, or several prepared rows whose columns `gather` joins."""
        return (row,)

    def gather(self, columns: Columns, counts: Sequence[int]) -> Columns:
        """Columns of the rows from those of their variants; row i has `counts[i]` of them."""
        return columns

    def values(self, rows: int, tokens: int) -> int:
        """How many numbers `columns` gives for so many rows and tokens (for disk estimates)."""
        raise NotImplementedError


# --------------------------------------------------------------------------- readers


@dataclass(frozen=True)
class ReaderOptions:
    """Options of a reader. Subclass it to add keys; a field `split` gets what `--split` says."""


@dataclass(frozen=True)
class ReaderCard:
    """A reader as `mgen list readers` shows it.

    `suffixes` (".csv", ".csv.gz") choose the reader of a file; `claims(uri)` may take what has no
    suffix (a folder, a hub id). The longest matching suffix wins, then the first claim.
    `takes(data)` says whether `Reader.open` takes an object in memory, as Python calls give it.
    """

    name: str
    summary: str
    load: Callable[[ReaderCard, Any], Reader]
    suffixes: tuple[str, ...] = ()
    claims: Callable[[str], bool] | None = None
    takes: Callable[[Any], bool] | None = None
    options: type[ReaderOptions] = ReaderOptions


class Rows:
    """An open table: its columns by name, read in order, as often as asked."""

    columns: Sequence[str] = ()
    """Names that `chunks` accepts, in the file's order."""

    default_id: str | None = None
    """Column that holds ids when the user names none and this format knows better than `id`."""

    default_x: str | None = None
    """Column that holds the model's input, likewise."""

    length: int | None = None
    """Number of rows, when it is known without reading."""

    options: ReaderOptions = ReaderOptions()
    """With which they were opened; set by the core."""

    def chunks(self, columns: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
        """The named columns, in input order, a few thousand rows at a time.

        Ids and sequences come as `str` exactly as written ("007" stays "007"), a missing value
        as None. Where a row cannot be parsed, a `RowError` that says why stands in its cells (in
        one at least), and that row is set aside. Raises `InputError` where no row can be told from
        the next. Memory stays flat whatever the input's length.
        """
        raise NotImplementedError

    def digest(self) -> str:
        """A fingerprint of the content: any change to any row changes it."""
        raise NotImplementedError


class Reader:
    """Opens files of one format."""

    def __init__(self, card: ReaderCard, options: ReaderOptions) -> None:
        self.card = card
        self.options = options

    def open(self, uri: Any) -> Rows:
        """Open one file, folder or hub id, or an object that the card takes.

        Raises `InputError` for what cannot be read.
        """
        raise NotImplementedError


# --------------------------------------------------------------------------- writers


@dataclass(frozen=True)
class WriterCard:
    """A writer as `mgen list writers` shows it.

    `suffix` chooses it for `mgen merge --to FILE`; `dtypes` are the floats that it can hold;
    `into`: whether it can add to a copy of a file of the user's (`Writer.source`).
    """

    name: str
    suffix: str
    summary: str
    load: Callable[[WriterCard], Writer]
    dtypes: tuple[str, ...] = ("float32", "float16")
    into: bool = False


class Writer:
    """Columns to a file and back. It writes the open file that it is given, and nothing else.

    Tables are Arrow: `row` (int64), `id` (string), the task's columns, `error` (string, null
    where all is well). A fixed-size column is a FixedSizeList, a ragged one a List. bfloat16,
    which Arrow lacks, is uint16 whose field metadata says `mgen.dtype: bfloat16`.
    """

    spools: bool = False
    """Whether `write` puts all of its numbers into temporary files before the file itself."""

    scratch: Path | None = None
    """Where those are made, on the file's own disk; set by the core. None: the system's place."""

    source: Path | None = None
    """The file that a copy is made of, for the columns to be added to; set by the core."""

    def __init__(self, card: WriterCard) -> None:
        self.card = card

    def write(self, file: BinaryIO, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
        """Write the tables, all of `schema`, in order, from the start of the file to its end.

        The file may be on its way to another machine: it can `write` and `tell`, not seek. Parts
        hand over one table; merge hands over a stream larger than memory. Raises `MgenError`
        before writing for a type that the format cannot hold.
        """
        raise NotImplementedError

    def read(self, file: BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
        """The table of a file that `write` made, with equal values. The file can seek.

        With `columns` only those are needed, and wide ones that are not should not be decoded.
        """
        raise NotImplementedError


Card = Union[BackboneCard, TaskCard, ReaderCard, WriterCard]
