"""Labels of the rows of a run, as tables and configs give them, and what comes of comparing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO

import typer

from ..errors import InputError, MgenError
from .listing import show

if TYPE_CHECKING:
    from ..api import Rows
    from ..config import RunConfig
    from ..metrics import Compared, Metrics
    from ..modelgenerator.rows import Chosen
    from .predict import Asked

LABEL_NAMES = ("labels", "label")
IGNORED = -100  # a residue without a label
STOP = "*"  # of translated genes: models drop it
UNITS = "predictions are in units of training, labels are not: mse, mae and r2 are left out"
Read = Callable[[Sequence[Any]], Any]


# --------------------------------------------------------------------------- labels


@dataclass(frozen=True)
class Labels:
    """Labels of the rows of a run, in their order: each iteration reads the table anew.

    `names` are those of the classes, labels or outputs. `x_col`: labels are of its letters;
    `exactly`: one each. `units`: why predictions are in other units than the labels, if they are.
    `cuts`: rows that are too long were shortened.
    """

    task: str
    source: Rows
    columns: tuple[str, ...]
    read: Read
    names: tuple[str, ...]
    hint: str
    multilabel: bool = False
    limit: int | None = None
    x_col: str | None = None
    exactly: bool = True
    units: str | None = None
    cuts: bool = False

    def __iter__(self) -> Iterator[Any]:
        names = [*self.columns, *([self.x_col] if self.x_col else [])]
        row = 0
        for chunk in self.source.chunks(list(dict.fromkeys(names))):
            for cells in zip(*(chunk[name] for name in names)):
                if row == self.limit:
                    return
                try:
                    yield self._label(cells)
                except ValueError as error:
                    where = f"row {row} (counted from 0), column {', '.join(self.columns)}"
                    raise InputError(f"{where}: {error}", self.hint) from error
                row += 1

    def check(self) -> None:
        """Raises `InputError` for the first label that is not what the model predicts."""
        for _ in self:
            pass

    def _label(self, cells: Sequence[Any]) -> Any:
        label = self.read(cells[: len(self.columns)])
        if self.x_col and isinstance(cells[-1], str):
            check_length(self.task, label, cells[-1].strip(), exactly=self.exactly)
        return label


def find_labels(
    asked: Asked, config: RunConfig, rows: Chosen | None, given: Sequence[str] | None
) -> Labels:
    """The label columns of a run. Raises `MgenError` where they do not fit the model."""
    from ..api import BackboneCard, TaskCard
    from ..catalog import discover
    from ..config import checked
    from ..modelgenerator.rows import Chosen
    from ..table import choose_columns, open_sources

    catalog = discover()
    if config.task not in ("classify", "regress", "classify_tokens", "classify_pairs"):
        raise MgenError(
            f"the task {config.task} predicts nothing that labels tell",
            "mgen test is for fine-tuned models: give the config.yaml of one, and its --ckpt",
        )
    # Not shortened, as the model's input may be: one label a letter.
    source = Chosen(
        *((rows.sources, rows.numbers) if rows else (open_sources(config, catalog), None))
    )
    card = catalog.find(TaskCard, config.task)
    own = {k: v for k, v in config.options.items() if k in card.options.__dataclass_fields__}
    head: Any = checked(card.options, own)
    foreign = asked.found
    columns = label_columns(source.columns, given, foreign.labels if foreign else ())
    names = output_names(config.task, head, columns)
    x_col = None
    if config.task in ("classify_tokens", "classify_pairs"):
        x_col = choose_columns((source,), config, catalog.find(BackboneCard, config.backbone)).x_col
    normalized = foreign is not None and bool(foreign.head.get("normalized"))
    read, hint = reader(config.task, head, names)
    return Labels(
        task=config.task,
        source=source,
        columns=columns,
        read=read,
        names=names,
        hint=f"{hint}; --y-col says which column holds them",
        multilabel=getattr(head, "multilabel", False),
        limit=config.limit,
        x_col=x_col,
        exactly=foreign is not None,  # its models have a token for each letter
        units=other_units(head, normalized=normalized) if config.task == "regress" else None,
        cuts=config.too_long == "truncate" or (rows is not None and rows.letters is not None),
    )


def label_columns(
    columns: Sequence[str], given: Sequence[str] | None, told: Sequence[str]
) -> tuple[str, ...]:
    """The columns with labels: as given, else as the config told, else by their usual names."""
    asked = given or (told if tuple(told) != LABEL_NAMES[:1] else ())
    why = "--y-col takes of" if given else "the config's y_col names it; --y-col takes another of"
    for name in asked:
        if name not in columns:
            raise InputError(f"no column {name!r} with labels", f"{why}: {', '.join(columns)}")
    found = asked or [name for name in LABEL_NAMES if name in columns][:1]
    if not found:
        raise InputError(
            f"no column called {' or '.join(LABEL_NAMES)}",
            f"say which one with --y-col; the columns are: {', '.join(columns)}",
        )
    return tuple(found)


def output_names(task: str, head: Any, columns: Sequence[str]) -> tuple[str, ...]:
    """Names of the model's classes, labels or outputs. Raises `MgenError` for what cannot be."""
    if task == "classify_pairs":
        if head.top_pairs is not None:
            raise MgenError("metrics of pairs need all of them", "leave out top_pairs")
        return ("no pair", "pair")
    usual = 1 if task == "regress" else None
    count = head.outputs or len(head.labels) or usual
    if count is None:
        raise MgenError(f"{task}: number of classes unknown", "give --option outputs=N")
    several = task == "regress" or getattr(head, "multilabel", False)
    if several and task == "classify_tokens":
        raise MgenError("several labels a residue cannot be tested", "leave out multilabel")
    if len(columns) not in ((1, count) if several else (1,)):
        raise MgenError(
            f"{len(columns)} label columns for {count if several else 1}: {', '.join(columns)}",
            f"the model gives {count} numbers a row" if several else "name one with --y-col",
        )
    if head.labels:
        return tuple(head.labels)
    if several and len(columns) == count:
        return tuple(columns)
    return tuple(map(str, range(count)))


def other_units(head: Any, *, normalized: bool) -> str | None:
    """Why a regression's predictions are not in units of the labels; None where they are."""
    if head.scaled:
        return f"{UNITS} (leave out as_reference for label units)" if head.as_reference else None
    if not normalized or (head.label_mean and head.label_std):
        return None
    return f"{UNITS} (--label-mean and --label-std, those of training, give label units)"


# --------------------------------------------------------------------------- what is in a cell


def reader(task: str, head: Any, names: Sequence[str]) -> tuple[Read, str]:
    """What makes a label of a row's cells, and how labels are written, for errors."""
    count = len(names)
    if task == "regress":
        kind = f"lists of {count} numbers, or {count} columns" if count > 1 else "numbers"
        return partial(read_several, one=read_number, count=count), f"labels are {kind}"
    if task == "classify_pairs":
        return read_pairs, "labels are lists of pairs, such as [[0, 9], [1, 8]], counted from 0"
    if task == "classify" and head.multilabel:
        one = partial(read_class, names=(), count=2)
        kind = f"0 or 1, in {count} columns or in lists"
        return partial(read_several, one=one, count=count), f"labels are {kind}"
    one = partial(read_class, names=tuple(head.labels), count=count)
    kind = f"whole numbers from 0 to {count - 1}"
    if head.labels:
        kind = f"names ({', '.join(names[:8])}{', ...' if count > 8 else ''}), or {kind}"
    if task == "classify":
        return lambda cells: one(_there(cells[0])), f"labels are {kind}"
    return partial(read_residues, one=one, names=head.labels), f"labels are lists of {kind}"


def read_number(cell: Any) -> float:
    """A finite number."""
    try:
        found = float(cell)
    except (TypeError, ValueError):
        raise ValueError(f"{cell!r:.40} is not a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{cell!r:.40} is not a finite number")
    return found


def read_class(cell: Any, names: Sequence[str], count: int) -> int:
    """A class by its name, or by its number where names are no numbers themselves."""
    if names and str(cell) in names:
        return names.index(str(cell))
    number = _whole(cell)
    if number is None or any(_whole(name) is not None for name in names):
        raise ValueError(f"{cell!r:.40} is no class")
    if not 0 <= number < count:
        raise ValueError(f"class {number} is not one of 0 to {count - 1}")
    return number


def read_several(cells: Sequence[Any], one: Callable[[Any], Any], count: int) -> list[Any]:
    """A label for each output: in columns, or in a list."""
    found = cells
    if len(cells) < count or isinstance(cells[0], (list, tuple)):
        found = read_list(_there(cells[0]))
    if len(found) != count:
        raise ValueError(f"{len(found)} labels for {count} outputs")
    return [one(_there(cell)) for cell in found]


def read_residues(
    cells: Sequence[Any], one: Callable[[Any], int], names: Sequence[str]
) -> list[int]:
    """A class for each residue; -100 for one without. One-letter names may be one text."""
    cell = _there(cells[0])
    letters = isinstance(cell, str) and names and all(len(name) == 1 for name in names)
    found = list(cell) if letters and not cell.startswith("[") else read_list(cell)
    ignored = (IGNORED, str(IGNORED))
    return [IGNORED if label in ignored else one(_there(label)) for label in found]


def read_pairs(cells: Sequence[Any]) -> list[tuple[int, int]]:
    """Pairs of residues, counted from 0; one with itself is none."""
    found = [_pair(pair) for pair in read_list(_there(cells[0]))]
    return [(i, j) for i, j in found if i != j]


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        i, j = map(_whole, value)
        if i is not None and j is not None and min(i, j) >= 0:
            return i, j
    raise ValueError(f"{value!r:.40} is not a pair of residues")


def read_list(cell: Any) -> Sequence[Any]:
    """A list, or one written as JSON."""
    found = cell
    if isinstance(cell, str):
        try:
            found = json.loads(cell)
        except ValueError:
            found = None
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{cell!r:.40} is not a list")
    return found


def check_length(task: str, label: Sequence[Any], text: str, *, exactly: bool) -> None:
    """Raises `ValueError` for labels that cannot be those of a text."""
    if task == "classify_pairs":
        last = max((max(pair) for pair in label), default=-1)
        if last >= len(text):
            raise ValueError(f"a pair has residue {last}, counted from 0, of {len(text)}")
        return
    fitting = (len(text), len(text.removesuffix(STOP)))
    if len(label) > len(text) or (exactly and len(label) not in fitting):
        raise ValueError(f"{len(label)} labels for {len(text)} residues")


def _there(cell: Any) -> Any:
    if cell is None or cell == "":
        raise ValueError("no label")
    return cell


def _whole(cell: Any) -> int | None:
    """A whole number, however it is written; None for anything else."""
    if type(cell) is int:
        return cell
    if isinstance(cell, str) and cell.strip().lower() in ("true", "false"):
        return int(cell.strip().lower() == "true")
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


# --------------------------------------------------------------------------- figures


def compare(config: RunConfig, labels: Labels) -> dict[str, Any]:
    """The metrics of a run, written beside it. Raises `RunError` where rows are missing."""
    from .. import metrics, storage
    from ..catalog import discover
    from ..manifest import Manifest
    from ..merge import Selection, complete, selected

    manifest, everything, catalog = Manifest.open(config.output), Selection(), discover()
    done = complete(manifest, everything)
    _, tables = selected(manifest, done, catalog, everything)
    takes = {
        "classify": metrics.take_classes(labels.names),
        "regress": metrics.take_numbers,
        "classify_tokens": metrics.take_residues(labels.cuts),
        "classify_pairs": metrics.take_pairs(labels.cuts),
    }
    compared = metrics.gather(tables, labels, takes[config.task])
    figures = figures_of(labels, compared)
    name, draw = picture_of(labels, compared, figures)
    found = {
        "task": config.task,
        "y_col": list(labels.columns),
        "rows": compared.rows,
        "rows_set_aside": compared.failed,
        **figures.as_dict(),
    }
    text = json.dumps(found, indent=1, ensure_ascii=False)

    def write(file: BinaryIO) -> None:
        file.write(f"{text}\n".encode())

    storage.write_all({config.output / "metrics.json": write, config.output / name: draw})
    return found


def figures_of(labels: Labels, compared: Compared) -> Metrics:
    """What the task is judged by."""
    from .. import metrics

    if labels.task == "regress":
        found = metrics.of_numbers(compared, labels.names, same_units=labels.units is None)
        found.notes.extend([labels.units] if labels.units else [])
    elif labels.task == "classify_pairs":
        found = metrics.of_pairs(compared)
    elif labels.multilabel:
        found = metrics.of_labels(compared, labels.names)
    else:
        unit = "residues" if labels.task == "classify_tokens" else "rows"
        found = metrics.of_classes(compared, labels.names, unit)
    if compared.cut:
        rows = f"{compared.cut:,} {'row was' if compared.cut == 1 else 'rows were'}"
        found.notes.append(f"{rows} shortened for the model: labels beyond that are left out")
    return found


def picture_of(
    labels: Labels, compared: Compared, figures: Metrics
) -> tuple[str, Callable[[BinaryIO], None]]:
    """The name of a picture, and what draws it."""
    from .. import plots

    if labels.task == "regress":
        titles = [f"{one['output']}: Pearson {_digits(one['pearson'])}" for one in figures.each]
        points = compared.predicted, compared.truth
        return "scatter.png", lambda path: plots.scatter(
            path, *points, titles, same_units=labels.units is None
        )
    several = figures.confusion if labels.multilabel else [figures.confusion]
    names = ("no", "yes") if labels.multilabel else labels.names
    over = labels.names if labels.multilabel else (f"{figures.count:,} {figures.unit}",)
    return "confusion.png", lambda path: plots.confusion(path, several, names, over)


def tell(found: dict[str, Any], *, as_json: bool) -> None:
    """The metrics on stdout: JSON, or tables. What is undefined there is said on stderr."""
    for note in found["notes"]:
        typer.echo(f"note      {note}", err=True)
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    counts = {"rows": found["rows"], "set aside": found["rows_set_aside"]}
    counts |= {found["unit"]: found["compared"]}
    show([{"metric": k, "value": _digits(v)} for k, v in {**counts, **found["metrics"]}.items()])
    kind = next((one for one in ("classes", "labels", "outputs") if one in found), "")
    each = found.get(kind, ())
    if len(each) > 1:
        typer.echo()
        show([{key: _digits(value) for key, value in one.items()} for one in each])


def _digits(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
